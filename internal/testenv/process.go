package testenv

import (
	"errors"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Start starts cmd as the leader of a process group of its own and ends the
// whole group when the test does, by SIGKILL, and waits for cmd. The test may
// wait for cmd itself before, but only through the returned function, which
// returns the error of cmd.Wait, any number of times.
func Start(t testing.TB, cmd *exec.Cmd) (wait func() error) {
	t.Helper()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &unix.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.WaitDelay = 10 * time.Second // for pipes that grandchildren hold open
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	var result error
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The group is ended before its leader is waited for: until then nobody
		// else can have its number.
		waitExited(pid)
		_ = unix.Kill(-pid, unix.SIGKILL)
		result = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
	})
	return func() error {
		<-done
		return result
	}
}

// waitExited returns once the child pid has ended, and leaves it to be waited
// for.
func waitExited(pid int) {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
