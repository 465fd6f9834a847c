package fill

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// pacedSource gives data, at most step bytes of it a read, each pause later.
type pacedSource struct {
	data  []byte
	step  int
	pause time.Duration
}

func (s *pacedSource) Range(ctx context.Context, _ Request) (io.ReadCloser, error) {
	return &pacedBody{Reader: bytes.NewReader(s.data), pacedSource: s, ctx: ctx}, nil
}

func (s *pacedSource) Retry(error) Retry { return Retry{} }

type pacedBody struct {
	io.Reader
	*pacedSource
	ctx context.Context
}

func (b *pacedBody) Read(p []byte) (int, error) {
	select {
	case <-b.ctx.Done():
		return 0, context.Cause(b.ctx)
	case <-time.After(b.pause):
		return b.Reader.Read(p[:min(len(p), b.step)])
	}
}

func (b *pacedBody) Close() error { return nil }

// A request is ended for what its source does, not for what its reader does: one that pauses for minutes, for memory or a disk, goes on; one
// that waits for next to nothing does not, whether it pauses in between or not.
func TestSlow(t *testing.T) {
	for name, c := range map[string]struct {
		src   pacedSource
		pause time.Duration // of the reader, after each read
		slow  bool
	}{
		"quick, and a reader that pauses": {src: pacedSource{step: 64, pause: time.Millisecond}, pause: 10 * time.Minute},
		"quick":                           {src: pacedSource{step: 4 << 10, pause: time.Second}},
		"a trickle":                       {src: pacedSource{step: 1, pause: 20 * time.Millisecond}, slow: true},
		"a trickle, and a reader that pauses": {
			src: pacedSource{step: 1, pause: 20 * time.Millisecond}, pause: time.Second, slow: true,
		},
		"nothing": {src: pacedSource{step: 1, pause: time.Hour}, slow: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c.src.data = make([]byte, 16<<10)
				o := newOrigin(&c.src)
				defer o.cancel()
				rc, err := o.request(t.Context(), Request{}, time.Minute)
				if err != nil {
					t.Fatal(err)
				}
				o.use.Add(1) // as Blob.origins does
				rc.b = &Blob{s: &Scheduler{}}
				n, p := 0, make([]byte, len(c.src.data))
				for err == nil {
					var got int
					got, err = rc.Read(p)
					n += got
					time.Sleep(c.pause)
				}
				if c.slow && !errors.Is(err, errSlow) || !c.slow && (!errors.Is(err, io.EOF) || n != len(p)) {
					t.Errorf("%d of %d bytes, %v, want slow: %v", n, len(p), err, c.slow)
				}
				if err := rc.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}
