package fill_test

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// valve lets bytes through as far as a test says.
type valve struct {
	io.Reader
	more chan int // how many bytes may come next; closed: all of them
	left int
}

func (v *valve) Read(p []byte) (int, error) {
	if v.left == 0 {
		n, open := <-v.more
		if v.left = n; !open {
			v.left = 1 << 40
		}
	}
	n, err := v.Reader.Read(p[:min(len(p), v.left)])
	v.left -= n
	return n, err
}

// streaming is an image whose prefetch blob arrives as its valve allows; other requests are answered at once.
func streaming(t *testing.T, o fill.Options) (*mount, *fill.Run, chan int, []rafs.Chunk) {
	t.Helper()
	m := mounted(t, kinds["prefetch"](t), o)
	n := m.prefetchBlob()
	more := make(chan int)
	m.sources[n].set(func(i int, _ fill.Request, right []byte) (io.Reader, error) {
		if i == 1 {
			return &valve{Reader: bytes.NewReader(right), more: more}, nil
		}
		return nil, nil
	})
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: n, Background: fill.BackgroundNone})
	for len(m.sources[n].seen()) == 0 {
		time.Sleep(time.Millisecond)
	}
	chunks := m.BlobChunks(n)
	if len(chunks) < 8 {
		t.Fatalf("the prefetch blob has %d chunks", len(chunks))
	}
	return m, run, more, chunks
}

// Each chunk of the prefetch blob is there as soon as its bytes have come, and a reader of the next one waits for the stream.
func TestStreamBringsWhatIsNext(t *testing.T) {
	t.Parallel()
	m, run, more, chunks := streaming(t, quick())
	n := m.prefetchBlob()
	at := uint64(0)
	for _, c := range chunks[:3] {
		done := make(chan error)
		go func() { done <- m.ensure(t.Context(), c) }()
		end := c.CompressedOffset + uint64(c.CompressedSize)
		more <- int(end - at)
		at = end
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if got := m.sources[n].seen(); len(got) != 1 {
		t.Errorf("requests: %+v, want the stream's alone", got)
	}
	close(more)
	<-run.Listed()
	if s := m.blobs[n].Stats(); s.Misses != 0 || s.Demand.Requests != 0 || s.Prefetch.Chunks != int64(len(chunks)) || s.Overtakes != 0 {
		t.Errorf("Stats = %+v", s)
	}
	m.once()
}

// A reader of something far behind, or of what the stream does not bring for too long, fetches for itself; the stream goes on.
func TestStreamIsOvertaken(t *testing.T) {
	t.Parallel()
	m, run, more, chunks := streaming(t, quick())
	n := m.prefetchBlob()
	// A link on which nothing moves: what is first is waited for, in vain.
	if err := m.ensure(t.Context(), chunks[0]); err != nil {
		t.Fatal(err)
	}
	last := chunks[len(chunks)-1]
	if err := m.ensure(t.Context(), last); err != nil {
		t.Fatal(err)
	}
	if s := m.blobs[n].Stats(); s.Demand.Chunks < 2 || s.Misses != 0 {
		t.Errorf("Stats = %+v, want two chunks or more by demand", s)
	}
	close(more)
	<-run.Listed()
	if !m.blobs[n].Complete() {
		t.Error("the prefetch blob is not complete")
	}
	m.once()
	m.ensureAll()
	m.check()
	if s := m.sum(); s.Misses == 0 || len(m.blobs[0].Misses()) == 0 {
		t.Errorf("Stats = %+v, want misses of the other blobs", s)
	}
}

// A stream that ends lets those who wait for it fetch for themselves, and goes on from where it was.
func TestStreamBreaks(t *testing.T) {
	t.Parallel()
	m := mounted(t, kinds["prefetch"](t), quick())
	n := m.prefetchBlob()
	chunks := m.BlobChunks(n)
	third := chunks[2].CompressedOffset + uint64(chunks[2].CompressedSize)
	broken := make(chan struct{})
	m.sources[n].set(func(i int, _ fill.Request, right []byte) (io.Reader, error) {
		if i == 1 {
			return io.MultiReader(bytes.NewReader(right[:third]), &gate{bytes.NewReader(nil), broken}), nil
		}
		return nil, nil
	})
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: n, Background: fill.BackgroundNone})
	for len(m.sources[n].seen()) == 0 {
		time.Sleep(time.Millisecond)
	}
	done := make(chan error)
	go func() { done <- m.ensure(t.Context(), chunks[3]) }()
	for !m.caches[n].Ready(chunks[2]) {
		time.Sleep(time.Millisecond)
	}
	close(broken)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	<-run.Listed()
	if !m.blobs[n].Complete() {
		t.Error("the prefetch blob is not complete")
	}
	for _, r := range m.sources[n].seen()[1:] {
		if r.Offset < int64(third) {
			t.Errorf("%+v asks again for what had come", r)
		}
	}
	m.once()
}

