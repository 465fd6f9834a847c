package remote_test

import (
	"bytes"
	"context"
	"io"
	"math/rand"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// cutter forwards connections to a server and cuts some after a number of bytes sent.
type cutter struct {
	net.Listener
	to   string
	cuts atomic.Int32 // how many more connections are cut
	at   int64        // after so many bytes to the server
	sent atomic.Int64 // bytes to the server in all
	wg   sync.WaitGroup

	mu    sync.Mutex // guards conns
	conns []net.Conn
}

func newCutter(t *testing.T, to string, cuts int32, at int64) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{Listener: l, to: to, at: at}
	c.cuts.Store(cuts)
	c.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			c.wg.Go(func() { c.forward(in) })
		}
	})
	t.Cleanup(func() {
		err := l.Close()
		c.mu.Lock()
		for _, conn := range c.conns {
			_ = conn.Close() // some are closed
		}
		c.mu.Unlock()
		c.wg.Wait()
		if err != nil {
			t.Error(err)
		}
	})
	return c
}

func (c *cutter) forward(in net.Conn) {
	out, err := net.Dial("tcp", c.to)
	if err != nil {
		_ = in.Close()
		return
	}
	c.mu.Lock()
	c.conns = append(c.conns, in, out)
	c.mu.Unlock()
	c.wg.Go(func() {
		_, _ = io.Copy(in, out)
		_ = in.Close()
	})
	buf, n := make([]byte, 64<<10), int64(0)
	for {
		k, err := in.Read(buf)
		if k > 0 {
			_, _ = out.Write(buf[:k])
			n += int64(k)
			c.sent.Add(int64(k))
		}
		if n > c.at && c.cuts.Add(-1) >= 0 {
			_ = in.(*net.TCPConn).SetLinger(0) // a reset, as a dying NAT makes
			_ = in.Close()
			err = io.EOF
		}
		if err != nil {
			_ = out.(*net.TCPConn).CloseWrite()
			return
		}
	}
}

// TestUploadResumes has the connection to a real registry break in the middle of a blob.
func TestUploadResumes(t *testing.T) {
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	data := make([]byte, 24<<20)
	rand.New(rand.NewSource(1)).Read(data)
	doc := remote.NewDocument(ocispec.MediaTypeImageLayer, data)
	for name, chunk := range map[string]int64{"one request": 0, "chunks of 5 MiB": 5 << 20} {
		t.Run(name, func(t *testing.T) {
			c := newCutter(t, r.Host, 2, 4<<20)
			o := impatient()
			o.UploadChunk = chunk
			repo := c.Addr().String() + "/" + strings.ReplaceAll(name, " ", "-") + "/app"
			repo = strings.ToLower(strings.ReplaceAll(repo, "MiB", "mib"))
			got, err := openTarget(t, repo+":v", o).Push(t.Context(), doc.Blob())
			if err != nil || got != remote.Uploaded {
				t.Fatalf("Push = %v, %v", got, err)
			}
			back, err := readAll(t.Context(), openSource(t, repo+":v", remote.Options{}), doc.Descriptor)
			if err != nil || !bytes.Equal(back, data) {
				t.Fatalf("Fetch = %d bytes, %v", len(back), err)
			}
			if c.cuts.Load() > 0 {
				t.Errorf("%d connections were not cut", c.cuts.Load())
			}
			over := float64(c.sent.Load())/float64(len(data)) - 1
			t.Logf("sent %.1f MB for %.1f MB, %.0f %% more", float64(c.sent.Load())/1e6, float64(len(data))/1e6, 100*over)
			if over > 0.5 {
				t.Errorf("%.0f %% of the blob was sent again: it was not resumed", 100*over)
			}
		})
	}
}

