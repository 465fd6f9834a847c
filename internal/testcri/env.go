// Package testcri stands up a private real containerd, with its shim, runc and
// NRI, and drives it through the CRI as a kubelet does; and a private real
// registry. Tests and the demonstration share it; package critest wraps it for
// tests.
//
//	env, err := testcri.Start(ctx, testcri.Options{
//		Plugins: map[string]string{"02-optimizer-nri-plugin": path},
//	})
//	defer env.Close()
//	err = env.Import(ctx, "docker.io/library/app:latest", image)
//	result, err := env.Run(ctx, testcri.ContainerOptions{Image: "docker.io/library/app:latest"})
//
// The model: an [Env] is one containerd with directories, sockets and a cgroup of
// its own; a [Pod] shares the host's network, so that no CNI is needed; a
// [Container] runs in a pod. It needs root, and installs the tools it runs by
// package tools. What an Env leaves behind when its process is killed, the next
// Start removes.
package testcri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/headstart-oci/headstart/internal/tools"
)

// Namespace is the containerd namespace of everything the CRI does.
const Namespace = "k8s.io"

// pauseRef is the reference of the sandbox image, which Start makes.
const pauseRef = "localhost/headstart/pause:1"

// Options says what an [Env] is made of. The zero value is a containerd without
// NRI plugins.
type Options struct {
	Dir           string            // directory to make the private one in; empty: os.TempDir()
	Plugins       map[string]string // NRI plugins that containerd launches: file name ("02-name") to the program to copy
	PluginConfigs map[string]string // files of NRI's plugin configuration directory: name ("02-name.conf") to content
	Hosts         map[string]string // registry host ("127.0.0.1:5000") to its hosts.toml
	Config        string            // TOML appended to containerd's configuration
	Snapshotter   string            // of all images and containers; empty: overlayfs. What it needs configured, Config says
	Env           []string          // added to containerd's environment
	Debug         bool              // containerd logs at level debug
	Out           io.Writer         // gets what package tools installs, and warnings; nil: nothing
}

// Env is a private containerd. Its methods may be called from several
// goroutines, except Kill9, Up, Restart and Close, of which only one may run at a
// time.
type Env struct {
	id      string
	dir     string
	runDir  string // short, for the shims' sockets; also the record for the next Start
	bins    binaries
	extra   []string // environment
	snaps   string   // the snapshotter
	owner   *os.File // the locked record
	closing sync.Once
	closed  error

	mu     sync.Mutex // guards what follows
	daemon *daemon    // nil when containerd is down
	conn   *grpc.ClientConn
	client *containerd.Client
	pods   int // numbers names
}

// binaries are the programs an Env runs.
type binaries struct{ containerd, runc, pause string }

func findBinaries(ctx context.Context, out io.Writer) (binaries, error) {
	store, err := tools.NewStore(tools.Options{Out: out})
	if err != nil {
		return binaries{}, err
	}
	var b binaries
	if b.containerd, err = store.Ensure(ctx, "containerd"); err != nil {
		return binaries{}, err
	}
	if b.runc, err = store.Ensure(ctx, "runc"); err != nil {
		return binaries{}, err
	}
	b.pause, err = tools.BuildCommand(ctx, "./internal/testcri/pause")
	return b, err
}

// Start starts a containerd and returns when its CRI answers. The caller closes
// the Env. A start that fails leaves nothing behind; its error quotes the end of
// containerd's log. It needs root, and the working directory inside the module.
func Start(ctx context.Context, o Options) (*Env, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("start containerd: needs root, runs as user %d", os.Geteuid())
	}
	if err := reapStale(); err != nil && o.Out != nil {
		// What an earlier process left must not keep this one from starting.
		_, _ = fmt.Fprintln(o.Out, "testcri: clean up after an earlier process:", err)
	}
	bins, err := findBinaries(ctx, o.Out)
	if err != nil {
		return nil, err
	}
	e, err := newEnv(bins, o)
	if err != nil {
		return nil, fmt.Errorf("start containerd: %w", err)
	}
	if err := e.start(ctx, o); err != nil {
		return nil, errors.Join(fmt.Errorf("start containerd: %w", err), e.Close())
	}
	return e, nil
}

func (e *Env) start(ctx context.Context, o Options) error {
	if err := e.writeFiles(o); err != nil {
		return err
	}
	if err := e.Up(ctx); err != nil {
		return err
	}
	img, err := StaticImage(e.bins.pause, nil)
	if err != nil {
		return err
	}
	return e.Import(ctx, pauseRef, img)
}

