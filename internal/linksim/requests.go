package linksim

import (
	"bytes"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"time"
)

// maxHeader bounds the header of a request that is looked at, in bytes; net/http's servers take as much.
const maxHeader = http.DefaultMaxHeaderBytes

// requests finds the HTTP/1.1 requests in what a client sends. It gives up, silently, on what is none: TLS, say.
type requests struct {
	found func(Request)

	header []byte // of a request, so far
	body   int64  // bytes of a body that are still to come
	lost   bool   // what comes cannot be understood
}

func (r *requests) write(p []byte) {
	for len(p) > 0 && !r.lost {
		if r.body > 0 {
			n := min(r.body, int64(len(p)))
			r.body, p = r.body-n, p[n:]
			continue
		}
		r.header = append(r.header, p...)
		p = nil
		end := bytes.Index(r.header, []byte("\r\n\r\n"))
		if end < 0 {
			r.lost = len(r.header) > maxHeader
			continue
		}
		p = r.header[end+4:]
		r.parse(string(r.header[:end]))
		r.header = nil
	}
}

func (r *requests) parse(header string) {
	lines := strings.Split(header, "\r\n")
	words := strings.Fields(lines[0])
	if len(words) != 3 || !strings.HasPrefix(words[2], "HTTP/1.") {
		r.lost = true
		return
	}
	q := Request{At: time.Now(), Method: words[0], Target: words[1]}
	for _, line := range lines[1:] {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch textproto.CanonicalMIMEHeaderKey(name) {
		case "Range":
			q.Range = value
		case "Content-Length":
			n, err := strconv.ParseInt(value, 10, 64)
			r.body, r.lost = max(n, 0), err != nil
		case "Transfer-Encoding":
			r.lost = true // chunks are not followed
		}
	}
	r.found(q)
}