// TestUploadChunks sends chunks of every size around the blob's.
func TestUploadChunks(t *testing.T) {
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	f := newFaulty(t)
	for i, chunk := range []int64{1, 999, 1000, 1001, 499, 500, 501} {
		doc := remote.NewDocument(ocispec.MediaTypeImageLayer, bytes.Repeat([]byte{byte(i)}, 1000))
		if chunk == 1 {
			doc = remote.NewDocument(ocispec.MediaTypeImageLayer, []byte("abc"))
		}
		for _, host := range []string{r.Host, f.host} {
			o := remote.Options{UploadChunk: chunk}
			if got, err := openTarget(t, host+"/app:v", o).Push(t.Context(), doc.Blob()); err != nil || got != remote.Uploaded {
				t.Errorf("%s: Push in chunks of %d = %v, %v", host, chunk, got, err)
				continue
			}
			got, err := readAll(t.Context(), openSource(t, host+"/app:v", o), doc.Descriptor)
			if err != nil || !bytes.Equal(got, doc.Data) {
				t.Errorf("%s: Fetch = %d bytes, %v", host, len(got), err)
			}
		}
	}
	patches := 0
	for _, q := range f.seen() {
		if q.Method == http.MethodPatch {
			patches++
		}
	}
	if patches == 0 {
		t.Error("nothing was sent in chunks")
	}
}

// TestUploadElsewhere follows a Location to another host, which gets no credentials.
func TestUploadElsewhere(t *testing.T) {
	t.Parallel()
	storage := newFaulty(t)
	var leaked atomic.Bool
	storage.set(func(*http.Request) bool { return true }, func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if r.Header.Get("Authorization") != "" || r.Header.Get("X-Secret") != "" {
			leaked.Store(true)
		}
		if n, _ := io.Copy(io.Discard, r.Body); n == 5 && r.URL.Query().Get("digest") != "" && r.URL.Query().Get("state") == "a/b c" {
			w.WriteHeader(http.StatusCreated)
		} else {
			w.WriteHeader(http.StatusBadRequest)
		}
		return true
	})
	f := newFaulty(t)
	f.set(func(*http.Request) bool { return true }, func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if _, _, ok := r.BasicAuth(); !ok {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if r.Method == http.MethodPost {
			w.Header().Set("Location", storage.URL+"/somewhere?state=a%2Fb+c")
			w.WriteHeader(http.StatusAccepted)
			return true
		}
		return false
	})
	o := impatient()
	o.HostsDir = hostsDir(t, f.host, "server = \""+f.URL+"\"\n[header]\nX-Secret = \"s\"\n")
	o.Credentials = func(string) (string, string, error) { return "u", "p", nil }
	got, err := openTarget(t, f.host+"/app:v", o).Push(t.Context(), remote.NewDocument(ocispec.MediaTypeImageLayer, []byte("12345")).Blob())
	if err != nil || got != remote.Uploaded {
		t.Errorf("Push = %v, %v", got, err)
	}
	if leaked.Load() {
		t.Error("the other host got credentials")
	}
}

// TestSlowSource has the blob come slower than a stall: that is not the registry's fault.
func TestSlowSource(t *testing.T) {
	t.Parallel()
	f := newFaulty(t)
	doc := remote.NewDocument(ocispec.MediaTypeImageLayer, bytes.Repeat([]byte("x"), 4000))
	b := doc.Blob()
	b.Open = slowly(doc.Data)
	if got, err := openTarget(t, f.host+"/app:v", hasty()).Push(t.Context(), b); err != nil || got != remote.Uploaded {
		t.Errorf("Push = %v, %v", got, err)
	}
}

func slowly(data []byte) func(context.Context) (io.ReadCloser, error) {
	return func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(&slowReader{data}), nil
	}
}

// slowReader gives a quarter of its data after every pause longer than a stall.
type slowReader struct{ data []byte }

func (r *slowReader) Read(p []byte) (int, error) {
	if len(r.data) == 0 {
		return 0, io.EOF
	}
	time.Sleep(stall + stall/4)
	n := copy(p[:min(len(p), 2000)], r.data)
	r.data = r.data[n:]
	return n, nil
}
