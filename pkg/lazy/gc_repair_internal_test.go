package lazy

import (
	"errors"
	"os"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// forgets calls a function while a cache is being forgotten.
type forgets func()

// RemoveCache implements store.Index.
func (f forgets) RemoveCache(string) error {
	f()
	return nil
}

// completed returns a daemon with one mount, of a blob that is complete. meanwhile is called while the index forgets the blob.
func completed(t *testing.T, src *place, meanwhile func(d *daemon, m *mount)) (*daemon, *mount, *blob) {
	t.Helper()
	d := served(t)
	d.log = zap.NewNop()
	var m *mount
	st, err := store.Open(t.TempDir(), store.Options{Index: forgets(func() { meanwhile(d, m) })})
	must(t, errors.Join(d.store.Close(), err))
	d.store = st
	info, chunks, data := plain(4)
	src.data = data
	b := d.use(t, info, chunks, src)
	b.refs = 1
	must(t, d.ensureSoon(t, b.st, 0, b.st.Size()))
	must(t, b.st.Sync())
	m = &mount{rec: record{ID: "m", Blobs: []string{b.st.Name()}}, uses: []*use{{b: b, f: b.fillings[0]}}}
	d.mounts = map[string]*mount{"m": m}
	if !d.isComplete(m) {
		t.Fatal("what has all chunks is not complete")
	}
	return d, m, b
}

// spoil makes chunks wrong on disk.
func (b *blob) spoil(t *testing.T, chunks []rafs.Chunk) {
	t.Helper()
	f, err := os.OpenFile(b.st.Path(), os.O_WRONLY, 0)
	must(t, err)
	for _, c := range chunks {
		_, err = f.WriteAt([]byte("wrong"), int64(c.UncompressedOffset))
		must(t, err)
	}
	must(t, errors.Join(f.Sync(), f.Close()))
}

// To forget a data file takes the index a while. Nobody takes the blob for complete before what is wrong of it is not ready any more.
func TestDropBadKeepsTheJanitorOut(t *testing.T) {
	t.Parallel()
	complete := make(chan bool, 1)
	free := false
	d, m, b := completed(t, &place{}, func(d *daemon, m *mount) {
		if free = m.phase.TryLock(); free {
			m.phase.Unlock()
		}
		go func() { complete <- d.isComplete(m) }()
		time.Sleep(50 * time.Millisecond) // the longer, the likelier is it found
	})
	info, chunks, _ := plain(4)
	b.spoil(t, chunks[:1])
	mounted, err := d.forgetBad(t.Context(), b.st, chunks[:1])
	if err != nil || !mounted || free {
		t.Errorf("forgetBad = %t, %v, the mount's phase is free: %t", mounted, err, free)
	}
	if <-complete {
		t.Errorf("%s is complete for the janitor", info.ID)
	}
	if b.st.Ready(chunks[0]) || !b.st.Ready(chunks[1]) {
		t.Error("another chunk was dropped")
	}
	if !m.phase.TryLock() {
		t.Error("the mount's phase is held still")
	}
	if d.syncMount(m) {
		t.Error("syncMount says that all is durable")
	}
	if n := d.refetch(t.Context(), b.st, chunks[:1]); n != 1 || !d.isComplete(m) {
		t.Errorf("%d chunks fetched again, want one, and the mount complete", n)
	}
}

// Many chunks of a source that is dead are not waited for one by one.
func TestRefetchFromDeadSource(t *testing.T) {
	t.Parallel()
	src := &place{}
	d, _, b := completed(t, src, func(*daemon, *mount) {})
	_, chunks, _ := plain(4)
	b.spoil(t, chunks)
	if _, err := d.forgetBad(t.Context(), b.st, chunks); err != nil {
		t.Fatal(err)
	}
	d.o.Limit = 2 * cacheStep
	src.down, src.again = errors.New("it is down"), true
	if n, asked := d.refetch(t.Context(), b.st, chunks), src.asked.Load(); n != 0 || asked < 2 || src.last.Load() != 0 {
		t.Errorf("%d chunks fetched in %d requests, the last one at %d; want none, and the first chunk alone asked for", n, asked, src.last.Load())
	}
}

// What was dropped of a complete mount, and could not be fetched at once, is fetched when it can be, although nobody reads it.
func TestDroppedIsFetchedLater(t *testing.T) {
	t.Parallel()
	src := &place{}
	d, m, b := completed(t, src, func(*daemon, *mount) {})
	m.rec.Request.Background = "full"
	m.run = d.fill.Start(d.plan(m)) // it finds all of it there
	<-m.run.Done()
	_, chunks, _ := plain(4)
	b.spoil(t, chunks[1:2])
	src.away.Store(true)
	if n, err := d.dropBad(t.Context(), b.st, chunks[1:2]); n != 0 || err != nil {
		t.Errorf("dropBad = %d, %v, want none fetched", n, err)
	}
	if d.isComplete(m) {
		t.Error("the mount is complete without a chunk")
	}
	src.away.Store(false)
	for deadline := time.Now().Add(time.Minute); !d.isComplete(m); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nobody fetches what was dropped")
		}
	}
}

// What two found wrong is dropped once: the second one comes when it has been fetched again.
func TestDropBadOfWhatIsRightAgain(t *testing.T) {
	t.Parallel()
	src := &place{}
	d, m, b := completed(t, src, func(*daemon, *mount) {})
	_, chunks, _ := plain(4)
	b.spoil(t, chunks[1:2])
	before := src.asked.Load()
	for i := range 2 {
		if n, err := d.dropBad(t.Context(), b.st, chunks[1:3]); n != 2 || err != nil {
			t.Errorf("dropBad %d = %d, %v, want both chunks there", i, n, err)
		}
		if wrong, err := b.st.Wrong(chunks); len(wrong) != 0 || err != nil || !b.st.Complete() {
			t.Errorf("Wrong %d = %v, %v, complete: %t, want all there and right", i, wrong, err, b.st.Complete())
		}
		if asked := src.asked.Load() - before; asked != 1 || src.last.Load() != int64(chunks[1].UncompressedOffset) {
			t.Errorf("%d requests after dropBad %d, the last one at %d; want one, of the chunk that was wrong", asked, i, src.last.Load())
		}
	}
	if !d.isComplete(m) {
		t.Error("the mount is not complete")
	}
}
