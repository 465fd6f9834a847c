package lazy

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/hold"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// A data file that was put aside while its mark lives keeps the daemon as long as somebody has it open: without the mark its holes are zeros. One that
// was cut to nothing does not, whose readers get errors in any case.
func TestAsideKeepsDaemon(t *testing.T) {
	t.Parallel()
	for _, guarded := range []bool{true, false} {
		t.Run(fmt.Sprintf("guarded %t", guarded), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s, err := store.Open(dir, store.Options{})
			must(t, err)
			info, chunks, data := plain(4)
			b, err := s.OpenBlob(info, chunks)
			must(t, err)
			must(t, b.Put(chunks[3], data[3*store.BlockSize:]))
			user, err := os.Open(b.Path()) // as a mount has it
			must(t, err)
			defer user.Close()
			must(t, errors.Join(b.Close(), s.Close()))
			o := store.Options{}
			if guarded { // the group of marks was kept, and this file was not
				o.Lock, err = os.Open(filepath.Join(dir, "lock"))
				must(t, err)
			}
			d := &daemon{log: zap.NewNop(), link: &hold.Link{}, blobs: map[string]*blob{}}
			d.store, err = store.Open(dir, o)
			must(t, err)
			defer func() { must(t, d.store.Close()) }()
			if aside, err := filepath.Glob(filepath.Join(dir, "blobs", ".aside-*")); err != nil || len(aside) != 1 {
				t.Fatalf("put aside: %q, %v, want one", aside, err)
			}
			got := make([]byte, 1)
			n, err := user.ReadAt(got, 0) // there is no mark here
			if zeros := n == 1 && got[0] == 0; zeros != guarded || !guarded && !errors.Is(err, io.EOF) {
				t.Errorf("the user reads %v, %v, want zeros: %t", got[:n], err, guarded)
			}
			if ends := d.nothingMounted(); ends == guarded {
				t.Errorf("the daemon may end: %t, want %t", ends, !guarded)
			}
			must(t, user.Close())
			if !d.nothingMounted() {
				t.Error("the daemon may not end though nobody uses what was put aside")
			}
		})
	}
}