// A run that is closed while its stream waits ends, and so does the scheduler.
func TestRunClose(t *testing.T) {
	t.Parallel()
	m := mounted(t, kinds["prefetch"](t), quick())
	for _, src := range m.sources {
		src.set(func(int, fill.Request, []byte) (io.Reader, error) { return nil, errDown })
	}
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: m.prefetchBlob(), Background: fill.BackgroundFull})
	for len(m.sources[m.prefetchBlob()].seen()) < 3 {
		time.Sleep(time.Millisecond)
	}
	run.Close()
	run.Close()
	<-run.Listed()
	other := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: -1, Background: fill.BackgroundFull})
	for len(m.sources[0].seen()) < 3 {
		time.Sleep(time.Millisecond)
	}
	m.s.Close()
	<-other.Done()
}

// The files of the prefetch table come before the rest, in few requests; a table that names the root says nothing.
func TestTable(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"nydus sha256", "nydus batch"} {
		img := kinds[kind](t)
		file := img.Lookup("/app/main")
		img.Prefetch = []*rafs.Inode{img.Lookup("/bin"), file, file}
		table := fill.TableChunks(img.Image)
		if len(table) < len(file.Chunks) {
			t.Fatalf("TableChunks = %d chunks, the file alone has %d", len(table), len(file.Chunks))
		}
		m := mounted(t, img, quick())
		run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: -1, Table: table, Background: fill.BackgroundNone})
		<-run.Done()
		for _, c := range table {
			if !m.caches[c.Blob].Ready(c) {
				t.Errorf("%s: chunk %d of blob %d is not there", kind, c.Index, c.Blob)
			}
		}
		s := m.sum()
		if s.Background.Requests != 0 || s.Prefetch.Requests != 0 || s.Table.Requests == 0 || s.Table.Requests > int64(len(table)/2+2*len(m.blobs)) {
			t.Errorf("%s: Stats = %+v for %d chunks", kind, s, len(table))
		}
		m.ensureAll()
		for _, b := range m.blobs {
			misses := b.Misses()
			if slices.ContainsFunc(misses, func(x fill.Miss) bool { return !x.Late || x.Listed || x.Blob != b.ID() }) {
				t.Errorf("%s: Misses = %+v", kind, misses)
			}
			fill.Name(img.Image, misses)
			if slices.ContainsFunc(misses, func(x fill.Miss) bool { return x.Path == "" || img.Lookup(x.Path) == nil }) {
				t.Errorf("%s: Misses = %+v, want paths", kind, misses)
			}
		}
		m.check()
		m.once()
		img.Prefetch = []*rafs.Inode{file, img.Root}
		if got := fill.TableChunks(img.Image); got != nil {
			t.Errorf("%s: TableChunks of the root = %d chunks", kind, len(got))
		}
	}
}

// Behind a prefetch blob the files of the table wait until nobody has waited for a while; who wants them before has missed them.
func TestTableBehindStream(t *testing.T) {
	t.Parallel()
	o := quick()
	for _, idle := range []time.Duration{time.Millisecond, time.Hour} {
		o.Idle = idle
		m := mounted(t, kinds["prefetch"](t), o)
		n := m.prefetchBlob()
		var table []rafs.Chunk
		for i := range m.Blobs {
			if i != n {
				table = append(table, m.BlobChunks(i)...)
			}
		}
		run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: n, Table: table, Background: fill.BackgroundNone})
		if idle < time.Second {
			<-run.Done()
			if s := m.sum(); s.Misses != 0 || s.Table.Chunks == 0 || s.Prefetch.Chunks == 0 {
				t.Errorf("nobody reads: Stats = %+v, want the blob and the table", s)
			}
			continue
		}
		<-run.Listed()
		if err := m.ensure(t.Context(), table[0]); err != nil {
			t.Fatal(err)
		}
		run.Close()
		if s := m.sum(); s.Misses != 1 || s.Overtakes != 0 || s.Table.Requests != 0 {
			t.Errorf("somebody reads at once: Stats = %+v, want a miss, and nothing of the table", s)
		}
		if misses := m.blobs[table[0].Blob].Misses(); len(misses) != 1 || !misses[0].Late || misses[0].Listed {
			t.Errorf("Misses = %+v, want one after the prefetch blob", misses)
		}
	}
}

