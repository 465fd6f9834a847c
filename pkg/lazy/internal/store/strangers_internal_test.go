package store

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A blob that was taken over, that is not complete, and that somebody has open is left as it was found: for the next who opens it, and until nobody has it.
func TestLeave(t *testing.T) {
	for name, known := range map[string]bool{"to nobody": false, "to who is known": true} {
		t.Run(name, func(t *testing.T) { testLeave(t, known) })
	}
}

func testLeave(t *testing.T, known bool) {
	dir := t.TempDir()
	b, chunks := numbered(4, 4096)
	s, err := Open(dir, Options{})
	must(t, err)
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	must(t, blob.Put(chunks[1], fill(chunks[1])))
	user, err := os.Open(blob.Path()) // as a mount has it
	must(t, err)
	defer user.Close()
	if blob.Strangers() {
		t.Error("there are strangers where all who have the file were given it here")
	}
	kept := map[string]Kept{}
	k := blob.Descriptors()
	for to, f := range map[**os.File]*os.File{&k.Data: k.Data, &k.Bits: k.Bits} {
		*to, err = copyOf(f)
		must(t, err)
	}
	kept[blob.Name()] = k
	must(t, errors.Join(blob.Close(), s.Close()))
	s, err = Open(dir, Options{Kept: kept})
	must(t, err)
	defer func() { must(t, s.Close()) }()
	name := blob.Name()
	marked := true
	unmark := func(*os.File) error { marked = false; return nil }
	for range 2 { // the second time it was left
		blob, err = s.OpenBlob(b, chunks)
		must(t, err)
		looks, err := s.Reopen(name)
		must(t, err)
		if blob.NoStrangers(true); blob.Strangers() {
			t.Error("there are strangers though everybody is known")
		}
		blob.NoStrangers(false)
		if ready, wrong := intact(t, blob, chunks); ready != 1 || wrong != 0 || !blob.Strangers() || blob.FirstUse() || s.Left(name) {
			t.Errorf("%d chunks are ready, %d wrong, strangers: %t, left: %t; want 1, 0, true, false, and descriptors that were kept", ready, wrong, blob.Strangers(), s.Left(name))
		}
		blob.Leave()
		must(t, blob.Close())
		if !s.Left(name) || !s.Left("") || len(s.Unadopted()) != 0 {
			t.Error("a blob is not left though somebody looks at it")
		}
		must(t, looks.Close())
		if !s.Left(name) || !s.Left("") || s.Left("another") || len(s.Unadopted()) != 1 {
			t.Error("a blob is not left")
		}
		if err := s.Release(name, unmark); !errors.Is(err, ErrInUse) || !marked {
			t.Errorf("Release() = %v, marked: %t, want ErrInUse, and the mark", err, marked)
		}
	}
	if known {
		if err := s.ReleaseKnown(name, unmark); err != nil || marked || s.Left("") {
			t.Errorf("ReleaseKnown() = %v, marked: %t, left: %t", err, marked, s.Left(""))
		}
		// Whoever has it open is no reason to put it aside.
		again, err := s.OpenBlob(b, chunks)
		must(t, err)
		if ready, wrong := intact(t, again, chunks); ready != 1 || wrong != 0 {
			t.Errorf("%d chunks are ready, %d wrong, want what was there", ready, wrong)
		}
		must(t, errors.Join(user.Close(), again.Close()))
		return
	}
	must(t, user.Close())
	if err := s.Release(name, unmark); err != nil || marked || s.Left("") {
		t.Errorf("Release() of what nobody has = %v, marked: %t, left: %t", err, marked, s.Left(""))
	}
}

// copyOf returns another descriptor of the same open file, as a holder has it.
func copyOf(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	return os.NewFile(uintptr(fd), f.Name()), err
}
