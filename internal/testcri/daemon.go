package testcri

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// stopTimeout is how long a daemon may take to end on SIGTERM.
const stopTimeout = 10 * time.Second

// daemon is a process that this one started and waits for.
type daemon struct {
	cmd  *exec.Cmd
	pid  int
	done chan struct{} // closed when the process has ended
	err  error         // of Wait, after done
}

// startDaemon starts cmd in a process group of its own. The kernel kills it when
// this process dies: that signal is sent when the *thread* that started the
// child ends, so one thread is kept for the child's life.
func startDaemon(cmd *exec.Cmd) (*daemon, error) {
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	d := &daemon{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if err == nil {
			d.pid = cmd.Process.Pid
		}
		started <- err
		if err == nil {
			d.err = cmd.Wait()
			close(d.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return d, nil
}

func (d *daemon) kill() {
	_ = d.cmd.Process.Kill() // it may have ended
	<-d.done
}

func (d *daemon) stop() {
	_ = d.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-d.done:
	case <-time.After(stopTimeout):
		d.kill()
	}
}

// spawn starts containerd, with its output appended to the log.
func (e *Env) spawn() (_ *daemon, err error) {
	log, err := os.OpenFile(e.LogPath(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	cmd := exec.Command(e.bins.containerd, "--config", e.configPath())
	cmd.Dir = e.dir
	cmd.Stdout, cmd.Stderr = log, log
	// containerd looks for its shim in PATH; the shim for runc's path in its options.
	path := filepath.Dir(e.bins.containerd) + string(os.PathListSeparator) + os.Getenv("PATH")
	cmd.Env = append(os.Environ(), "PATH="+path, marker+"="+e.id)
	cmd.Env = append(cmd.Env, e.extra...)
	d, err := startDaemon(cmd)
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", e.bins.containerd, err)
	}
	return d, nil
}
