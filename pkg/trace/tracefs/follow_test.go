package tracefs_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// workload is a process that waits for a line on its standard input and then does what the
// line's words say, each on what remains: read FILE; sleep; thread, fork, session, exec, threadexec
// (do the rest elsewhere); done.
func workload(args []string) error {
	if len(args) == 0 {
		fmt.Println("ready")
		line, err := bufio.NewReader(os.Stdin).ReadString('\n')
		if err != nil {
			return err
		}
		args = strings.Fields(line)
	}
	if len(args) == 0 {
		return nil
	}
	rest := args[1:]
	again := func(attr *syscall.SysProcAttr) error {
		cmd := exec.Command("/proc/self/exe", rest...)
		cmd.SysProcAttr = attr
		cmd.Stderr = os.Stderr
		return cmd.Run()
	}
	switch args[0] {
	case "read":
		f, err := os.Open(rest[0])
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.ReadAt(make([]byte, 1), 0); err != nil {
			return err
		}
		return next(rest[1:])
	case "burst": // N processes at a time, M reads of one page each, of FILE
		processes, err := strconv.Atoi(rest[0])
		if err != nil {
			return err
		}
		return burst(processes, rest[1:])
	case "reads":
		return reads(rest[0], rest[1])
	case "sleep":
		time.Sleep(300 * time.Millisecond)
		return next(rest)
	case "thread":
		return elsewhere(func() error { return next(rest) })
	case "fork": // Go starts processes by clone(CLONE_VFORK|CLONE_VM)
		return again(nil)
	case "session":
		return again(&syscall.SysProcAttr{Setsid: true})
	case "namespaces":
		return again(&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS})
	case "exec":
		return syscall.Exec("/proc/self/exe", append([]string{"workload"}, rest...), os.Environ())
	case "threadexec":
		return elsewhere(func() error {
			return syscall.Exec("/proc/self/exe", append([]string{"workload"}, rest...), os.Environ())
		})
	}
	return fmt.Errorf("unknown word %q", args[0])
}

// burst runs as many processes at once as it says, each with the arguments of reads.
func burst(processes int, args []string) error {
	var cmds []*exec.Cmd
	for range processes {
		cmd := exec.Command("/proc/self/exe", append([]string{"reads"}, args...)...)
		cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		cmds = append(cmds, cmd)
	}
	var errs []error
	for _, cmd := range cmds {
		errs = append(errs, cmd.Wait())
	}
	return errors.Join(errs...)
}

// reads reads the first byte of the pages of the file, one after the other, n times in all.
func reads(times, path string) error {
	n, err := strconv.Atoi(times)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 1)
	for i := range n {
		if _, err := f.ReadAt(b, int64(i%filePages)*int64(os.Getpagesize())); err != nil {
			return err
		}
	}
	return nil
}

func next(args []string) error {
	if len(args) == 0 {
		return nil
	}
	return workload(args)
}

// elsewhere runs f on a thread that is not the process' first.
func elsewhere(f func() error) error {
	done := make(chan error)
	var try func()
	try = func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if unix.Gettid() == os.Getpid() {
			go try() // cannot be this thread again before this returns, which it does not
			select {}
		}
		done <- f()
	}
	go try()
	return <-done
}

// start starts a workload that waits and returns it, its input, and its threads.
func start(t *testing.T) (wait func() error, say func(words ...string), threads []int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"=workload")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	ready := make(chan error, 1)
	wait = testenv.Start(t, cmd)
	go func() {
		line, err := bufio.NewReader(out).ReadString('\n')
		if line != "ready\n" {
			err = errors.Join(fmt.Errorf("workload says %q", line), err)
		}
		ready <- err
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	if threads, err = tracefs.Threads(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	return wait, func(words ...string) {
		if _, err := fmt.Fprintln(in, strings.Join(words, " ")); err != nil {
			t.Error(err)
		}
		in.Close()
	}, threads
}

func TestFilterFollows(t *testing.T) {
	fs := open(t)
	in := create(t, fs, tracefs.Options{})
	for _, how := range [][]string{
		{},
		{"thread"},
		{"fork"},
		{"session"},
		{"namespaces"},
		{"exec"},
		{"fork", "exec"},
		{"thread", "fork", "thread", "fork", "session", "exec"},
	} {
		t.Run(strings.Join(how, ","), func(t *testing.T) {
			f, inode := subject(t, true)
			r, err := in.Reader()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			wait, say, threads := start(t)
			if err := in.Arm(threads...); err != nil {
				t.Fatal(err)
			}
			// Somebody else reads it too, and is not seen.
			if _, err := f.ReadAt(make([]byte, 1), int64(9*os.Getpagesize())); err != nil {
				t.Fatal(err)
			}
			say(append(how, "read", f.Name())...)
			if err := wait(); err != nil {
				t.Fatal(err)
			}
			got := of(drain(t, r), tracefs.Read, inode, filePages)
			if !got[0] || len(got) != 1 {
				t.Errorf("read pages %v, want the first alone", got)
			}
			if n := r.Rejoined(); n != 0 {
				t.Errorf("Rejoined() = %d, want 0", n)
			}
			if err := in.Reset(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// The kernel takes a process out of the filter when a thread that is not its first calls
// execve; the reader puts it back.
func TestFilterFollowsExecOfThread(t *testing.T) {
	fs := open(t)
	in := create(t, fs, tracefs.Options{})
	f, inode := subject(t, true)
	r, err := in.Reader()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	wait, say, threads := start(t)
	if err := in.Arm(threads...); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- wait()
		r.Stop()
	}()
	r.Wake()
	say("threadexec", "sleep", "fork", "read", f.Name())
	var got []tracefs.Event
	events := make([]tracefs.Event, 100)
	for {
		n, err := r.Read(events)
		got = append(got, events[:n]...)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if p := of(got, tracefs.Read, inode, filePages); !p[0] {
		t.Errorf("read pages %v, want the first", p)
	}
	if n := r.Rejoined(); n != 1 {
		t.Errorf("Rejoined() = %d, want 1", n)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
