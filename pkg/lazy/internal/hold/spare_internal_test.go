package hold

import (
	"errors"
	"os"
	"testing"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// A spare waits long for the end of a holder that knows of it, and gives up soon on one that may not, also when that comes after the other.
func TestSparePatience(t *testing.T) {
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	mine, theirs, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	l := &Link{primary: os.NewFile(uintptr(self), "pidfd"), spare: &spare{conn: mine}}
	fd, err := unix.Dup(int(theirs.Fd()))
	if err = errors.Join(err, theirs.Close()); err != nil {
		t.Fatal(err)
	}
	conn, err := adopt(fd)
	if err != nil {
		t.Fatal(err)
	}
	h := &holder{log: zap.NewNop(), files: map[string]*os.File{}, daemon: -1, conn: conn}
	for _, known := range []bool{false, true, false} {
		if known {
			l.tellPrimary() // of a holder that was started with the spare's socket
		} else if err := l.introduce(mine, false); err != nil {
			t.Fatal(err)
		}
		m, files, err := receive(h.conn)
		if err != nil {
			t.Fatal(err)
		}
		h.obey(m, files)
		want := dyingLimit
		if known {
			want = knownLimit
		}
		if got := h.patience(); got != want || h.files[namePrimary] == nil {
			t.Errorf("known %t: the spare waits for %v, want %v", known, got, want)
		}
	}
	h.drop(namePrimary)
	if err := errors.Join(l.primary.Close(), mine.Close(), conn.Close()); err != nil {
		t.Error(err)
	}
}

// A holder that was told is known to have been.
func TestTellReports(t *testing.T) {
	mine, theirs, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	l := &Link{o: Options{Log: zap.NewNop()}, conn: mine}
	if !l.tell(message{Op: opDrop, Names: []string{"a"}}, nil) {
		t.Error("tell() with somebody at the other end = false")
	}
	if err := theirs.Close(); err != nil {
		t.Fatal(err)
	}
	if l.tell(message{Op: opDrop, Names: []string{"a"}}, nil) {
		t.Error("tell() with nobody at the other end = true")
	}
	if err := mine.Close(); err != nil {
		t.Error(err)
	}
}

// Whatever replaces a spare leaves no descriptor free below lowest.
func TestLostSpareReserves(t *testing.T) {
	l := &Link{o: Options{Log: zap.NewNop()}}
	defer l.release()
	if err := l.reserve(); err != nil {
		t.Fatal(err)
	}
	if len(l.low) == 0 {
		t.Fatal("no low descriptor is free: nothing is shown")
	}
	_ = unix.Close(l.low[0]) // for the spare's socket
	l.low = l.low[1:]
	mine, theirs, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	l.spare = &spare{conn: mine, pid: 1}
	l.sparePID.Store(1)
	l.lostSpare()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if f.Fd() < lowest || l.Spare() != 0 {
		t.Errorf("descriptor %d is free, want none below %d; spare %d", f.Fd(), lowest, l.Spare())
	}
	if err := errors.Join(f.Close(), theirs.Close()); err != nil {
		t.Error(err)
	}
}
