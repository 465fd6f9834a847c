package fanotify_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// awaitRaw polls for and reads one batch of records.
func awaitRaw(t *testing.T, g *fanotify.Group) []byte {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(g.FD()), Events: unix.POLLIN}}
	for {
		if n, err := unix.Poll(fds, 10_000); err != nil && !errors.Is(err, unix.EINTR) {
			t.Fatal(err)
		} else if n > 0 {
			break
		} else if n == 0 {
			t.Fatal("no event after 10 s")
		}
	}
	buf := make([]byte, 4096)
	n, err := g.ReadRaw(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

func TestPreContent(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, "FAN_PRE_ACCESS", fanotify.Probe(fanotify.FeaturePreAccess))
	name := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(name, make([]byte, 16384), 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	made, err := fanotify.New(fanotify.Options{PreContent: true})
	if err != nil {
		t.Fatal(err)
	}
	mark := fanotify.Mark{Kind: fanotify.Inode, Mask: fanotify.PreAccess, Dir: int(before.Fd())}
	if err := made.Mark(mark); err != nil {
		t.Fatal(err)
	}
	// Another holder of the descriptor reads and answers.
	fd, err := unix.FcntlInt(uintptr(made.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	g, err := fanotify.Adopt(os.NewFile(uintptr(fd), "fanotify"))
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if err := made.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Read(make([]fanotify.Event, 1)); !errors.Is(err, fanotify.ErrUnsupported) {
		t.Errorf("Read of a pre-content group = %v, want ErrUnsupported", err)
	}
	if _, err := g.ReadRaw(make([]byte, 100)); !errors.Is(err, fanotify.ErrEmpty) {
		t.Errorf("ReadRaw of an empty queue = %v, want ErrEmpty", err)
	}
	after, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer after.Close()
	for _, errno := range []unix.Errno{0, unix.EIO, unix.EBUSY} {
		done := make(chan error, 1)
		go func() {
			_, err := after.ReadAt(make([]byte, 100), 4097)
			done <- err
		}()
		e, _, err := fanotify.Decode(awaitRaw(t, g))
		if err != nil {
			t.Fatal(err)
		}
		if !e.HasRange || e.Offset != 4096 || e.Count != 4096 || !e.Permission() {
			t.Errorf("event = %+v, want a permission event of the page at 4096", e)
		}
		fd := e.FD
		if err := g.Answer(fd, errno); err != nil {
			t.Error(err)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; errno == 0 && err != nil || errno != 0 && !errors.Is(err, errno) {
			t.Errorf("read = %v, want errno %d", err, errno)
		}
		if err := g.Answer(fd, 0); !errors.Is(err, unix.ENOENT) {
			t.Errorf("second answer = %v, want ENOENT", err)
		}
	}
	// A descriptor that was opened before the mark raises nothing.
	if _, err := before.ReadAt(make([]byte, 100), 0); err != nil {
		t.Error(err)
	}
	if err := g.Unmark(mark); err != nil {
		t.Error(err)
	}
	if err := g.Unmark(mark); !errors.Is(err, unix.ENOENT) {
		t.Errorf("second Unmark = %v, want ENOENT", err)
	}
	if _, err := after.ReadAt(make([]byte, 100), 0); err != nil {
		t.Error(err)
	}
	if _, err := g.ReadRaw(make([]byte, 100)); !errors.Is(err, fanotify.ErrEmpty) {
		t.Errorf("ReadRaw without marks = %v, want ErrEmpty", err)
	}
}
