package fanotify

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// TestUnopened holds that a file the kernel cannot open for us is an event all the same,
// with FAN_REPORT_FD_ERROR and, as on kernels before 6.13, without.
func TestUnopened(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, FeatureGroup.String(), Probe(FeatureGroup))
	for _, errs := range []bool{true, false} {
		t.Run("reported in events "+strconv.FormatBool(errs), func(t *testing.T) {
			g, err := New(Options{})
			if err != nil {
				t.Fatal(err)
			}
			if errs && !g.errs {
				testenv.Kernel(t, FeatureOpenErrors.String(), Probe(FeatureOpenErrors))
			}
			if !errs {
				g = without(t, g)
			}
			defer func() {
				if err := g.Close(); err != nil {
					t.Error(err)
				}
			}()
			dir := t.TempDir()
			if err := g.Mark(Mark{Mask: Open | unix.FAN_EVENT_ON_CHILD, Dir: unix.AT_FDCWD, Path: dir}); err != nil {
				t.Fatal(err)
			}
			for i := range 3 {
				if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			events := make([]Event, 8)
			n, err := readWithFewFiles(t, g, events, 1)
			if err != nil || n != 3 {
				t.Fatalf("Read = %d, %v; want 3", n, err)
			}
			for i := range events[:n] {
				e := &events[i]
				if want := i > 0; (e.Err == unix.EMFILE) != want || (e.FD == NoFD) != want {
					t.Errorf("event %d = %+v, want EMFILE %v", i, *e, want)
				}
				if err := e.Close(); err != nil {
					t.Error(err)
				}
			}
			if _, err := g.Read(events); !errors.Is(err, ErrEmpty) {
				t.Errorf("second Read = %v, want %v", err, ErrEmpty)
			}
		})
	}
}

// without returns a group that was made as on a kernel without FAN_REPORT_FD_ERROR.
func without(t *testing.T, g *Group) *Group {
	t.Helper()
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, eventFlags)
	if err != nil {
		t.Fatal(err)
	}
	return &Group{file: os.NewFile(uintptr(fd), "fanotify"), fd: fd}
}

// readWithFewFiles reads events while only spare more descriptors can be opened.
func readWithFewFiles(t *testing.T, g *Group, events []Event, spare uint64) (int, error) {
	t.Helper()
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	lowest, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(lowest); err != nil {
		t.Fatal(err)
	}
	few := unix.Rlimit{Cur: uint64(lowest) + spare, Max: before.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
			t.Fatal(err)
		}
	}()
	return g.Read(events)
}
