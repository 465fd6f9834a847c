package lazy_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/endproc"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

// kill ends a process that must be there.
func kill(t testing.TB, pid int) {
	t.Helper()
	if pid <= 1 {
		t.Fatalf("kill %d", pid)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatalf("kill %d: %v", pid, err)
	}
}

// Daemon and holder die at random moments while three images are read for the first time: every byte is
// right, no reader sees an error, and everybody finishes.
func TestKill(t *testing.T) {
	rounds := 2
	if testing.Short() {
		rounds = 1
	}
	killRounds(t, rounds)
}

// TestSoakKill kills more than a hundred times behind each driver.
func TestSoakKill(t *testing.T) {
	soak(t)
	killRounds(t, 30)
}

func killRounds(t *testing.T, rounds int) {
	for round := range rounds {
		t.Run(strconv.Itoa(round), func(t *testing.T) { eachDriver(t, killRound) })
	}
}

func killRound(t *testing.T, b *box) {
	var g errgroup.Group
	for _, r := range []lazy.Request{loose(t, "v6-zstd"), loose(t, "v6-lz4_block"), loose(t, "v6-zstd-sha256-64k")} {
		m := b.mount(b.mountpoint(filepath.Base(filepath.Dir(r.Bootstrap))), r)
		for range 2 {
			g.Go(func() error { return compareErr(t, m.Dir) })
		}
	}
	done := make(chan error, 1)
	go func() { done <- g.Wait() }()
	for range 5 {
		time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
		s := b.status()
		victim := s.PID
		if rand.IntN(3) == 0 {
			victim = s.Holder
		}
		kill(t, victim)
		eventually(t, func() string {
			if now, err := b.client.Status(t.Context(), false); err != nil || now.PID == victim || now.Holder == victim {
				return fmt.Sprintf("%d was killed: %+v, %v", victim, now, err)
			}
			return ""
		})
	}
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(3 * time.Minute):
		t.Error("readers hang")
	}
	for _, m := range b.status().Mounts {
		if m.State == lazy.StateFailed {
			t.Errorf("%s failed: %s", m.Dir, m.Error)
		}
	}
}

// A reader that waits for the dead daemon's answer gets its bytes from the next one.
func TestKillWhileReading(t *testing.T) { mostlyEROFS(t, testKillWhileReading) }

func testKillWhileReading(t *testing.T, b *box) {
	m := b.mount(b.mountpoint("mnt"), loose(t, "v6-zstd"))
	for round := range 4 {
		s := b.status()
		kill(t, s.PID)
		// The daemon is dead or its successor starts.
		out, err := exec.Command("find", m.Dir, "-type", "f", "-size", fmt.Sprintf("+%dk", 1<<(2*round)), "-exec", "cat", "{}", "+").Output()
		if err != nil || len(out) == 0 {
			t.Fatalf("round %d: %d bytes, %v", round, len(out), err)
		}
	}
	compare(t, m.Dir)
	if s := b.status(); len(s.Mounts) != 1 || s.Mounts[0].State == lazy.StateFailed {
		t.Errorf("%+v, want one mount that did not fail", s)
	}
}

// killEverybody waits for the spare holder, and kills it, the holder and the daemon in the same moment.
func (b *box) killEverybody() {
	b.t.Helper()
	s := b.spared()
	if err := endproc.All(s.PID, s.Holder, s.Spare); err != nil { // stopped first, so that none can start another
		b.t.Fatal(err)
	}
}

// spared waits for the spare holder.
func (b *box) spared() (s lazy.Status) {
	b.t.Helper()
	eventually(b.t, func() string {
		var err error
		if s, err = b.client.Status(b.t.Context(), false); err != nil || s.Spare == 0 {
			return fmt.Sprintf("%+v, %v, want a spare holder", s, err)
		}
		return ""
	})
	return s
}

