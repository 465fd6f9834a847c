package lazy

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
)

// Directories that are taken where none are named.
const (
	DefaultStateDir = "/var/lib/headstart/lazy"
	DefaultRunDir   = "/run/headstart"
)

// ClientOptions says which daemon to ask.
type ClientOptions struct {
	// StateDir is the daemon's; empty: [DefaultStateDir]. RunDir has its socket and log; empty: [DefaultRunDir].
	StateDir, RunDir string
	// Command starts a daemon, a process that calls [RunDaemon] for both directories, and reads
	// nothing; empty: this program with the arguments
	// "lazyd --own-cgroup --state-dir StateDir --run-dir RunDir".
	Command []string
	// DaemonArgs are more arguments for that default.
	DaemonArgs []string
	// Version is told to the daemon, for its messages.
	Version string
}

// Client asks a daemon. Safe for concurrent use. It holds nothing between calls.
type Client struct {
	o      ClientOptions
	socket string
}

// NewClient returns a client. It starts nothing.
func NewClient(o ClientOptions) (*Client, error) {
	for _, d := range []struct {
		dir *string
		or  string
	}{{&o.StateDir, DefaultStateDir}, {&o.RunDir, DefaultRunDir}} {
		abs, err := filepath.Abs(cmp.Or(*d.dir, d.or))
		if err != nil {
			return nil, err
		}
		*d.dir = abs
	}
	if len(o.Command) == 0 {
		o.Command = []string{"/proc/self/exe", "lazyd", "--own-cgroup", "--state-dir", o.StateDir, "--run-dir", o.RunDir}
		o.Command = append(o.Command, o.DaemonArgs...)
	}
	return &Client{o: o, socket: socketName(o.StateDir)}, nil
}

// socketName is the name of a daemon's socket in the run directory: one daemon for each state directory.
func socketName(stateDir string) string {
	if real, err := filepath.EvalSymlinks(stateDir); err == nil {
		stateDir = real
	}
	sum := sha256.Sum256([]byte(stateDir))
	return "lazyd-" + hex.EncodeToString(sum[:6]) + ".sock"
}

// throughDir calls f with a name for a socket in dir that is short enough for the kernel (108 bytes), however long dir's is.
func throughDir(dir, name string, f func(path string) error) error {
	d, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer func() { _ = unix.Close(d) }()
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", d, name))
}

// dial connects to the daemon; ErrNoDaemon when nobody listens.
func (c *Client) dial(ctx context.Context) (conn *net.UnixConn, err error) {
	err = throughDir(c.o.RunDir, c.socket, func(path string) error {
		var d net.Dialer
		got, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			conn = got.(*net.UnixConn)
		}
		return err
	})
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("%w for %s", ErrNoDaemon, c.o.StateDir)
	case err != nil:
		return nil, fmt.Errorf("reach the daemon at %s: %w", filepath.Join(c.o.RunDir, c.socket), err)
	}
	return conn, nil
}

// startLimit bounds how long a daemon is waited for that has the state directory and does not listen: it ends.
const startLimit = 15 * time.Second

