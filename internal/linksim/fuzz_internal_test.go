package linksim

import (
	"slices"
	"testing"
	"time"
)

// seen returns the requests that are found in p when it comes in pieces of size bytes.
func seen(p []byte, size int) (found []Request, r *requests) {
	r = &requests{found: func(q Request) {
		q.At = time.Time{}
		found = append(found, q)
	}}
	for piece := range slices.Chunk(p, size) {
		r.write(piece)
	}
	return found, r
}

// FuzzRequests finds requests in any bytes. How they are cut into pieces changes nothing, and no more than a header is kept.
func FuzzRequests(f *testing.F) {
	f.Add([]byte("GET /v2/ HTTP/1.1\r\nHost: a\r\nRange: bytes=0-5\r\n\r\nGET /b HTTP/1.1\r\n\r\n"), uint8(3))
	f.Add([]byte("POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nGET GET / HTTP/1.1\r\n\r\n"), uint8(1))
	f.Add([]byte("POST / HTTP/1.1\r\nContent-Length: -4\r\n\r\n\r\n\r\n"), uint8(1))
	f.Add([]byte("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"), uint8(2))
	f.Add([]byte("\x16\x03\x01\r\n\r\n"), uint8(5))
	f.Fuzz(func(t *testing.T, p []byte, size uint8) {
		if len(p) > 1<<16 {
			return
		}
		whole, one := seen(p, len(p)+1)
		pieces, many := seen(p, int(size)+1)
		if !slices.Equal(whole, pieces) || one.lost != many.lost || one.body != many.body {
			t.Errorf("pieces of %d bytes: %+v, want %+v; %d bytes to come, want %d; lost %v, want %v", int(size)+1, pieces, whole, many.body, one.body, many.lost, one.lost)
		}
		if len(many.header) > len(p) || many.body < 0 || many.lost && len(many.header) > maxHeader+int(size)+1 {
			t.Errorf("%d bytes of a header are kept of %d, %d to come", len(many.header), len(p), many.body)
		}
	})
}
