package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// The test binary is also the tracer (envServer says how it behaves) and a runtime that
// gets killed (envRuntime is its directory).
const (
	envServer  = "HEADSTART_TEST_SERVER"
	envRuntime = "HEADSTART_TEST_RUNTIME"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(envServer); mode != "" {
		os.Exit(serverMain(mode))
	}
	nrilog.Set(quiet{})
	if dir := os.Getenv(envRuntime); dir != "" {
		os.Exit(runtimeMain(dir))
	}
	code := testenv.Checked(m).Run()
	// The plugins that tests killed left their trace instances to the next plugin, which is none here.
	if fs, err := tracefs.Open(); err == nil {
		if err := errors.Join(fs.Clean(), fs.Close()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

// quiet drops what NRI's runtime side logs.
type quiet struct{}

func (quiet) Debugf(context.Context, string, ...any) {}
func (quiet) Infof(context.Context, string, ...any)  {}
func (quiet) Warnf(context.Context, string, ...any)  {}
func (quiet) Errorf(context.Context, string, ...any) {}

// serverMain is a tracer that saw two files. Mode "ready" ends when it is asked to;
// "ready:D" after D by itself; "hang" is never ready.
func serverMain(mode string) int {
	out := bufio.NewWriter(os.Stdout)
	send := func(frames ...stream.Frame) {
		var b []byte
		for _, f := range frames {
			b = stream.Append(b, f)
		}
		_, _ = out.Write(b) // the parent may be gone
		_ = out.Flush()
	}
	asked := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(asked)
	}()
	if mode == "hang" {
		<-asked
		return 1
	}
	_, _ = out.WriteString(stream.Magic)
	send(stream.Ready{Armed: time.Now(), Mark: "filesystem"},
		stream.Touch{ID: 1, Access: trace.Access{Path: "/bin/app", How: trace.Opened | trace.Executed, Size: 1 << 20, PID: 7, Command: "app"}},
		stream.Touch{ID: 2, Access: trace.Access{Path: "/etc/conf", How: trace.Opened | trace.Read, Size: 100, Elapsed: time.Millisecond, PID: 7, Command: "app"}})
	reason := "stop"
	if _, after, ok := strings.Cut(mode, ":"); ok {
		d, err := time.ParseDuration(after)
		if err != nil {
			return 2
		}
		select {
		case <-time.After(d):
			reason = "exit"
		case <-asked:
		}
	} else {
		<-asked
	}
	send(stream.End{Reason: reason, Events: 2, Elapsed: 5 * time.Millisecond})
	return 0
}

// host is a directory with the plugin, its configuration and a tracer, as a machine has them.
type host struct {
	t   testing.TB
	dir string
}

func newHost(t testing.TB, server, config string) *host {
	t.Helper()
	// Unix socket paths are short.
	dir, err := os.MkdirTemp("", "hs-nri-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	h := &host{t, dir}
	for _, d := range []string{"plugins", "conf", "persist"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.write("server", 0o755, fmt.Sprintf("#!/bin/sh\n%s=%s exec %s \"$@\"\n", envServer, server, self(t)))
	h.write("conf/02-optimizer-nri-plugin.conf", 0o644, fmt.Sprintf(
		"persist_dir = %q\nserver_path = %q\nlog_level = \"debug\"\ncontainerd_address = \"/nonexistent\"\n%s",
		h.path("persist"), h.path("server"), config))
	// A copy of its own, so that its processes can be told from others.
	data, err := os.ReadFile(testenv.Binary(t, "optimizer-nri-plugin"))
	if err != nil {
		t.Fatal(err)
	}
	h.write("plugin", 0o755, string(data))
	t.Cleanup(func() { h.killPlugins() })
	return h
}

func (h *host) path(name string) string { return filepath.Join(h.dir, name) }

func (h *host) write(name string, mode os.FileMode, text string) {
	h.t.Helper()
	if err := os.WriteFile(h.path(name), []byte(text), mode); err != nil {
		h.t.Fatal(err)
	}
}

func self(t testing.TB) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// launch puts the plugin where the runtime launches plugins from.
func (h *host) launch() {
	h.t.Helper()
	if err := os.Link(h.path("plugin"), h.path("plugins/02-optimizer-nri-plugin")); err != nil {
		h.t.Fatal(err)
	}
}

// plugins returns the running processes of the host's plugin.
func (h *host) plugins() []int {
	want, err := os.Stat(h.path("plugin"))
	if err != nil {
		return nil // removed
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		h.t.Fatal(err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if exe, err := os.Stat(filepath.Join("/proc", e.Name(), "exe")); err == nil && os.SameFile(exe, want) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// plugin returns the one process of the host's plugin.
func (h *host) plugin() *os.Process {
	h.t.Helper()
	var pids []int
	eventually(h.t, "one plugin", func() bool { pids = h.plugins(); return len(pids) == 1 })
	p, err := os.FindProcess(pids[0])
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = p.Release() })
	return p
}

func (h *host) killPlugins() {
	for _, pid := range h.plugins() {
		if p, err := os.FindProcess(pid); err == nil {
			_ = p.Kill() // it may have ended
			_ = p.Release()
		}
	}
	eventually(h.t, "no plugin", func() bool { return len(h.plugins()) == 0 })
}

func (h *host) log() string {
	data, err := os.ReadFile(h.path("persist/optimizer-nri-plugin.log"))
	if err != nil && !os.IsNotExist(err) {
		h.t.Error(err)
	}
	return string(data)
}

// list returns the text of the native list of a container, or nothing.
func (h *host) list(container string) string {
	names, err := filepath.Glob(h.path("persist/lists/*/*/" + container + ".list"))
	if err != nil {
		h.t.Fatal(err)
	}
	if len(names) != 1 {
		return ""
	}
	data, err := os.ReadFile(names[0])
	if err != nil {
		h.t.Fatal(err)
	}
	return string(data)
}

// runtime is the runtime's side of NRI, with its real timeouts.
type runtime struct {
	*adaptation.Adaptation
	t testing.TB

	mu      sync.Mutex // guards what follows
	calls   []call
	plugins int
}

// call is one request to a plugin, as the runtime saw it.
type call struct {
	op  string
	err error
}

func (r *runtime) RecordPluginInvocation(_, op string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, call{op: op, err: err})
}
func (r *runtime) RecordPluginLatency(string, string, time.Duration)                          {}
func (r *runtime) RecordPluginAdjustments(string, string, *api.ContainerAdjustment, int, int) {}

func (r *runtime) UpdatePluginCount(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.plugins = n
}

// waitPlugin waits until the runtime has a plugin.
func (r *runtime) waitPlugin() {
	r.t.Helper()
	eventually(r.t, "the plugin", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.plugins == 1
	})
}

// count returns how often a plugin was asked for op, and the errors.
func (r *runtime) count(op string) (n int, errs []error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.calls {
		if c.op == op {
			n++
			if c.err != nil {
				errs = append(errs, c.err)
			}
		}
	}
	return n, errs
}

// newRuntime starts the runtime's side in the host's directory; running are containers
// that it has when a plugin comes.
func newRuntime(t testing.TB, dir string, running ...*api.Container) (*runtime, error) {
	r := &runtime{t: t}
	a, err := adaptation.New("test", "v2.4.2",
		func(ctx context.Context, cb adaptation.SyncCB) error { _, err := cb(ctx, nil, running); return err },
		func(context.Context, []*adaptation.ContainerUpdate) ([]*adaptation.ContainerUpdate, error) {
			return nil, nil
		},
		adaptation.WithPluginPath(filepath.Join(dir, "plugins")),
		adaptation.WithPluginConfigPath(filepath.Join(dir, "conf")),
		adaptation.WithSocketPath(filepath.Join(dir, "nri.sock")),
		adaptation.WithMetrics(r))
	if err != nil {
		return nil, err
	}
	r.Adaptation = a
	return r, a.Start()
}

func (h *host) runtime(running ...*api.Container) *runtime {
	h.t.Helper()
	r, err := newRuntime(h.t, h.dir, running...)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(r.Stop)
	return r
}

// noProcess is no process: Linux numbers them to 2^22 at most (PID_MAX_LIMIT).
const noProcess = 1<<22 + 1

func testContainer(id string) *api.Container {
	return &api.Container{
		Id: id, PodSandboxId: "pod", Name: "app", Pid: noProcess, Args: []string{"app"},
		Annotations: map[string]string{"io.kubernetes.cri.image-name": "docker.io/library/app:latest"},
	}
}

func testPod() *api.PodSandbox { return &api.PodSandbox{Id: "pod", Name: "pod", Namespace: "default"} }

// start is the container's start; it returns how long the plugins held it.
func (r *runtime) start(id string) time.Duration {
	r.t.Helper()
	began := time.Now()
	if err := r.StartContainer(context.Background(), &api.StartContainerRequest{Pod: testPod(), Container: testContainer(id)}); err != nil {
		r.t.Errorf("the start of %s fails: %v", id, err)
	}
	return time.Since(began)
}

func (r *runtime) stop(id string) {
	r.t.Helper()
	if _, err := r.StopContainer(context.Background(), &api.StopContainerRequest{Pod: testPod(), Container: testContainer(id)}); err != nil {
		r.t.Errorf("the stop of %s fails: %v", id, err)
	}
}

// wantNoErrors checks that the runtime saw no fault of the plugin.
func (r *runtime) wantNoErrors() {
	r.t.Helper()
	for _, op := range []string{"Configure", "Synchronize", "StartContainer", "StopContainer"} {
		if _, errs := r.count(op); len(errs) > 0 {
			r.t.Errorf("%s: %v", op, errs)
		}
	}
}

// runtimeMain is a runtime that starts one container, says so, and waits to be killed.
func runtimeMain(dir string) int {
	r, err := newRuntime(nil, dir)
	if err == nil {
		err = r.StartContainer(context.Background(), &api.StartContainerRequest{Pod: testPod(), Container: testContainer("c1")})
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("started")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited for %s in vain", what)
}

// proxy stands between the plugin and NRI's socket: the runtime's side does not close the
// connections of plugins that were started by hand when it is stopped inside a process.
type proxy struct {
	t     testing.TB
	l     net.Listener
	to    string
	relay sync.WaitGroup

	mu    sync.Mutex // guards conns
	conns []net.Conn
}

// proxy listens on the socket "proxy.sock".
func (h *host) proxy() *proxy {
	h.t.Helper()
	l, err := net.Listen("unix", h.path("proxy.sock"))
	if err != nil {
		h.t.Fatal(err)
	}
	p := &proxy{t: h.t, l: l, to: h.path("nri.sock")}
	p.relay.Go(p.accept)
	h.t.Cleanup(func() {
		_ = l.Close() // read from only
		p.cut()
		p.relay.Wait()
	})
	return p
}

func (p *proxy) accept() {
	for {
		a, err := p.l.Accept()
		if err != nil {
			return
		}
		b, err := net.Dial("unix", p.to)
		if err != nil {
			_ = a.Close() // as if nobody listened
			continue
		}
		p.mu.Lock()
		p.conns = append(p.conns, a, b)
		p.mu.Unlock()
		for _, c := range [][2]net.Conn{{a, b}, {b, a}} {
			p.relay.Go(func() {
				_, _ = io.Copy(c[0], c[1]) // until one is closed
				_ = c[0].Close()
			})
		}
	}
}

// cut ends all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		_ = c.Close() // may be closed
	}
	p.conns = nil
}

// byHand starts the plugin by hand; wait returns its stderr when it has ended.
func (h *host) byHand(args ...string) (p *os.Process, wait func() (string, error)) {
	h.t.Helper()
	cmd := exec.Command(h.path("plugin"), args...)
	var out strings.Builder
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	var once sync.Once
	var err error
	wait = func() (string, error) {
		once.Do(func() { err = cmd.Wait() })
		return out.String(), err
	}
	h.t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_, _ = wait()
	})
	return cmd.Process, wait
}