// With a rate the rest comes in small pieces with time between them; idle waits until no reader does.
func TestBackgroundRate(t *testing.T) {
	t.Parallel()
	img := nydus(t, "v6-zstd-sha256-64k")
	m := mounted(t, img, quick())
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: -1, Background: fill.BackgroundFull, Rate: 1 << 10})
	for m.sum().Background.Chunks == 0 {
		time.Sleep(time.Millisecond)
	}
	run.Close()
	// The first piece, and at most the second one: at 1 KiB a second that takes minutes.
	if s := m.sum(); s.Background.Requests > 1 {
		t.Errorf("Stats = %+v", s)
	}
	o := quick()
	o.Idle = time.Hour
	m = mounted(t, img, o)
	c := m.BlobChunks(0)[0]
	if err := m.ensure(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	run = m.s.Start(fill.Plan{Blobs: m.blobs, Stream: -1, Background: fill.BackgroundIdle})
	<-run.Listed()
	time.Sleep(20 * time.Millisecond)
	run.Close()
	if s := m.sum(); s.Background.Requests != 0 {
		t.Errorf("Stats = %+v: a reader was there just now", s)
	}
}

// Two mounts of one image stream its prefetch blob once.
func TestTwoRuns(t *testing.T) {
	t.Parallel()
	m, first, more, _ := streaming(t, quick())
	n := m.prefetchBlob()
	second := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: n, Background: fill.BackgroundNone})
	close(more)
	<-first.Done()
	<-second.Done()
	if got := m.sources[n].seen(); len(got) != 1 || !m.blobs[n].Complete() {
		t.Errorf("requests: %+v", got)
	}
}

// What fails for a while, and for good as far as anybody can tell, is fetched when it does no more: a full cache, or a source that says no.
func TestRunGoesOn(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(m *mount, err error){
		"a full cache": func(m *mount, err error) {
			for _, c := range m.caches {
				c.fail(err)
			}
		},
		"a source that says no": func(m *mount, err error) {
			for _, s := range m.sources {
				s.set(func(int, fill.Request, []byte) (io.Reader, error) { return nil, err })
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := mounted(t, kinds["prefetch"](t), quick())
			set(m, errors.New("not now"))
			run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: m.prefetchBlob(), Background: fill.BackgroundFull})
			<-run.Listed()
			for _, s := range m.sources { // of the stream, and of the rest
				for len(s.seen()) < 2 {
					time.Sleep(time.Millisecond)
				}
			}
			set(m, nil)
			<-run.Done()
			if s := m.sum(); s.Demand.Requests != 0 {
				t.Errorf("Stats = %+v, want no demand", s)
			}
			for _, b := range m.blobs {
				if !b.Complete() {
					t.Errorf("blob %s is not complete", b.ID())
				}
			}
			if run.Again() {
				t.Error("a run that is over looks again")
			}
			m.ensureAll()
			m.check()
		})
	}
}

// A run that is at work gets what is dropped meanwhile, too.
func TestRunAgain(t *testing.T) {
	t.Parallel()
	m := mounted(t, kinds["prefetch"](t), quick())
	for _, c := range m.caches {
		c.fail(errors.New("not now"))
	}
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: -1, Background: fill.BackgroundFull})
	if !run.Again() {
		t.Error("a run that is at work does not look again")
	}
	for _, c := range m.caches {
		c.fail(nil)
	}
	<-run.Done()
	m.ensureAll()
	m.check()
	closed := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: -1, Background: fill.BackgroundFull})
	closed.Close()
	if closed.Again() {
		t.Error("a run that was closed looks again")
	}
}

func TestParseBackground(t *testing.T) {
	t.Parallel()
	for _, b := range []fill.Background{fill.BackgroundIdle, fill.BackgroundFull, fill.BackgroundNone} {
		if got, err := fill.ParseBackground(b.String()); err != nil || got != b {
			t.Errorf("ParseBackground(%q) = %v, %v", b, got, err)
		}
	}
	if _, err := fill.ParseBackground("some"); err == nil {
		t.Error("ParseBackground(some) is no error")
	}
}
