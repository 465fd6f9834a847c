// Package nydusd runs the real nydusd for benchmarks: one FUSE mount, with a cache of its own.
package nydusd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Options says what is served.
type Options struct {
	Program   string // nydusd
	Bootstrap string // a bare bootstrap
	// Dir is an existing directory for the mount, the cache and the configuration; the caller's, removed after Close.
	Dir string
	// Backend is the device's backend as nydusd's configuration has it. See [Registry] and [Files].
	Backend map[string]any
	// Prefetch has the files of the bootstrap's prefetch table fetched first.
	Prefetch bool
}

// Registry is a backend for a repository that is spoken to in plain HTTP.
func Registry(host, repository string) map[string]any {
	return map[string]any{"type": "registry", "config": map[string]any{"scheme": "http", "host": host, "repo": repository}}
}

// Files is a backend for blobs that are files, each named by its id.
func Files(dir string) map[string]any {
	return map[string]any{"type": "localfs", "config": map[string]any{"dir": dir}}
}

// Daemon is a running nydusd.
type Daemon struct {
	Mount string // the root of what it serves
	PID   int

	cmd   *exec.Cmd
	ended <-chan struct{}
}

// Start starts nydusd with the cache and prefetch settings of nydus-snapshotter's sample configuration (8 threads, requests of up
// to 1 MiB), but without prefetch_all: what the table names and no more. It returns when the mount is there. The caller closes the Daemon,
// which dies with this process too.
func Start(ctx context.Context, o Options) (*Daemon, error) {
	d := &Daemon{Mount: filepath.Join(o.Dir, "mnt")}
	work, config := filepath.Join(o.Dir, "work"), filepath.Join(o.Dir, "config.json")
	text, err := json.Marshal(map[string]any{
		"device": map[string]any{
			"backend": o.Backend,
			"cache":   map[string]any{"type": "blobcache", "config": map[string]any{"work_dir": work}},
		},
		"mode": "direct", "enable_xattr": true,
		"fs_prefetch": map[string]any{"enable": o.Prefetch, "threads_count": 8, "merging_size": 1 << 20, "prefetch_all": false},
	})
	if err := errors.Join(err, os.Mkdir(d.Mount, 0o700), os.Mkdir(work, 0o700), os.WriteFile(config, text, 0o600)); err != nil {
		return nil, err
	}
	said := &tail{}
	d.cmd = exec.Command(o.Program, "fuse", "--log-level", "warn", "--mountpoint", d.Mount, "--bootstrap", o.Bootstrap, "--config", config, "--rlimit-nofile", "0")
	d.cmd.Stdout, d.cmd.Stderr = said, said
	if d.ended, err = launch(d.cmd); err != nil {
		return nil, err
	}
	d.PID = d.cmd.Process.Pid
	if err := d.wait(ctx, said); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// Close unmounts and ends the daemon. It is called once.
func (d *Daemon) Close() error {
	err := unmount(d.Mount)
	_ = d.cmd.Process.Kill() // on SIGTERM it may hang
	<-d.ended
	return err
}

// launch starts cmd, which dies with this process, and returns a channel that is closed when it has ended.
func launch(cmd *exec.Cmd) (<-chan struct{}, error) {
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	begun, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // the signal comes when the thread that started it ends
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		begun <- err
		if err == nil {
			_ = cmd.Wait() // it is killed
			close(ended)
		}
	}()
	return ended, <-begun
}

// startLimit bounds how long the mount is waited for.
const startLimit = 30 * time.Second

func (d *Daemon) wait(ctx context.Context, said *tail) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(startLimit)
	defer limit.Stop()
	for {
		var st unix.Statfs_t
		if err := unix.Statfs(d.Mount, &st); err == nil && st.Type == unix.FUSE_SUPER_MAGIC {
			return nil
		}
		select {
		case <-tick.C:
		case <-d.ended:
			return fmt.Errorf("nydusd ended: %s", said)
		case <-limit.C:
			return fmt.Errorf("nydusd does not mount: %s", said)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// unmount takes a mount away that may be busy for a moment after its last user has ended; what is not mounted is no error.
func unmount(dir string) (err error) {
	for range 100 {
		err = unix.Unmount(dir, 0)
		if err == nil || errors.Is(err, unix.EINVAL) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(20 * time.Millisecond) //nolint:forbidigo // nothing says when a file is released
	}
	return fmt.Errorf("unmount %s: %w", dir, err)
}

// tail keeps the last bytes of what is written. Safe for concurrent use.
type tail struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(p)
	t.buf.Next(max(0, t.buf.Len()-2000))
	return len(p), nil
}

// String returns what was kept.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}
