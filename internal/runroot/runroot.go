// Package runroot runs a command in a root directory, in mount, process and IPC namespaces of its
// own, and holds it before its first instruction until it is told to go: so that a tracer
// can be armed that misses nothing.
//
// By default the root is an overlay whose lower directory is the given one and whose upper
// one is in memory: what the command writes is gone when it ends, and the root is a file system
// of its own, which fanotify can mark as a whole. The command finds its own /proc, a small
// /dev, the host's /sys (read-only) and network.
//
// With [Options.Layers] the root is that of an image instead: an overlay of its layers, with the user,
// the volumes and the mounts of a container, and the capabilities that containers have.
//
// The held process is this program again, started with [ChildName] as its name: main must call
// [Child] for it.
package runroot

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ChildName is the program name, argument 0, of the held process.
const ChildName = "headstart-runroot"

// Options says what to run and where.
type Options struct {
	Root string   // directory that becomes /
	Args []string // command and arguments; a command without a slash is looked for in PATH, inside Root
	Env  []string // "KEY=value"; without PATH, the usual one is added
	Dir  string   // working directory inside the root; empty: /
	UID  int      // user and group the command runs as
	GID  int
	// InPlace runs on the directory itself instead of an overlay: writes stay.
	InPlace bool

	// Layers are the directories of an image's layers, the lowest first, in overlay's form: a
	// whiteout is a device 0:0, an opaque directory has the attribute trusted.overlay.opaque. They are
	// used in place of Root and are not written to.
	Layers []string
	// Scratch, with Layers, is an empty directory for what the command writes. It stays the caller's.
	Scratch string
	// User, with Layers, is "NAME|UID[:GROUP|GID]", looked up in the image; in place of UID and GID.
	// Without HOME in Env the user's is added.
	User string
	// Volumes, with Layers, are directories of the image that are copied out of it and mounted again
	// over themselves; see [Options.VolumeDir].
	Volumes []string
	// Mounts are mounted last, in order.
	Mounts []Mount
	// NoNetwork gives the command a network with a loopback interface only.
	NoNetwork bool
	// StopSignal is what [Process.End] sends first; 0: SIGTERM.
	StopSignal syscall.Signal

	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// Mount is a file or directory of the host that the command sees at Target.
type Mount struct {
	Source, Target string // absolute; on the host, in the root
	ReadOnly       bool
}

// VolumeDir returns the directory on the host of the i-th volume. It holds what the image holds
// there once [Start] has returned.
func (o *Options) VolumeDir(i int) string {
	return filepath.Join(o.Scratch, "volumes", strconv.Itoa(i))
}

// Process is a command that was started. Release lets it run, and Wait must be called.
// Safe for concurrent use.
type Process struct {
	cmd     *exec.Cmd
	release io.WriteCloser
	once    sync.Once
	done    chan struct{}
	err     error // of the end; read after done
	end     syscall.Signal
}

// spec is what the held process is told.
type spec struct {
	Root, Upper, Dir string
	Args, Env        []string
	UID, GID         int

	Layers, Volumes, VolumeDirs []string
	Scratch, User               string
	Mounts                      []Mount
	NoNetwork                   bool
}

// Start starts the held process and returns when its root is in place and nothing but
// the command is left to be executed. When it fails, nothing is left. Cancelling ctx
// later does nothing: see [Process.End]. It needs root.
func Start(ctx context.Context, o Options) (*Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s, err := o.spec()
	if err != nil {
		return nil, err
	}
	scratch := ""
	if !o.InPlace && s.Layers == nil {
		if scratch, err = os.MkdirTemp("", "headstart-root-*"); err != nil {
			return nil, err
		}
		s.Upper = scratch
	}
	p := &Process{done: make(chan struct{}), end: o.StopSignal}
	if p.end == 0 {
		p.end = unix.SIGTERM
	}
	ready := make(chan error, 1)
	go p.run(o, s, scratch, ready)
	if err := <-ready; err != nil {
		<-p.done
		if o.Layers != nil {
			return nil, fmt.Errorf("run the image: %w", err)
		}
		return nil, fmt.Errorf("run in %s: %w", o.Root, err)
	}
	return p, nil
}

func (o Options) spec() (spec, error) {
	s := spec{Dir: o.Dir, Args: o.Args, Env: o.Env, UID: o.UID, GID: o.GID}
	if len(o.Args) == 0 || o.Args[0] == "" {
		return s, errors.New("no command")
	}
	if s.Dir == "" {
		s.Dir = "/"
	}
	if !strings.HasPrefix(s.Dir, "/") {
		return s, fmt.Errorf("working directory %q is not absolute", s.Dir)
	}
	s.Mounts, s.NoNetwork = o.Mounts, o.NoNetwork
	var err error
	if o.Layers != nil {
		err = o.image(&s)
	} else {
		s.Root, err = directoryAt(o.Root)
	}
	const path = "PATH="
	for _, e := range o.Env {
		if strings.HasPrefix(e, path) {
			return s, err
		}
	}
	s.Env = append(append([]string(nil), o.Env...), path+"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	return s, err
}

// directoryAt returns the path without links of a directory.
func directoryAt(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if path, err = filepath.EvalSymlinks(abs); err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s is no directory", path)
	}
	return path, err
}

// image prepares what only images have.
func (o *Options) image(s *spec) error {
	s.Layers, s.User, s.Volumes = o.Layers, o.User, o.Volumes
	var err error
	if s.Scratch, err = directoryAt(o.Scratch); err != nil {
		return err
	}
	for i := range o.Volumes {
		dir := o.VolumeDir(i)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		s.VolumeDirs = append(s.VolumeDirs, dir)
	}
	return nil
}

// run owns the child from start to end, on a thread that lives as long: the kernel ends
// the child when the thread that made it does.
func (p *Process) run(o Options, s spec, scratch string, ready chan<- error) {
	runtime.LockOSThread()
	defer close(p.done)
	cmd, talk, err := p.spawn(o, s)
	if err == nil {
		answer := listen(talk)
		// What was mounted there left the child's tree with the old root; when this process
		// is killed later, nothing stays behind.
		if answer == nil && scratch != "" && os.Remove(scratch) == nil {
			scratch = ""
		}
		ready <- answer
		err = cmd.Wait()
		if answer != nil {
			err = answer
		}
	} else {
		ready <- err
	}
	if scratch != "" {
		err = errors.Join(err, os.Remove(scratch)) // what was mounted on it went with the namespace
	}
	p.once.Do(func() {
		if p.release != nil {
			err = errors.Join(err, p.release.Close())
		}
	})
	p.err = err
}

// spawn starts the child and sends it its orders. talk yields what it answers.
func (p *Process) spawn(o Options, s spec) (cmd *exec.Cmd, talk *os.File, err error) {
	orders, toChild, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	talk, fromChild, err := os.Pipe()
	if err != nil {
		return nil, nil, errors.Join(err, orders.Close(), toChild.Close())
	}
	cmd = exec.Command("/proc/self/exe")
	cmd.Args = []string{ChildName}
	cmd.Env = []string{"GOMAXPROCS=2"}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = o.Stdin, o.Stdout, o.Stderr
	cmd.ExtraFiles = []*os.File{orders, fromChild}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC,
		Pdeathsig:  unix.SIGKILL,
	}
	if o.NoNetwork {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNET
	}
	// When a grandchild keeps a pipe open, the wait must end all the same.
	cmd.WaitDelay = 2 * time.Second
	err = cmd.Start()
	closed := errors.Join(orders.Close(), fromChild.Close())
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("new mount and process namespaces need root, with CAP_SYS_ADMIN: %w", err)
	}
	if err != nil {
		return nil, nil, errors.Join(err, closed, toChild.Close(), talk.Close())
	}
	p.cmd, p.release = cmd, toChild
	// When this fails the child is gone; its answer or its exit says why.
	_ = json.NewEncoder(toChild).Encode(s)
	return cmd, talk, nil
}

