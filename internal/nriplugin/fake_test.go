package nriplugin_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/headstart-oci/headstart/internal/nriplugin"
	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

const fakeDigest = "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

// fakeSession is a recording that a test drives.
type fakeSession struct {
	opts        tracer.Options
	ready, done chan struct{}

	mu      sync.Mutex
	reasons []string
	result  tracer.Result
	onStop  func(reason string)
}

func newFakeSession() *fakeSession {
	return &fakeSession{ready: make(chan struct{}), done: make(chan struct{})}
}

func (s *fakeSession) Ready() <-chan struct{} { return s.ready }
func (s *fakeSession) Done() <-chan struct{}  { return s.done }
func (s *fakeSession) Result() tracer.Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.result
}

func (s *fakeSession) Stop(reason string) {
	s.mu.Lock()
	s.reasons = append(s.reasons, reason)
	f := s.onStop
	s.mu.Unlock()
	if f != nil {
		f(reason)
	}
}

func (s *fakeSession) stops() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.reasons...)
}

// arm makes the session ready.
func (s *fakeSession) arm() {
	s.mu.Lock()
	s.result.Armed = time.Now()
	s.mu.Unlock()
	close(s.ready)
}

// end ends the session with a trace of files.
func (s *fakeSession) end(why string, losses []trace.Loss, files ...string) {
	s.mu.Lock()
	s.result.End = why
	s.result.Duration = 5 * time.Millisecond
	s.result.Trace.Losses = losses
	for i, f := range files {
		s.result.Trace.Accesses = append(s.result.Trace.Accesses, trace.Access{
			Path: f, How: trace.Opened | trace.Read, Size: 1000, Elapsed: time.Duration(i), PID: 1,
		})
	}
	s.result.Trace.Events = int64(len(files))
	s.mu.Unlock()
	close(s.done)
}

// world is everything around a plugin.
type world struct {
	t      testing.TB
	plugin *nriplugin.Plugin
	logs   *observer.ObservedLogs

	mu       sync.Mutex
	sessions []*fakeSession
	lists    []*persist.List
	requests []rebuild.Request
	expired  []string

	// start makes the session of a run.
	start func(o tracer.Options) (nriplugin.Session, error)
	// image is what the resolver says.
	image func(container, name string) (nriplugin.Image, error)
	// save and add are what store and queue say.
	save func(*persist.List) error
	add  func(rebuild.Request) (rebuild.Decision, error)
}

func (w *world) Save(l *persist.List, _ persist.SaveOptions) (persist.Saved, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.save != nil {
		if err := w.save(l); err != nil {
			return persist.Saved{}, err
		}
	}
	if err := l.Validate(); err != nil {
		return persist.Saved{}, err
	}
	w.lists = append(w.lists, l)
	return persist.Saved{Native: "/lists/" + l.Container + ".list"}, nil
}

func (w *world) Add(_ context.Context, r rebuild.Request) (rebuild.Decision, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.requests = append(w.requests, r)
	if w.add != nil {
		return w.add(r)
	}
	return rebuild.Decision{Verdict: rebuild.Queued, Target: "oci:/x:y"}, nil
}

func (w *world) Resolve(_ context.Context, container, name string) (nriplugin.Image, error) {
	if w.image != nil {
		return w.image(container, name)
	}
	return nriplugin.Image{Reference: name, Digest: fakeDigest, Platform: "linux/amd64"}, nil
}

func (w *world) session(i int) *fakeSession {
	w.mu.Lock()
	defer w.mu.Unlock()
	if i >= len(w.sessions) {
		w.t.Fatalf("got %d sessions, want more than %d", len(w.sessions), i)
	}
	return w.sessions[i]
}

func (w *world) saved() []*persist.List {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*persist.List(nil), w.lists...)
}

func (w *world) queued() []rebuild.Request {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]rebuild.Request(nil), w.requests...)
}

func (w *world) backend() *nriplugin.Backend {
	core, logs := observer.New(zapcore.DebugLevel)
	w.logs = logs
	return &nriplugin.Backend{
		Start: func(_ context.Context, o tracer.Options) (nriplugin.Session, error) {
			if w.start != nil {
				return w.start(o)
			}
			s := newFakeSession()
			s.opts = o
			s.arm()
			w.mu.Lock()
			w.sessions = append(w.sessions, s)
			w.mu.Unlock()
			return s, nil
		},
		Resolver: w, Store: w, Builds: w, Log: zap.New(core),
	}
}

// open makes a plugin whose configuration is the default one changed by change, and whose hooks wait for a machine that is busy.
func (w *world) open(change func(*nriplugin.Config, *nriplugin.Options)) {
	w.t.Helper()
	c := nriplugin.DefaultConfig()
	c.StartDeadline = 10 * time.Second
	o := nriplugin.Options{
		Own: &c, HookLimit: time.Minute,
		Open: func(nriplugin.Config) (*nriplugin.Backend, error) { return w.backend(), nil },
		Expired: func(hook string) {
			w.mu.Lock()
			w.expired = append(w.expired, hook)
			w.mu.Unlock()
		},
	}
	if change != nil {
		change(&c, &o)
	}
	p, err := nriplugin.New(o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.plugin = p
}

// close closes the plugin, cutting short what still goes on.
func (w *world) close() error {
	return w.plugin.Close(context.Background(), nriplugin.CloseOptions{Flush: 5 * time.Second})
}

// idle waits until no recording is left.
func (w *world) idle() {
	w.t.Helper()
	eventually(w.t, "no recording left", func() bool { return w.plugin.Runs() == 0 })
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited for %s in vain", what)
}

func pod(namespace string, annotations map[string]string) *api.PodSandbox {
	return &api.PodSandbox{Id: "pod", Name: "pod-1", Namespace: namespace, Annotations: annotations}
}

func container(id string, annotations map[string]string) *api.Container {
	a := map[string]string{"io.kubernetes.cri.image-name": "docker.io/library/nginx:latest", "io.kubernetes.cri.container-type": "container"}
	maps.Copy(a, annotations)
	return &api.Container{Id: id, PodSandboxId: "pod", Name: "web", Annotations: a, Pid: 4242, Args: []string{"nginx", "-g"}}
}

func (w *world) startContainer(id string) {
	w.t.Helper()
	if err := w.plugin.StartContainer(context.Background(), pod("default", nil), container(id, nil)); err != nil {
		w.t.Errorf("StartContainer(%s) = %v, want nil", id, err)
	}
}

func (w *world) stopContainer(id string) {
	w.t.Helper()
	if up, err := w.plugin.StopContainer(context.Background(), pod("default", nil), container(id, nil)); err != nil || up != nil {
		w.t.Errorf("StopContainer(%s) = %v, %v, want nil, nil", id, up, err)
	}
}

// lines returns the messages that begin with prefix.
func (w *world) lines(prefix string) []string {
	var found []string
	for _, e := range w.logs.All() {
		if len(e.Message) >= len(prefix) && e.Message[:len(prefix)] == prefix {
			found = append(found, fmt.Sprintf("%s %v", e.Message, e.ContextMap()))
		}
	}
	return found
}

var errFake = errors.New("fake fault")
