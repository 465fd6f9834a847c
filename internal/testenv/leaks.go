package testenv

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
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
	} else if mounts, mountErr := mountsBelow(tmp); mountErr == nil && len(mounts) == 0 {
		err = errors.Join(err, os.RemoveAll(tmp)) // never through a mount that is left
	}
	return code, err
}

// Snapshot is what a process holds at one moment.
type Snapshot struct {
	files      map[string]int // what descriptors refer to, and how many do
	processes  []int
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
	mounts, err := mountsBelow(os.TempDir())
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
	for _, pid := range now.processes {
		if !slices.Contains(s.processes, pid) {
			errs = append(errs, fmt.Errorf("leaked process %d: %s", pid, commandLine(pid)))
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

// ourProcesses returns the live processes that this one started: its children,
// and whatever carries its mark.
func ourProcesses() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	self := os.Getpid()
	mark := []byte(marker + "=" + os.Getenv(marker))
	if os.Getenv(marker) == "" {
		mark = nil
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == self {
			continue
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		// proc(5): after the name in parentheses come the state and the parent.
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		if len(fields) < 2 || string(fields[0]) == "Z" && string(fields[1]) != strconv.Itoa(self) {
			continue
		}
		if string(fields[1]) == strconv.Itoa(self) || hasMark(pid, mark) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func hasMark(pid int, mark []byte) bool {
	if mark == nil {
		return false
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	return err == nil && slices.ContainsFunc(bytes.Split(env, []byte{0}), func(v []byte) bool { return bytes.Equal(v, mark) })
}

func commandLine(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(text) == 0 {
		return "(ended, not waited for)"
	}
	return string(bytes.TrimSpace(bytes.ReplaceAll(text, []byte{0}, []byte{' '})))
}

// mountsBelow returns the mount points of this thread's mount namespace that lie
// below dir.
func mountsBelow(dir string) (mounts []string, err error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	r := bufio.NewReader(f)
	for {
		line, err := r.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return mounts, nil
		}
		if err != nil {
			return nil, err
		}
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			mounts = append(mounts, fields[4])
		}
	}
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
