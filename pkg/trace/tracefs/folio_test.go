package tracefs_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// widener returns a Widener for the test.
func widener(t *testing.T) *tracefs.Widener {
	t.Helper()
	testenv.Root(t)
	w, err := tracefs.NewWidener()
	testenv.Kernel(t, "pagemap and kpageflags", err)
	t.Cleanup(func() {
		if err := errors.Join(w.Close(), w.Close()); err != nil {
			t.Error(err)
		}
	})
	return w
}

// A folio that is mapped by one entry of a higher page table is in no event; what is mapped
// without one is what Huge says.
func TestHugeFolios(t *testing.T) {
	in := create(t, open(t), tracefs.Options{})
	w := widener(t)
	f, err := os.Create(filepath.Join(t.TempDir(), "huge"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const pieces = 3
	if _, err := f.Write(bytes.Repeat([]byte("x"), pieces*tracefs.HugeSize+5)); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	each := tracefs.HugeSize / os.Getpagesize()
	m := mapAt(t, f, pieces*tracefs.HugeSize, 0)
	var sum byte
	events := traced(t, in, func() error {
		sum += m[(each+7)*os.Getpagesize()]
		return nil
	})
	huge, err := w.Huge(f)
	if err != nil || sum == 0 {
		t.Fatal(sum, err)
	}
	upper := widened(t, f, events, st.Ino)
	for p := range of(events, tracefs.Fault, st.Ino, uint64(pieces*each)) {
		upper[p] = true
	}
	for _, s := range huge {
		for i := s.First; i <= s.Last; i++ {
			upper[i] = true
		}
	}
	mapped := present(t, m)
	if !mapped.within(upper) || !mapped[uint64(each+7)] {
		t.Errorf("%d pages are mapped, the bound has %d", len(mapped), len(upper))
	}
	t.Logf("%d events, huge folios %v, %d pages mapped", len(events), huge, len(mapped))
}

// What is not cached, small, empty or cut off widens nothing.
func TestWidenOddFiles(t *testing.T) {
	w := widener(t)
	cold, _ := subject(t, false)
	empty, err := os.Create(filepath.Join(t.TempDir(), "empty"))
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	for name, f := range map[string]*os.File{"cold": cold, "empty": empty} {
		in := []tracefs.Span{{First: 0, Last: 3}, {First: 100, Last: 1 << 40}, {First: 1 << 40, Last: 1 << 41}}
		got, err := w.Widen(f, in)
		if err != nil || len(got) != len(in) {
			t.Fatalf("%s: Widen() = %v, %v", name, got, err)
		}
		for i := range in {
			if got[i] != in[i] {
				t.Errorf("%s: Widen(%v) = %v", name, in[i], got[i])
			}
		}
		if huge, err := w.Huge(f); err != nil || huge != nil {
			t.Errorf("%s: Huge() = %v, %v", name, huge, err)
		}
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if got, err := w.Widen(dir, []tracefs.Span{{}}); err == nil || got != nil {
		t.Errorf("Widen(a directory) = %v, %v, want an error", got, err)
	}
}
