package shm_test

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/shm"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestMemoryOutlivesItsMapping(t *testing.T) {
	m, err := shm.New("test", 1000)
	if err != nil {
		t.Fatal(err)
	}
	kept, err := unix.Dup(int(m.File().Fd()))
	if err != nil {
		t.Fatal(err)
	}
	m.Words()[999].Store(1 << 63)
	m.Bytes()[0] = 7
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Errorf("second Close = %v", err)
	}
	again, err := shm.Open(os.NewFile(uintptr(kept), "kept"))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if w := again.Words(); len(w) != 1000 || w[999].Load() != 1<<63 || again.Bytes()[0] != 7 {
		t.Errorf("%d words, last %#x, first byte %d; want 1000, 1<<63, 7", len(w), w[999].Load(), again.Bytes()[0])
	}
	if err := again.File().Truncate(0); err == nil {
		t.Error("the memory can be cut short under its mapping")
	}
}

func TestSizes(t *testing.T) {
	if m, err := shm.New("test", 0); err == nil || m != nil {
		t.Errorf("New(0) = %v, %v, want an error", m, err)
	}
	for _, size := range []int64{0, 4, 12} {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		if m, err := shm.Open(f); err == nil || m != nil {
			t.Errorf("Open of %d bytes = %v, %v, want an error", size, m, err)
		}
		if err := f.Close(); err != nil {
			t.Errorf("Open took a file that it refused: %v", err)
		}
	}
}
