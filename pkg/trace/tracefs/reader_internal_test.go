package tracefs

import (
	"errors"
	"io"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestCountCPUs(t *testing.T) {
	for list, want := range map[string]int{
		"0": 1, "0-1": 2, "0-3,8": 5, "0,2,4-5": 4, "": 0, "x": 0, "3-1": 0, "0-": 0, "0,": 0, "0-99999999": 0,
	} {
		if got := countCPUs(list); got != want {
			t.Errorf("countCPUs(%q) = %d, want %d", list, got, want)
		}
	}
	if n := online(); n < runtime.NumCPU() {
		t.Errorf("online() = %d, this process may use %d", n, runtime.NumCPU())
	}
}

// A CPU that is not online has a directory and no ring: its reads fail with ENODEV and its
// polls with POLLERR, as those of a pipe do that nobody reads. The others are read all the
// same, and nobody waits in a circle. When it comes online it is read.
func TestCPUThatIsNotOnline(t *testing.T) {
	testenv.Root(t)
	fs, err := Open()
	testenv.Kernel(t, "tracefs", err)
	defer fs.Close()
	in, err := fs.Create(Options{Events: Pages})
	testenv.Kernel(t, "page cache tracepoints", err)
	defer in.Close()
	r, err := in.Reader()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	gone, broken, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	s := &stream{file: broken, fd: int(broken.Fd())}
	reads, isOnline := 0, false
	page := (&pageWriter{stamp: 1}).head(len(fault(r.layout))/4, 0).raw(fault(r.layout)).page(0)
	r.read = func(fd int, p []byte) (int, error) {
		if fd != s.fd {
			return unix.Read(fd, p)
		}
		reads++
		if isOnline {
			isOnline = false
			return copy(p, page), nil
		}
		return 0, unix.ENODEV
	}
	r.streams = append([]*stream{s}, r.streams...)
	r.polls = append([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}, r.polls...)

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := in.Arm(unix.Gettid()); err != nil {
		t.Fatal(err)
	}
	events := make([]Event, 10)
	next := make(chan error, 1)
	go func() {
		_, err := r.Read(events)
		next <- err
	}()
	time.Sleep(20 * time.Millisecond)
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, 1), 0); err != nil {
		t.Fatal(err)
	}
	if err := <-next; err != nil || events[0].Kind != Read {
		t.Errorf("Read() = %v, %+v; want the read of a page", err, events[0])
	}
	if reads > 10 {
		t.Errorf("%d reads of the CPU that is not online", reads)
	}
	if r.polls[0].Fd != -1 {
		t.Error("it is polled still")
	}
	isOnline = true
	r.Wake()
	for seen := false; !seen; {
		n, err := r.Read(events)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events[:n] {
			seen = seen || e.Inode == 9
		}
	}
	if r.polls[0].Fd != int32(s.fd) {
		t.Error("it is not polled although it has a ring")
	}
	r.Stop()
	for err = nil; err == nil; {
		_, err = r.Read(events)
	}
	if !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}