// Dir returns the private directory. Close removes it.
func (e *Env) Dir() string { return e.dir }

// Address returns the path of containerd's socket, which serves the CRI too.
func (e *Env) Address() string { return filepath.Join(e.dir, "containerd.sock") }

// NRISocket returns the path of the socket that NRI plugins started by hand
// connect to.
func (e *Env) NRISocket() string { return filepath.Join(e.dir, "nri.sock") }

// PluginDir returns the directory of the NRI plugins that containerd launches
// when it starts.
func (e *Env) PluginDir() string { return filepath.Join(e.dir, "plugins") }

// PluginConfigDir returns the directory of the NRI plugins' configurations.
func (e *Env) PluginConfigDir() string { return filepath.Join(e.dir, "plugin-conf") }

// HostsDir returns containerd's directory of registry hosts, one directory with
// a hosts.toml for each.
func (e *Env) HostsDir() string { return filepath.Join(e.dir, "certs.d") }

// LogPath returns the path of containerd's log, which restarts append to.
func (e *Env) LogPath() string { return filepath.Join(e.dir, "containerd.log") }

// Log returns containerd's log so far, or the error of reading it as text.
func (e *Env) Log() string {
	text, err := os.ReadFile(e.LogPath())
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// PID returns the process ID of containerd, or 0 when it is down.
func (e *Env) PID() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.daemon == nil {
		return 0
	}
	return e.daemon.pid
}

// Client returns a client of containerd. It is the Env's: do not close it. It
// dies with containerd, and is another one after Up.
func (e *Env) Client() *containerd.Client {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.client
}

// Runtime returns the client of the CRI's runtime service, for what this package
// has no method for.
func (e *Env) Runtime() runtimeapi.RuntimeServiceClient {
	e.mu.Lock()
	defer e.mu.Unlock()
	return runtimeapi.NewRuntimeServiceClient(e.conn)
}

// Images returns the client of the CRI's image service.
func (e *Env) Images() runtimeapi.ImageServiceClient {
	e.mu.Lock()
	defer e.mu.Unlock()
	return runtimeapi.NewImageServiceClient(e.conn)
}

// Up starts containerd where it is down and returns when its CRI answers.
func (e *Env) Up(ctx context.Context) (err error) {
	if e.PID() != 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	d, err := e.spawn()
	if err != nil {
		return err
	}
	// The socket appears while we try: the default second between tries is long.
	retry := grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.5, MaxDelay: 100 * time.Millisecond}}
	conn, err := grpc.NewClient("unix://"+e.Address(),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(retry))
	if err != nil {
		d.kill()
		return err
	}
	var client *containerd.Client
	if err = waitReady(ctx, conn, d); err == nil {
		client, err = containerd.New(e.Address(), containerd.WithDefaultNamespace(Namespace))
	}
	if err != nil {
		d.kill()
		return errors.Join(fmt.Errorf("%w; the end of its log:\n%s", err, tail(e.Log(), 4096)), conn.Close())
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.daemon, e.conn, e.client = d, conn, client
	return nil
}

// waitReady returns nil once the CRI answers, and an error when containerd ended
// or ctx did.
func waitReady(ctx context.Context, conn *grpc.ClientConn, d *daemon) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	client := runtimeapi.NewRuntimeServiceClient(conn)
	for {
		_, err := client.Status(ctx, &runtimeapi.StatusRequest{})
		if err == nil {
			return nil
		}
		select {
		case <-d.done:
			return fmt.Errorf("containerd ended before it was ready: %w", d.err)
		case <-ctx.Done():
			return fmt.Errorf("containerd is not ready: %w (last answer: %w)", ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// Restart ends containerd by SIGTERM and starts it again. Containers go on
// running.
func (e *Env) Restart(ctx context.Context) error {
	return errors.Join(e.down(func(d *daemon) { d.stop() }), e.Up(ctx))
}

// Kill9 ends containerd by SIGKILL and waits for it. Containers go on running;
// [Env.Up] starts containerd again.
func (e *Env) Kill9() error { return e.down(func(d *daemon) { d.kill() }) }

// down ends containerd by end and drops the connections to it.
func (e *Env) down(end func(*daemon)) error {
	e.mu.Lock()
	d, conn, client := e.daemon, e.conn, e.client
	e.daemon = nil // the closed connections stay: calls on them return errors
	e.mu.Unlock()
	if d == nil {
		return nil
	}
	end(d)
	return errors.Join(client.Close(), conn.Close())
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}