// connect is dial, and starts a daemon when there is none. Of many clients one starts it.
func (c *Client) connect(ctx context.Context) (*net.UnixConn, error) {
	conn, err := c.dial(ctx)
	if !errors.Is(err, ErrNoDaemon) {
		return conn, err
	}
	if err := os.MkdirAll(c.o.RunDir, 0o700); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(c.o.RunDir, c.base()+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	defer func() { _ = lock.Close() }() // which unlocks it
	deadline := time.Now().Add(startLimit)
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			if conn, err = c.dial(ctx); !errors.Is(err, ErrNoDaemon) {
				return conn, err
			}
			if err = c.start(ctx); err == nil {
				// One that nobody asks for anything ends soon, which may be before this.
				if conn, err = c.dial(ctx); !errors.Is(err, ErrNoDaemon) {
					return conn, err
				}
			}
		}
		switch {
		case errors.Is(err, ErrLocked) && time.Now().After(deadline):
			return nil, fmt.Errorf("%w; it does not listen at %s: was it started with another run directory?", err, filepath.Join(c.o.RunDir, c.socket))
		case !errors.Is(err, ErrLocked) && !errors.Is(err, ErrNoDaemon) && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// base begins the names of the daemon's files in the run directory.
func (c *Client) base() string { return strings.TrimSuffix(c.socket, ".sock") }

// start starts a daemon and waits until it listens.
func (c *Client) start(ctx context.Context) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	log, err := os.OpenFile(filepath.Join(c.o.RunDir, c.base()+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return errors.Join(err, w.Close())
	}
	cmd := exec.Command(c.o.Command[0], c.o.Command[1:]...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = w, log
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	err = cmd.Start()
	if closed := errors.Join(w.Close(), log.Close()); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	go func() { _ = cmd.Wait() }() // it outlives this process, or is reaped here
	defer context.AfterFunc(ctx, func() { _ = r.Close() })()
	line, err := bufio.NewReader(io.LimitReader(r, 1<<20)).ReadBytes('\n')
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var a answer
	if err != nil || json.Unmarshal(line, &a) != nil {
		return fmt.Errorf("the daemon ended without a word: see %s", log.Name())
	}
	if err := a.err(); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	return nil
}

// talk sends one call and returns the answer.
func (c *Client) talk(ctx context.Context, conn *net.UnixConn, q call) (*answer, *os.File, error) {
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	q.Protocol, q.Version = Protocol, c.o.Version
	var a answer
	err := writeMessage(conn, q, nil)
	var f *os.File
	if err == nil {
		f, err = readMessage(conn, &a)
	}
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err != nil:
		err = &lostError{err}
	case a.Protocol != Protocol:
		err = fmt.Errorf("%w: the daemon (%s) speaks protocol %d, this program (%s) %d; unmount all to end it", ErrVersion, a.Version, a.Protocol, c.o.Version, Protocol)
	default:
		err = a.err()
	}
	if err != nil && f != nil {
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return nil, nil, err
	}
	return &a, f, nil
}

// lostError is a connection that ended before its answer came.
type lostError struct{ err error }

func (e *lostError) Error() string {
	return fmt.Sprintf("the daemon ended the conversation: %v", e.err)
}
func (e *lostError) Unwrap() error { return e.err }

// answerLimit is how long a daemon may take to answer what takes no time; one that is starting again syncs and takes over before.
const answerLimit = 30 * time.Second

// answered bounds ctx by answerLimit.
func (c *Client) answered(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, answerLimit, fmt.Errorf("the daemon of %s does not answer within %v: is it stopped? umount(8) unmounts without it", c.o.StateDir, answerLimit))
}

// attempts bounds how often a call is repeated whose daemon died.
const attempts = 5

// retry calls f until the daemon did not die meanwhile.
func retry[T any](ctx context.Context, f func() (T, error)) (v T, err error) {
	for range attempts {
		v, err = f()
		if _, lost := errors.AsType[*lostError](err); !lost || ctx.Err() != nil {
			return v, err
		}
		select {
		case <-ctx.Done():
			return v, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return v, err
}

// Mount mounts what r says at dir in the caller's mount namespace, and starts the daemon if there is none.
// When it returns, the mount can be read. On an error nothing is mounted. dir must be a directory.
func (c *Client) Mount(ctx context.Context, dir string, r Request) (Mount, error) {
	r, err := r.absolute()
	if err == nil {
		err = r.check()
	}
	if err != nil {
		return Mount{}, err
	}
	if dir, err = erofs.Real(dir); err != nil { // by which it can be unmounted, too
		return Mount{}, fmt.Errorf("mount: %w", err)
	}
	files, err := r.files()
	if err != nil {
		return Mount{}, err
	}
	return retry(ctx, func() (Mount, error) {
		return c.mount(ctx, call{Op: opMount, Request: &r, Dir: dir, Files: files})
	})
}

func (c *Client) mount(ctx context.Context, q call) (_ Mount, err error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return Mount{}, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	a, f, err := c.talk(ctx, conn, q)
	if err != nil {
		return Mount{}, err
	}
	if f == nil || a.Mount == nil {
		return Mount{}, fmt.Errorf("%w: no mount came with the answer", ErrVersion)
	}
	if want, _ := ParseDriver(string(q.Request.Driver)); want != DriverAuto && a.Mount.Driver != want {
		return Mount{}, errors.Join(fmt.Errorf("%w: asked for the driver %s, the daemon (%s) took %q; unmount all to end it", ErrVersion, want, a.Version, a.Mount.Driver), f.Close())
	}
	if err := errors.Join(erofs.Attach(f, q.Dir), f.Close()); err != nil {
		return Mount{}, err // the end of the connection ends the mount
	}
	if a, _, err = c.talk(ctx, conn, call{Op: opAttached, Dir: q.Dir}); err == nil && a.Mount != nil {
		return *a.Mount, nil
	}
	// It was attached, and nobody knows whether the daemon has heard so.
	return Mount{}, errors.Join(err, erofs.Unmount(q.Dir, true))
}

// busyLimit is how long Unmount waits for a child of another program that has a file of the mount open between fork and execve.
const busyLimit = 200 * time.Millisecond

// whileBusy calls f again and again while it returns [ErrBusy], until the deadline.
func whileBusy(ctx context.Context, deadline time.Time, f func() error) error {
	for {
		err := f()
		if !errors.Is(err, ErrBusy) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Unmount unmounts dir, which must be where a lazy mount is, in the caller's mount namespace. [ErrBusy] when it is in use and
// lazy is not set; with lazy it disappears at once, and ends with its last user. [ErrNotMounted] for anything else.
// When the mount has ended, what it held is given back before Unmount returns.
func (c *Client) Unmount(ctx context.Context, dir string, lazy bool) error {
	dir, err := erofs.Real(dir) // umount2(2) follows no link at its end, and no other may be there by then
	if err != nil {
		return err
	}
	m, err := c.Find(ctx, dir)
	if err != nil {
		return err
	}
	if err := whileBusy(ctx, time.Now().Add(busyLimit), func() error { return erofs.Unmount(dir, lazy) }); err != nil {
		return err
	}
	if lazy {
		m.Device = 0 // its last user may take any time
	}
	return c.settle(ctx, m.Device)
}

// settle lets the daemon see that a mount is gone. That it cannot be asked is no error: it will see.
func (c *Client) settle(ctx context.Context, device uint64) error {
	ctx, cancel := c.answered(ctx)
	defer cancel()
	conn, err := c.dial(ctx)
	if err != nil {
		return nil
	}
	_, _, err = c.talk(ctx, conn, call{Op: opCheck, Device: device})
	if _, lost := errors.AsType[*lostError](err); lost {
		err = nil
	}
	return errors.Join(err, conn.Close())
}

// Find returns the lazy mount that dir is the root of, in the caller's mount namespace; [ErrNotMounted] when none of this daemon is.
func (c *Client) Find(ctx context.Context, dir string) (Mount, error) {
	device, isEROFS, err := erofs.DeviceOf(dir)
	if err != nil {
		return Mount{}, err
	}
	s, err := c.Status(ctx, false)
	if err != nil && !errors.Is(err, ErrNoDaemon) {
		return Mount{}, err
	}
	for _, m := range slices.Backward(s.Mounts) { // a number that the kernel gave out again is the newest one's
		if m.Device == device && isEROFS == (m.Driver != DriverFUSE) {
			return m, nil
		}
	}
	return Mount{}, fmt.Errorf("%s: %w of %s is there", dir, ErrNotMounted, c.o.StateDir)
}

// Status returns the daemon and its mounts, with what they missed if detail is set; [ErrNoDaemon] when
// none runs. It starts none.
func (c *Client) Status(ctx context.Context, detail bool) (Status, error) {
	ctx, cancel := c.answered(ctx)
	defer cancel()
	return retry(ctx, func() (Status, error) {
		conn, err := c.dial(ctx)
		if err != nil {
			return Status{}, err
		}
		a, _, err := c.talk(ctx, conn, call{Op: opStatus, Detail: detail})
		if err = errors.Join(err, conn.Close()); err != nil {
			return Status{}, err
		}
		if a.Status == nil {
			return Status{}, fmt.Errorf("%w: no status came", ErrVersion)
		}
		return *a.Status, nil
	})
}

// Wait returns when everything of a mount is local, with its last state. It asks for nothing: what is
// fetched, and when, was said when it was mounted. ErrNotMounted when the mount ends before, ErrFailed when it fails.
func (c *Client) Wait(ctx context.Context, device uint64) (Mount, error) {
	return retry(ctx, func() (Mount, error) {
		conn, err := c.dial(ctx)
		if err != nil {
			return Mount{}, err
		}
		a, _, err := c.talk(ctx, conn, call{Op: opWait, Device: device})
		if err = errors.Join(err, conn.Close()); err != nil {
			return Mount{}, err
		}
		if a.Mount == nil {
			return Mount{}, fmt.Errorf("%w: no mount came", ErrVersion)
		}
		return *a.Mount, nil
	})
}
