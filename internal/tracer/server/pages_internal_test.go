package server

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// TestCloseWhileReading holds that a log which nobody stopped, because an error ended the recording, is closed
// after it has been read, not while: the reader takes neither.
func TestCloseWhileReading(t *testing.T) {
	testenv.Root(t)
	fs, err := tracefs.Open()
	testenv.Kernel(t, "tracefs", err)
	instance, err := fs.Create(tracefs.Options{})
	testenv.Kernel(t, "page events", err)
	t.Cleanup(func() {
		if err := errors.Join(instance.Close(), fs.Close()); err != nil {
			t.Error(err)
		}
	})
	fd, err := unix.FcntlInt(instance.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := Pages{Instance: os.NewFile(uintptr(fd), instance.Name()), Spec: instance.Spec()}
	l, err := newPageLog(p, &target{}, newComms(-1, 1), 10, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.begin(0)
	time.Sleep(10 * time.Millisecond) // it mostly waits for events by then
	if err := l.close(); err != nil {
		t.Error(err)
	}
	select {
	case <-l.done:
	default:
		t.Error("it is still read")
		<-l.done
	}
	if l.err != nil {
		t.Errorf("read: %v", l.err)
	}
}
