package fill_test

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"slices"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// answers are ways to answer the n-th request wrongly; nil, nil is the right answer.
var answers = map[string]func(n int, right []byte) (io.Reader, error){
	"down at first": func(n int, _ []byte) (io.Reader, error) {
		if n <= 3 {
			return nil, errDown
		}
		return nil, nil
	},
	"cut short, again and again": func(n int, right []byte) (io.Reader, error) {
		if n <= 3 {
			return bytes.NewReader(right[:len(right)*2/3]), nil
		}
		return nil, nil
	},
	"nothing comes": func(n int, _ []byte) (io.Reader, error) {
		if n <= 2 {
			return bytes.NewReader(nil), nil
		}
		return nil, nil
	},
	"breaks in the middle": func(n int, right []byte) (io.Reader, error) {
		if n <= 2 {
			return io.MultiReader(bytes.NewReader(right[:len(right)/2]), iotest.ErrReader(errDown)), nil
		}
		return nil, nil
	},
	"a bit is wrong once": func(n int, right []byte) (io.Reader, error) {
		if n == 1 {
			return bytes.NewReader(flip(right)), nil
		}
		return nil, nil
	},
	"byte by byte": func(_ int, right []byte) (io.Reader, error) {
		return iotest.DataErrReader(&small{bytes.NewReader(right)}), nil
	},
}

// small reads a few bytes at a time.
type small struct{ io.Reader }

func (s *small) Read(p []byte) (int, error) { return s.Reader.Read(p[:min(len(p), 1777)]) }

func flip(p []byte) []byte {
	p = bytes.Clone(p)
	p[len(p)/2] ^= 4
	return p
}

// Whatever goes wrong for a while, everything is right in the end and nothing is put twice: with readers alone, and with a run.
func TestFaultsPass(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"nydus zstd", "nydus batch", "prefetch batches", "ref"} {
		img := kinds[kind](t)
		for name, answer := range answers {
			for _, running := range []bool{false, true} {
				m := mounted(t, img, quick())
				for _, src := range m.sources {
					src.set(func(n int, _ fill.Request, right []byte) (io.Reader, error) { return answer(n, right) })
				}
				if running {
					run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: m.prefetchBlob(), Background: fill.BackgroundFull})
					defer run.Close()
				}
				m.ensureAll()
				m.check()
				m.once()
				if s := m.sum(); s.Failed != 0 {
					t.Errorf("%s, %s, running %v: Stats = %+v", kind, name, running, s)
				}
				m.s.Close()
			}
		}
	}
}

