package hold_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// spared starts a daemon and waits for its spare.
func spared(t *testing.T) *box {
	t.Helper()
	b := startWith(t, time.Millisecond)
	b.wait(func(s state) bool { return s.Spare != 0 })
	return b
}

// killAll kills processes in the order given, with nothing between.
func killAll(t *testing.T, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		if pid <= 1 {
			t.Fatalf("kill %d", pid)
		}
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			t.Fatal(err)
		}
	}
}

// Any two of daemon, holder and spare die at once, in either order, and the third makes up for them.
func TestKillTwo(t *testing.T) {
	b := spared(t)
	rounds := 6
	if testing.Short() {
		rounds = 1
	}
	for range rounds {
		for _, victims := range [][2]func(state) int{
			{pid, holder}, {holder, pid}, {pid, spare}, {spare, pid}, {holder, spare}, {spare, holder},
		} {
			before := b.wait(func(s state) bool { return s.Spare != 0 })
			two := []int{victims[0](before), victims[1](before)}
			killAll(t, two...)
			after := b.wait(func(s state) bool {
				return !slices.Contains(two, s.PID) && !slices.Contains(two, s.Holder) && !slices.Contains(two, s.Spare)
			})
			if b.gone() {
				t.Fatalf("%+v, of which %v were killed: the pipe was closed", before, two)
			}
			if after.PID != before.PID && (!after.Restarted || !after.Whole || len(after.Names) != 300) {
				t.Fatalf("%+v, of which %v were killed: %+v, want another daemon with everything", before, two, after)
			}
			b.alone()
		}
	}
	b.wait(func(s state) bool { return s.Spare != 0 })
	b.end()
}

func pid(s state) int    { return s.PID }
func holder(s state) int { return s.Holder }
func spare(s state) int  { return s.Spare }

// alone waits until there are one daemon, its holder and its spare, and nobody else that has the pipe.
func (b *box) alone() {
	b.t.Helper()
	var daemons, holders []int
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		daemons, holders = b.processes()
		s := b.wait(func(s state) bool { return s.Spare != 0 })
		want := []int{s.Holder, s.Spare}
		slices.Sort(want)
		if slices.Sort(holders); len(daemons) == 1 && daemons[0] == s.PID && slices.Equal(holders, want) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	b.t.Fatalf("daemons %v and holders %v stay, want one daemon, with its holder and spare", daemons, holders)
}

// processes returns the daemons of b, and the holders that have its pipe.
func (b *box) processes() (daemons, holders []int) {
	b.t.Helper()
	info, err := b.pipe.Stat()
	if err != nil {
		b.t.Fatal(err)
	}
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		b.t.Fatal(err)
	}
	for _, name := range names {
		line, _ := os.ReadFile(name) // it may have ended
		args := strings.Split(string(line), "\x00")
		id, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil || len(args) < 2 {
			continue
		}
		switch {
		case args[1] == "a-daemon" && args[2] == b.dir:
			daemons = append(daemons, id)
		case args[1] == "a-holder":
			fds, _ := filepath.Glob(filepath.Join(filepath.Dir(name), "fd", "*"))
			if slices.ContainsFunc(fds, func(fd string) bool {
				got, err := os.Stat(fd)
				return err == nil && os.SameFile(got, info)
			}) {
				holders = append(holders, id)
			}
		}
	}
	return daemons, holders
}

// Two of the three die at random moments, also while others are started: there is never more than one daemon, and no descriptor is lost
// as long as one of those that have all lives.
func TestKillTwoSoon(t *testing.T) {
	b := spared(t)
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	for i := range rounds {
		s := b.wait(func(s state) bool { return s.Spare != 0 })
		victims := [][]int{{s.PID, s.Holder}, {s.Holder, s.PID}, {s.Holder, s.Spare}}[rand.IntN(3)]
		killAll(t, victims[0])
		time.Sleep(time.Duration(rand.IntN(4000)) * time.Microsecond)
		killAll(t, victims[1])
		after := b.wait(func(n state) bool {
			return !slices.Contains(victims, n.PID) && !slices.Contains(victims, n.Holder) && n.Spare != 0 && !slices.Contains(victims, n.Spare)
		})
		if b.gone() || after.PID != s.PID && (!after.Whole || len(after.Names) != 300) {
			t.Fatalf("round %d: %+v, %v were killed: %+v", i, s, victims, after)
		}
		b.alone()
	}
	b.end()
}

// A daemon that took over dies with its holder while it has the spare of the one before it, or just replaces that: one spare makes up for them,
// and no more than one.
func TestKillBesideOldSpare(t *testing.T) {
	b := spared(t)
	rounds := 12
	if testing.Short() {
		rounds = 5
	}
	for i := range rounds {
		first := b.wait(func(s state) bool { return s.Spare != 0 })
		killAll(t, first.PID)
		second := b.wait(func(s state) bool { return s.PID != first.PID })
		time.Sleep(time.Duration(rand.IntN(20000)) * time.Microsecond)
		killAll(t, second.PID, second.Holder)
		after := b.wait(func(s state) bool {
			return s.PID != first.PID && s.PID != second.PID && s.Holder != second.Holder && s.Spare != 0
		})
		if b.gone() || !after.Whole || len(after.Names) != 300 {
			t.Fatalf("round %d: %+v, then %+v: %+v, want another daemon with everything", i, first, second, after)
		}
		b.alone()
	}
	b.end()
}

// A daemon of another program replaces the holder too, once it has lived for a moment, with everything that is kept.
func TestRenew(t *testing.T) {
	b := spared(t)
	before := b.last
	newer := filepath.Join(b.dir, "newer")
	self, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = errors.Join(os.WriteFile(newer, self, 0o755), os.WriteFile(filepath.Join(b.dir, "path"), []byte(newer), 0o600),
			os.Rename(filepath.Join(b.dir, "path"), filepath.Join(b.dir, "program")))
	}
	if err != nil {
		t.Fatal(err)
	}
	after := b.wait(func(s state) bool {
		return s.PID != before.PID && s.Holder != before.Holder && s.Spare != 0 && s.Spare != before.Spare
	})
	if !after.Whole || len(after.Names) != 300 || b.gone() {
		t.Errorf("%+v, want everything", after)
	}
	for _, id := range []int{after.PID, after.Holder, after.Spare} {
		if path, err := os.Readlink("/proc/" + strconv.Itoa(id) + "/exe"); err != nil || path != newer {
			t.Errorf("%+v: process %d runs %s, %v, want %s", after, id, path, err, newer)
		}
	}
	killAll(t, after.PID, after.Holder)
	again := b.wait(func(s state) bool { return s.PID != after.PID && s.Holder == after.Spare })
	if !again.Whole || b.gone() {
		t.Errorf("%+v, want everything still", again)
	}
	b.end()
}
