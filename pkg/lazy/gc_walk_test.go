package lazy_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
)

// walk looks at every entry of the index, and at the bytes that it names, with nothing of what made them. It returns how many there are.
// No daemon runs.
func (b *box) walk() (places int) {
	b.t.Helper()
	b.alone()
	name := filepath.Join(b.state, "index")
	if _, err := os.Stat(name); err != nil {
		b.t.Fatal(err)
	}
	var x *index.Index
	eventually(b.t, func() string { // a daemon that listens no more may not be over
		var err error
		if x, err = index.Open(name, index.Options{}); err != nil {
			return err.Error()
		}
		return ""
	})
	if x == nil {
		b.t.FailNow()
	}
	err := x.Walk(func(k index.Key, at []index.Place) error {
		for _, p := range at {
			places++
			f, err := os.Open(filepath.Join(b.state, "blobs", p.Cache, "data"))
			if err != nil {
				b.t.Errorf("dangling entry: %v", err)
				continue
			}
			data := make([]byte, k.Size)
			_, err = io.ReadFull(io.NewSectionReader(f, p.Offset, int64(k.Size)), data)
			if err != nil || k.Digester.Sum(data) != k.Digest {
				b.t.Errorf("dangling entry: %d bytes at %d of %s are not %s (%v)", k.Size, p.Offset, p.Cache, k.Digest, err)
			}
			if err := f.Close(); err != nil {
				b.t.Error(err)
			}
		}
		return nil
	})
	if err := errors.Join(err, x.Close()); err != nil {
		b.t.Error(err)
	}
	return places
}

// What the index says is there is there, and what is removed it does not say, also without a daemon.
func TestIndexNamesWhatIsThere(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	first := b.whole("first", loose(t, "v6-zstd"))
	b.unmount(first.Dir)
	second := b.whole("second", loose(t, "v6-zstd-sha256-64k"))
	b.unmount(second.Dir)
	before := b.walk()
	if before == 0 {
		t.Fatal("the index names nothing")
	}
	gone := b.cache().Entries[0].Name
	b.spoil()
	// What is wrong on disk is forgotten with the rest of its cache file.
	if v := b.verify(gone); len(v.Bad) == 0 {
		t.Errorf("%+v, want bad chunks", v)
	}
	b.collect(all)
	if after := b.walk(); after != 0 {
		t.Errorf("%d of %d entries are left of what was removed", after, before)
	}
	if files, err := filepath.Glob(filepath.Join(b.state, "blobs", "*")); err != nil || len(files) != 0 {
		t.Errorf("%s are left, %v", strings.Join(files, " "), err)
	}
}