// What is wrong for good is an error of the read that wants it, and of no other; it never reaches the cache; when it is right
// again, so are reads.
func TestFaultsStay(t *testing.T) {
	t.Parallel()
	errFull := errors.New("no space left on device")
	for name, c := range map[string]struct {
		answer   func(right []byte) (io.Reader, error)
		full     error
		want     error
		requests int // 0: any
	}{
		"down":        {answer: func([]byte) (io.Reader, error) { return nil, errDown }, want: errDown},
		"cut short":   {answer: func(right []byte) (io.Reader, error) { return bytes.NewReader(right[:len(right)-1]), nil }, want: io.ErrUnexpectedEOF},
		"a wrong bit": {answer: func(right []byte) (io.Reader, error) { return bytes.NewReader(flip(right)), nil }, want: rafs.ErrInvalid, requests: 2},
		"zeros":       {answer: func(right []byte) (io.Reader, error) { return bytes.NewReader(make([]byte, len(right))), nil }, want: rafs.ErrInvalid, requests: 2},
		"no retry":    {answer: func([]byte) (io.Reader, error) { return nil, errors.New("not found") }, requests: 1},
		"cache full":  {full: errFull, want: errFull, requests: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, kind := range []string{"nydus lz4", "nydus batch", "none"} {
				o := quick()
				o.Limit, o.Ahead, o.Near = 500*time.Millisecond, -1, -1 // two tables and two requests fit, on a busy machine too
				m := mounted(t, kinds[kind](t), o)
				chunks := m.BlobChunks(0)
				bad, good := chunks[len(chunks)/2], chunks[0]
				if kind == "nydus batch" { // the table is there before things go wrong
					if err := m.ensure(t.Context(), good); err != nil {
						t.Fatal(err)
					}
				}
				before := len(m.sources[0].seen())
				at := int64(-1)
				m.sources[0].set(func(_ int, r fill.Request, right []byte) (io.Reader, error) {
					if c.answer == nil || at >= 0 && r.Offset != at {
						return nil, nil
					}
					at = r.Offset
					return c.answer(right)
				})
				m.caches[0].fail(c.full)
				err := m.ensure(t.Context(), bad)
				corrupt := errors.Is(err, rafs.ErrDigest) || errors.Is(err, rafs.ErrInvalid)
				if err == nil || c.want != nil && !errors.Is(err, c.want) && (!errors.Is(c.want, rafs.ErrInvalid) || !corrupt) {
					t.Errorf("%s: Ensure = %v, want %v", kind, err, c.want)
				}
				want := c.requests
				if kind == "nydus batch" && want == 2 {
					want = 5 // its table is read again, and the batch twice more
				}
				if got := len(m.sources[0].seen()) - before; want != 0 && got != want {
					t.Errorf("%s: %d requests, want %d", kind, got, want)
				}
				if m.caches[0].Ready(bad) {
					t.Errorf("%s: what is wrong is in the cache", kind)
				}
				if c.full == nil {
					if err := m.ensure(t.Context(), good); err != nil {
						t.Errorf("%s: another chunk: %v", kind, err)
					}
				}
				m.sources[0].set(nil)
				m.caches[0].fail(nil)
				if err := m.ensure(t.Context(), bad); err != nil {
					t.Errorf("%s: later: %v", kind, err)
				}
				if s := m.blobs[0].Stats(); s.Failed != 1 {
					t.Errorf("%s: Stats = %+v", kind, s)
				}
				m.ensureAll()
				m.check()
			}
		})
	}
}

// A source that is down makes its own readers wait and nobody else's.
func TestDownSourceStopsNobodyElse(t *testing.T) {
	t.Parallel()
	o := quick()
	o.Requests = 2
	m := mounted(t, nydus(t, "v6-zstd"), o)
	var down atomic.Bool
	down.Store(true)
	m.sources[0].set(func(int, fill.Request, []byte) (io.Reader, error) {
		if down.Load() {
			return nil, errDown
		}
		return nil, nil
	})
	errs := make(chan error)
	chunks := m.BlobChunks(0)
	for _, c := range chunks {
		go func() { errs <- m.ensure(t.Context(), c) }()
	}
	for len(m.sources[0].seen()) < 2 {
		time.Sleep(time.Millisecond)
	}
	for _, c := range m.BlobChunks(1) {
		if err := m.ensure(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	down.Store(false)
	for range chunks {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	m.check()
}

// A second source has what the first one does not.
func TestSecondSource(t *testing.T) {
	t.Parallel()
	m := mounted(t, nydus(t, "v6-zstd"), quick())
	first := m.sources[0]
	second := &source{data: first.data}
	first.set(func(int, fill.Request, []byte) (io.Reader, error) { return nil, errors.New("gone") })
	m.blobs[0].AddSource(second)
	m.ensureAll()
	m.check()
	if len(second.seen()) == 0 || len(second.seen()) != len(first.seen()) {
		t.Errorf("requests: %d of the first, %d of the second", len(first.seen()), len(second.seen()))
	}
	m = mounted(t, m.image, quick())
	second = &source{data: first.data}
	m.sources[0].set(func(_ int, _ fill.Request, right []byte) (io.Reader, error) { return bytes.NewReader(flip(right)), nil })
	m.blobs[0].AddSource(second)
	m.ensureAll() // what is corrupt is asked for elsewhere
	m.check()
	m.blobs[0].RemoveSource(m.sources[0])
	m.blobs[0].RemoveSource(second)
}

// A source that is removed while it is read from is closed soon after: what it was to bring comes from another one.
func TestRemoveSource(t *testing.T) {
	t.Parallel()
	m := mounted(t, kinds["prefetch"](t), quick())
	n := m.prefetchBlob()
	first := m.sources[n]
	first.set(func(_ int, _ fill.Request, right []byte) (io.Reader, error) {
		return io.MultiReader(bytes.NewReader(right[:100]), &gate{bytes.NewReader(nil), first.quit}), nil
	})
	second := &source{data: first.data}
	m.blobs[n].AddSource(second)
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: n, Background: fill.BackgroundNone})
	errs := make(chan error)
	chunks := m.BlobChunks(n)
	go func() { errs <- m.ensure(t.Context(), chunks[len(chunks)-1]) }()
	for len(first.seen()) < 2 {
		time.Sleep(time.Millisecond)
	}
	// The source's reads return when its contexts end.
	go func() { time.Sleep(10 * time.Millisecond); close(first.quit) }()
	m.blobs[n].RemoveSource(first)
	if err := <-errs; err != nil {
		t.Error(err)
	}
	<-run.Listed()
	if !m.blobs[n].Complete() || len(second.seen()) == 0 {
		t.Error("the other source was not asked for the rest")
	}
	m.blobs[n].RemoveSource(second)
	m.ensureAll()
	m.check()
}

// Memory for one chunk at a time is enough.
func TestLittleMemory(t *testing.T) {
	t.Parallel()
	o := quick()
	o.Memory = 1
	m := mounted(t, kinds["prefetch batches"](t), o)
	for _, src := range m.sources {
		var wrong atomic.Bool
		src.set(func(_ int, r fill.Request, right []byte) (io.Reader, error) {
			if r.Meta || wrong.Swap(true) {
				return nil, nil
			}
			right = bytes.Clone(right)
			for i := 100; i < len(right); i += 1 << 15 {
				right[i] ^= 1 // many units are wrong at once
			}
			return bytes.NewReader(right), nil
		})
	}
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: m.prefetchBlob(), Background: fill.BackgroundFull})
	<-run.Listed()
	m.ensureAll()
	m.check()
	<-run.Done()
	m.once()
}

