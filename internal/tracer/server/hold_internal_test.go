package server

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/fanotify"
)

func TestRunning(t *testing.T) {
	for in, want := range map[string]int{
		"0.25 1.52 2.90 3/234 5678\n": 3,
		"0.25 1.52 2.90 17/234":       17,
		"":                            -1,
		"0.25 1.52 2.90":              -1,
		"0.25 1.52 2.90 x/2 1":        -1,
	} {
		if got := running([]byte(in)); got != want {
			t.Errorf("running(%q) = %d, want %d", in, got, want)
		}
	}
}

func TestQueueTimes(t *testing.T) {
	q := queue{ticks: []tick{{0, 1}, {2, 20}, {2, 30}, {3, 40}}}
	var got []time.Duration
	for range 5 {
		got = append(got, q.at(99))
		q.taken++
	}
	if want := []time.Duration{20, 20, 40, 99, 99}; !slices.Equal(got, want) {
		t.Errorf("times of events: %v, want %v", got, want)
	}
}

// heldSession returns a session of a filesystem of its own with n files 0000, 0001 and so on, that writes to out.
func heldSession(t *testing.T, n int) (s *session, dir string, out *os.File) {
	t.Helper()
	testenv.Root(t)
	dir = t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	for i := range n {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%04d", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(tickLength) // older than the session
	out, err := os.Create(filepath.Join(t.TempDir(), "stream"))
	if err != nil {
		t.Fatal(err)
	}
	tg, err := openTarget(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if tg.view, err = unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err := errors.Join(err, replace(&tg.root, root)); err != nil {
		t.Fatal(err)
	}
	g, err := fanotify.New(fanotify.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s = newSession(Config{PID: os.Getpid(), MaxFiles: DefaultMaxFiles}, tg, g, newOutput(out))
	s.busy = func() bool { return true }
	t.Cleanup(func() {
		if err := errors.Join(s.closeQueues(), tg.close(), out.Close()); err != nil {
			t.Error(err)
		}
	})
	if _, err := tg.mark(g, false); err != nil {
		t.Fatal(err)
	}
	return s, dir, out
}

// opened makes another process open the files from to to, and returns what it opened.
func opened(t *testing.T, dir string, from, to int) []string {
	t.Helper()
	script := fmt.Sprintf(`cd "$0"; i=%d; while [ $i -lt %d ]; do printf -v name %%04d $i; : < $name; i=$((i+1)); done`, from, to)
	if b, err := exec.Command("bash", "-euc", script, dir).CombinedOutput(); err != nil {
		t.Fatalf("open files: %v: %s", err, b)
	}
	var names []string
	for i := from; i < to; i++ {
		names = append(names, filepath.Join(dir, fmt.Sprintf("%04d", i)))
	}
	return names
}

// Events that were held, in several queues, are handled once each, in order, with about the time at which they came.
func TestHold(t *testing.T) {
	for name, drain := range map[string]func(*session) error{
		"while it runs": func(s *session) error {
			for {
				if empty, err := s.drain(burst); empty || err != nil {
					return err
				}
			}
		},
		"at the end": (*session).drainRest,
	} {
		t.Run(name, func(t *testing.T) {
			s, dir, out := heldSession(t, long+300)
			want := opened(t, dir, 0, long+100)
			if err := s.hold(false, -1, -1); err != nil {
				t.Fatal(err)
			}
			first := s.since()
			want = append(want, opened(t, dir, long+100, long+200)...)
			opened(t, dir, 0, 50) // again: once in each queue
			if n, err := s.count(); err != nil || len(s.queues) != 2 || n != 150 {
				t.Fatalf("%d queues, the last one of %d events, %v; want 2, 150", len(s.queues), n, err)
			}
			second := s.since()
			want = append(want, opened(t, dir, long+200, long+300)...)
			if err := drain(s); err != nil {
				t.Fatal(err)
			}
			if err := s.out.finish(); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(out.Name())
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range decode(t, b) {
				touch, ok := f.(stream.Touch)
				if !ok {
					continue
				}
				got = append(got, touch.Access.Path)
				at := touch.Access.Elapsed
				switch n := len(got); {
				case n <= long+100 && at <= first, n > long+100 && n <= long+200 && at > first && at <= second, n > long+200 && at > second:
				default:
					t.Errorf("file %d touched at %v; events were counted at %v and %v", n, at, first, second)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%d files were touched, want these %d in order", len(got), len(want))
			}
		})
	}
}

// A session that holds events has so many groups and no more.
func TestRotate(t *testing.T) {
	s, _, _ := heldSession(t, 0)
	n := 1
	for s.rotate() {
		n++
	}
	if n != maxQueues || len(s.queues) != maxQueues {
		t.Errorf("%d queues, %d kept; want %d", n, len(s.queues), maxQueues)
	}
	if empty, err := s.drain(burst); err != nil || !empty || len(s.queues) != 1 {
		t.Errorf("drain = %v, %v, with %d queues left; want it to leave one, empty", empty, err, len(s.queues))
	}
	if !s.rotate() {
		t.Error("no rotation after the queues were emptied")
	}
}

// What is left in an older queue is not waited for, though nothing comes to the last one.
func TestWaitOlderQueue(t *testing.T) {
	s, dir, _ := heldSession(t, 10)
	opened(t, dir, 0, 10)
	if !s.rotate() {
		t.Fatal("no second queue")
	}
	waited := make(chan error, 1)
	go func() { waited <- s.wait(-1, -1) }()
	select {
	case err := <-waited:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("wait does not end")
	}
	if empty, err := s.drain(0); err != nil || !empty || s.seen != 10 {
		t.Errorf("drain = %v, %v after %d events, want 10", empty, err, s.seen)
	}
}
