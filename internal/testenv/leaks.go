package testenv

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testenv/procfs"
)

// marker is the environment variable that names the test process in everything
// it starts, so that a daemon that left its parent is found all the same.
const marker = "HEADSTART_TEST_PROCESS"

// settle is how long what ends by itself may take to end.
const settle = 5 * time.Second

// Main runs the tests of a package and exits: with their code, or with 1 when
// the tests passed and left something behind: a mount below the temporary
// directory, a process, an open file, a goroutine. Use it as
//
//	func TestMain(m *testing.M) { testenv.Main(m) }
//
// It gives the tests a temporary directory of their own, so that it can tell
// this package's mounts from those of packages tested at the same time, and
// removes it. The path is short, because Unix sockets below it must fit 107
// bytes.
func Main(m *testing.M) { os.Exit(Checked(m).Run()) }

// Checked returns m with the checks of [Main] around it, for a TestMain that
// hands the tests on: testscript.Main(testenv.Checked(m), commands).
func Checked(m *testing.M) *Runner { return &Runner{m} }

// Runner runs the tests of a package. See [Checked].
type Runner struct{ m *testing.M }

// Run runs the tests once and returns the exit code. A test binary that a test
// started runs its tests without checks: they are its parent's.
func (r *Runner) Run() int {
	if os.Getenv(marker) != "" {
		return r.m.Run()
	}
	code, err := run(r.m)
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "testenv:", err)
		code = max(code, 1)
	}
	return code
}

func run(m *testing.M) (code int, err error) {
	// Resolved, because the kernel's mount table has no symbolic links.
	base, err := filepath.EvalSymlinks(os.TempDir())
	if err != nil {
		return 1, err
	}
	tmp, err := os.MkdirTemp(base, "hs-*")
	if err != nil {
		return 1, err
	}
	if err := os.Chmod(tmp, 0o755); err != nil { // containers are other users
		return 1, err
	}
	for name, value := range map[string]string{"TMPDIR": tmp, marker: rand.Text()} {
		if err := os.Setenv(name, value); err != nil {
			return 1, err
		}
	}
	before, err := TakeSnapshot()
	if err != nil {
		return 1, err
	}
	code = m.Run()
	err = before.Wait(settle)
	if code == 0 && err == nil {
		err = os.RemoveAll(tmp)
	} else if mounts, mountErr := procfs.MountsBelow(tmp); mountErr == nil && len(mounts) == 0 {
		err = errors.Join(err, os.RemoveAll(tmp)) // never through a mount that is left
	}
	return code, err
}

// Snapshot is what a process holds at one moment.
type Snapshot struct {
	files      map[string]int // what descriptors refer to, and how many do
	processes  map[int]procfs.Process
	mounts     []string
	goroutines map[string]int // by the function that started them
}

// TakeSnapshot returns what this process holds now: open files, children and
// descendants that carry the mark of [Main], mounts below the temporary
// directory, goroutines.
func TakeSnapshot() (*Snapshot, error) {
	files, err := openFiles()
	if err != nil {
		return nil, err
	}
	processes, err := ourProcesses()
	if err != nil {
		return nil, err
	}
	mounts, err := procfs.MountsBelow(os.TempDir())
	if err != nil {
		return nil, err
	}
	return &Snapshot{files: files, processes: processes, mounts: mounts, goroutines: goroutines()}, nil
}

// Wait returns nil once the process holds nothing that s does not have, or an
// error that names what is left when d has passed.
func (s *Snapshot) Wait(d time.Duration) error {
	deadline := time.Now().Add(d)
	for pause := time.Millisecond; ; pause *= 2 {
		now, err := TakeSnapshot()
		if err != nil {
			return err
		}
		err = s.diff(now)
		if err == nil || time.Now().After(deadline) {
			return err
		}
		runtime.GC() // the pipes that io.Copy between sockets keeps are closed by the collector (internal/poll splice)
		time.Sleep(pause)
	}
}

func (s *Snapshot) diff(now *Snapshot) error {
	var errs []error
	for _, m := range now.mounts {
		if !slices.Contains(s.mounts, m) {
			errs = append(errs, fmt.Errorf("leaked mount: %s", m))
		}
	}
	for pid, p := range now.processes {
		if _, ok := s.processes[pid]; !ok {
			errs = append(errs, fmt.Errorf("leaked process %d: %s", pid, p.CommandLine()))
		}
	}
	for name, n := range now.files {
		if n > s.files[name] {
			errs = append(errs, fmt.Errorf("leaked file: %d more of %s", n-s.files[name], name))
		}
	}
	for name, n := range now.goroutines {
		if n > s.goroutines[name] {
			errs = append(errs, fmt.Errorf("leaked goroutine: %d more, %s", n-s.goroutines[name], name))
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

// openFiles counts this process's descriptors by what they refer to. Sockets and
// pipes count as one kind each, because their numbers differ. The runtime's
// poller keeps an epoll and an event descriptor from its first use on.
func openFiles() (map[string]int, error) {
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	files := map[string]int{}
	for _, e := range entries {
		name, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // the descriptor that read the directory, closed since
		}
		switch {
		case name == "anon_inode:[eventpoll]", name == "anon_inode:[eventfd]",
			strings.HasPrefix(name, "/proc/"), strings.HasPrefix(name, "/sys/"):
			continue
		}
		if kind, _, ok := strings.Cut(name, ":["); ok && kind != "anon_inode" {
			name = kind
		}
		files[name]++
	}
	return files, nil
}

// ourProcesses returns the processes that this one started, by their number: its
// children, dead ones too, and whatever carries its mark and lives.
func ourProcesses() (map[int]procfs.Process, error) {
	all, err := procfs.Processes()
	if err != nil {
		return nil, err
	}
	id := os.Getenv(marker)
	ours := map[int]procfs.Process{}
	for _, p := range all {
		if p.Parent == os.Getpid() || !p.Zombie && id != "" && p.HasEnv(marker+"="+id) {
			ours[p.PID] = p
		}
	}
	return ours, nil
}

// goroutines counts the goroutines that are not the runtime's or package
// testing's by the function that created them.
func goroutines() map[string]int {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	count := map[string]int{}
	for i, g := range strings.Split(string(buf), "\n\n") {
		_, creator, ok := strings.Cut(g, "created by ")
		if i == 0 || !ok { // the one that asks; main
			continue
		}
		creator, _, _ = strings.Cut(creator, "\n")
		creator, _, _ = strings.Cut(creator, " in goroutine")
		switch {
		case strings.HasPrefix(creator, "testing."), strings.HasPrefix(creator, "os/signal."), strings.HasPrefix(creator, "runtime."):
			continue
		}
		count["created by "+creator]++
	}
	return count
}