// The last unit of a stream is corrupt, and its second request takes a while: the stream waits for it.
func TestCorruptAtTheEnd(t *testing.T) {
	t.Parallel()
	m := mounted(t, kinds["prefetch"](t), quick())
	n := m.prefetchBlob()
	chunks := m.BlobChunks(n)
	last := slices.MaxFunc(chunks, func(x, y rafs.Chunk) int { return cmp.Compare(x.CompressedOffset, y.CompressedOffset) })
	m.sources[n].set(func(i int, r fill.Request, right []byte) (io.Reader, error) {
		if i > 1 {
			time.Sleep(50 * time.Millisecond)
			return nil, nil
		}
		right = bytes.Clone(right)
		right[int64(last.CompressedOffset)-r.Offset+int64(last.CompressedSize)/2] ^= 4
		return bytes.NewReader(right), nil
	})
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: n, Background: fill.BackgroundNone})
	<-run.Listed()
	if s := m.blobs[n].Stats(); !m.blobs[n].Complete() || s.Corrupt != 1 || s.Prefetch.Requests != 2 {
		t.Errorf("complete: %v, Stats = %+v, want all of it by the stream and a second request for what was corrupt", m.blobs[n].Complete(), s)
	}
	m.once()
}

// Two images share a blob and use different chunks of it; a batch that both have a part of is fetched for what is missing.
func TestExtend(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"nydus batch", "nydus lz4"} {
		img := kinds[kind](t)
		m := mounted(t, img, quick())
		all := img.BlobChunks(0)
		var even, odd []rafs.Chunk
		for i, c := range all {
			if i%2 == 0 {
				even = append(even, c)
			} else {
				odd = append(odd, c)
			}
		}
		b, err := m.s.Open(m.caches[0], m.sources[0], img.Blobs[0], even)
		if err != nil {
			t.Fatal(err)
		}
		m.blobs[0] = b
		for _, c := range even {
			if err := m.ensure(t.Context(), c); err != nil {
				t.Fatal(err)
			}
		}
		if !b.Complete() {
			t.Errorf("%s: not complete", kind)
		}
		if err := m.ensure(t.Context(), odd[0]); !errors.Is(err, fill.ErrRange) {
			t.Errorf("%s: Ensure of a chunk of nobody = %v, want ErrRange", kind, err)
		}
		for range 2 {
			if err := b.Extend(t.Context(), slices.Clone(all)); err != nil {
				t.Fatal(err)
			}
		}
		if b.Complete() {
			t.Errorf("%s: complete", kind)
		}
		m.ensureAll()
		m.check()
		m.once()
	}
}
