package share_test

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/share"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// powerRig is a rig on a disk of which copies are made, as a machine would find it after its power was cut: what was not synced
// is not on it (the journal's timer is off and pages are not old enough to be written back).
type powerRig struct {
	*rig
	disk string
}

// dangling returns how many entries a machine that starts on a copy of the disk finds in the index, and how many of them name what is not there.
// It looks before anything is repaired.
func (r *powerRig) dangling() (places, wrong int) {
	r.t.Helper()
	p, err := os.ReadFile(r.disk)
	must(r.t, err)
	copied := filepath.Join(r.t.TempDir(), "copy")
	must(r.t, os.WriteFile(copied, p, 0o600))
	state := filepath.Join(testenv.MountImage(r.t, copied, ""), "state")
	x, err := index.Open(filepath.Join(state, "index"), index.Options{})
	must(r.t, err)
	must(r.t, x.Walk(func(k index.Key, at []index.Place) error {
		for _, p := range at {
			places++
			data, err := readAt(filepath.Join(state, "blobs", p.Cache, "data"), p.Offset, int64(k.Size))
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return err
			}
			if err != nil || k.Digester.Sum(data) != k.Digest {
				wrong++
			}
		}
		return nil
	}))
	must(r.t, x.Close())
	// And a daemon that starts there gets on.
	next := &rig{t: r.t, dir: state}
	next.open()
	must(r.t, next.share.Rebuild(r.t.Context()))
	collected, err := next.store.Collect(r.t.Context(), store.Policy{Limit: 1}, store.Live{})
	must(r.t, err)
	if left := next.index.Caches(); len(left) != 0 || collected.Wanted > 4<<20 {
		r.t.Errorf("after a start on the copy %v are left, %+v", left, collected)
	}
	next.close()
	return places, wrong
}

func readAt(name string, offset, n int64) (p []byte, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	p = make([]byte, n)
	_, err = io.ReadFull(io.NewSectionReader(f, offset, n), p)
	return p, errors.Join(err, f.Close())
}

// The power is cut at each step of a collection: no entry names bytes that are not there.
func TestPowerCutWhileCollecting(t *testing.T) {
	disk := testenv.NewDisk(t, 32<<20, "mkfs.ext4", "-q", "-F")
	dir := testenv.MountImage(t, disk, "commit=300")
	r := &powerRig{rig: newRigIn(t, filepath.Join(dir, "state")), disk: disk}
	steps := map[string]int{}
	look := func(when string) {
		t.Helper()
		places, wrong := r.dangling()
		t.Logf("%s: %d entries", when, places)
		steps[when] += places
		if wrong != 0 {
			t.Errorf("the power was cut %s: %d of %d entries name what is not there", when, wrong, places)
		}
	}
	of := []int{1, 2, 3, 4, 5, 6, 7, 8}
	for n := range 3 {
		r.fill(n+1, share.ScopePublic, of[:n+5]...)
	}
	look("after three caches were fed")
	r.gone = func(name string, forget func() error) error {
		look("before the index forgets")
		err := forget()
		look("when the index has forgotten, and the cache is there")
		return err
	}
	must(t, r.share.Close())
	r.share = share.New(r.o)
	c, err := r.store.Collect(t.Context(), store.Policy{Limit: 1}, store.Live{})
	must(t, err)
	if len(c.Removed) != 3 {
		t.Errorf("Collect() = %+v, want all three removed", c)
	}
	look("after the collection")
	if steps["after three caches were fed"] == 0 || steps["before the index forgets"] == 0 || steps["after the collection"] != 0 {
		t.Errorf("entries by step: %v, want some before and none after", steps)
	}

	// The check can fail: an index that forgets nothing.
	r.gone = nil
	name := r.fill(9, share.ScopePublic, of...)
	must(t, r.share.Close())
	r.share = share.New(r.o)
	r.gone = func(string, func() error) error { return nil }
	must(t, r.store.Remove(name))
	syncAll(t, dir)
	r.gone = nil
	if places, wrong := r.dangling(); wrong == 0 {
		t.Errorf("an index that forgets nothing has %d entries, and none is dangling: this test sees nothing", places)
	}
}

func syncAll(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	must(t, err)
	must(t, errors.Join(unix.Syncfs(int(f.Fd())), f.Close()))
}