// When daemon and holder die in the same moment, the spare takes their place: readers wait, and get what they asked for.
func TestTwoDie(t *testing.T) { eachDriver(t, testTwoDie) }

func testTwoDie(t *testing.T, b *box) {
	m := b.mount(b.mountpoint("mnt"), loose(t, "v6-zstd"))
	s := b.spared()
	done := make(chan error, 1)
	go func() { done <- compareErr(t, m.Dir) }()
	if err := endproc.All(s.PID, s.Holder); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	after := b.status()
	if len(after.Mounts) != 1 || after.Mounts[0].State == lazy.StateFailed || after.PID == s.PID || after.Holder != s.Spare {
		t.Errorf("%d and %d were killed: %+v, want another daemon, which the spare %d has started, with the mount", s.PID, s.Holder, after, s.Spare)
	}
}

// When daemon, holder and spare die in the same moment, nobody gets zeros for long: the next daemon makes
// what is not local an error, and says so. What is local stays.
func TestAllDie(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), loose(t, "v6-zstd"))
	whole := b.mount(b.mountpoint("whole"), loose(t, "v6-lz4_block"))
	compare(t, whole.Dir)
	if _, err := b.client.Wait(t.Context(), whole.Device); err != nil {
		t.Fatal(err)
	}
	b.killEverybody()
	eventually(t, func() string {
		if _, err := b.client.Status(t.Context(), false); !errors.Is(err, lazy.ErrNoDaemon) {
			return fmt.Sprintf("Status() = %v, want ErrNoDaemon", err)
		}
		return ""
	})
	// The next daemon comes with the next mount.
	other := b.mount(b.mountpoint("other"), loose(t, "v6-zstd"))
	compare(t, other.Dir)
	compare(t, whole.Dir)
	for _, got := range b.status().Mounts {
		want := map[string]lazy.State{m.Dir: lazy.StateFailed, whole.Dir: lazy.StateComplete}[got.Dir]
		if want != "" && got.State != want {
			t.Errorf("%s is %s (%s), want %s", got.Dir, got.State, got.Error, want)
		}
	}
	if _, err := b.client.Wait(t.Context(), m.Device); !errors.Is(err, lazy.ErrFailed) {
		t.Errorf("Wait(failed) = %v, want ErrFailed", err)
	}
	// Nothing of the first mount was read before: all data are errors, and no file reads as what it is not.
	read, failed := 0, 0
	err := filepath.WalkDir(m.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		want, err := os.ReadFile(filepath.Join(other.Dir, strings.TrimPrefix(path, m.Dir)))
		if err != nil {
			return err
		}
		got, err := os.ReadFile(path)
		switch {
		case errors.Is(err, unix.EIO):
			failed++
		case err != nil:
			return err
		case string(got) != string(want):
			return fmt.Errorf("%s reads as something else", path)
		default:
			read++ // empty files
		}
		return nil
	})
	if err != nil || failed == 0 {
		t.Errorf("%d files read, %d failed, %v, want some to fail", read, failed, err)
	}
	b.unmount(m.Dir)
	if again := b.mount(m.Dir, loose(t, "v6-zstd")); again.State == lazy.StateFailed {
		t.Errorf("mounted again: %+v", again)
	}
	compare(t, m.Dir)
}

// A signal to end makes the daemon start anew while something is mounted.
func TestTerminate(t *testing.T) { eachDriver(t, testTerminate) }

func testTerminate(t *testing.T, b *box) {
	m := b.mount(b.mountpoint("mnt"), layout(t))
	before := b.status()
	if err := unix.Kill(before.PID, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	compare(t, m.Dir)
	eventually(t, func() string {
		if s, err := b.client.Status(t.Context(), false); err != nil || s.PID == before.PID || s.Holder != before.Holder || len(s.Mounts) != 1 {
			return fmt.Sprintf("after SIGTERM: %+v, %v, want another daemon with the mount", s, err)
		}
		return ""
	})
}
