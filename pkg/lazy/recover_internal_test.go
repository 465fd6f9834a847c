package lazy

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// keep returns copies of the descriptors of b, as a holder has them.
func keep(t *testing.T, b *store.Blob) store.Kept {
	t.Helper()
	dup := func(f *os.File) *os.File {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		must(t, err)
		return os.NewFile(uintptr(fd), f.Name())
	}
	k := b.Descriptors()
	return store.Kept{Data: dup(k.Data), Bits: dup(k.Bits)}
}

// A daemon that takes over must know whether it has all data files of which an event may be.
func TestUnsure(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		filled int // blocks of the kept blob, of 4
		adopt  bool
		mounts map[string]*mount
		lost   bool
		want   bool
	}{
		"nothing mounted, the blob is complete": {filled: 4},
		"the blob is adopted":                   {filled: 2, adopt: true, mounts: map[string]*mount{"a": {}}},
		"nobody adopted the blob":               {filled: 2, mounts: map[string]*mount{"a": {}}, want: true},
		"a mount failed":                        {filled: 2, adopt: true, mounts: map[string]*mount{"a": {}, "b": {failed: "no record"}}, want: true},
		"descriptors were lost":                 {filled: 2, adopt: true, lost: true, want: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s, err := store.Open(dir, store.Options{})
			must(t, err)
			info, chunks, data := plain(4)
			b, err := s.OpenBlob(info, chunks)
			must(t, err)
			for n := range tt.filled {
				must(t, b.Put(chunks[n], data[n*store.BlockSize:][:store.BlockSize]))
			}
			kept := map[string]store.Kept{b.Name(): keep(t, b)}
			must(t, errors.Join(b.Close(), s.Close()))
			d := &daemon{mounts: tt.mounts, lost: tt.lost}
			d.store, err = store.Open(dir, store.Options{Kept: kept})
			must(t, err)
			defer func() { must(t, d.store.Close()) }()
			if tt.adopt {
				_, err := d.store.Adopt(b.Name(), info, chunks)
				must(t, err)
			}
			if got := d.unsure(); got != tt.want {
				t.Errorf("unsure() = %t, want %t", got, tt.want)
			}
		})
	}
}