const answerReady = "ready"

// listen waits for the child's one line: ready, or what went wrong.
func listen(talk *os.File) error {
	line, err := bufio.NewReader(io.LimitReader(talk, 4096)).ReadString('\n')
	line = strings.TrimSuffix(line, "\n")
	err = errors.Join(ignoreEOF(err), talk.Close())
	switch {
	case err != nil:
		return err
	case line == "":
		return errors.New("the process ended before it was ready")
	case line != answerReady:
		return errors.New(line)
	}
	return nil
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// PID returns the process id of the held process, later the command's, on the host.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Release lets the command run.
func (p *Process) Release() error {
	var err error
	p.once.Do(func() {
		_, err = p.release.Write([]byte("\n"))
		err = errors.Join(err, p.release.Close())
	})
	return err
}

// Done returns a channel that is closed when the command has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end and returns nil when the command ended with status 0, else an
// *exec.ExitError or what kept it from running.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// End asks the command to end by its stop signal and kills it, with everything it started, after
// grace. One that was not released never runs. End returns when it is gone.
func (p *Process) End(grace time.Duration) {
	p.once.Do(func() { _ = p.release.Close() }) // a pipe's end; the held process sees it and ends
	p.signal(p.end)
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-p.done:
		return
	case <-t.C:
	}
	p.signal(unix.SIGKILL)
	<-p.done
}

func (p *Process) signal(s os.Signal) {
	_ = p.cmd.Process.Signal(s) // an error says that it is gone, which is what is wanted
}
