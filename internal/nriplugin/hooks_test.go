package nriplugin_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/nriplugin"
	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestRunIsSavedQueuedAndLoggedOnce(t *testing.T) {
	w := &world{t: t}
	w.open(func(c *nriplugin.Config, _ *nriplugin.Options) { c.Timeout, c.IdleTimeout = time.Minute, time.Second })
	began := time.Now()
	w.startContainer("c1")
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("the hook took %v", d)
	}
	s := w.session(0)
	if s.opts.PID != 4242 || s.opts.Timeout != time.Minute || s.opts.Idle != time.Second || s.opts.Server != nriplugin.DefaultServerPath {
		t.Errorf("tracer got %+v", s.opts)
	}
	s.end("exit", nil, "/bin/nginx", "/etc/nginx.conf")
	w.idle()
	lists := w.saved()
	if len(lists) != 1 {
		t.Fatalf("%d lists, want 1", len(lists))
	}
	want := &persist.List{
		Reference: "docker.io/library/nginx:latest", Digest: fakeDigest, Platform: "linux/amd64", Container: "c1",
		Name: "web", Pod: "pod-1", Namespace: "default", Command: []string{"nginx", "-g"}, Engine: "fanotify", Grade: "file",
		Started: s.result.Armed, Duration: 5 * time.Millisecond, End: "exit", Trace: s.result.Trace,
	}
	if diff := cmp.Diff(want, lists[0]); diff != "" {
		t.Errorf("list (-want +got):\n%s", diff)
	}
	reqs := w.queued()
	if len(reqs) != 1 || reqs[0].List != "/lists/c1.list" || reqs[0].Image.Digest != fakeDigest || reqs[0].ListHash != want.ContentHash() {
		t.Errorf("queued %+v", reqs)
	}
	if got := reqs[0].Recording; got.Files != 2 || got.Bytes != 2000 || got.ReadFiles != 2 || got.End != "exit" {
		t.Errorf("recording %+v", got)
	}
	lines := w.lines("recorded docker.io/library/nginx:latest: read 2 files (2.0 KiB) in 5ms until exit; lost nothing; rebuild queued for oci:/x:y")
	if len(lines) != 1 || len(w.lines("")) != 1 {
		t.Errorf("log: %q", w.lines(""))
	}
	w.stopContainer("c1") // long over
	if err := w.close(); err != nil {
		t.Error(err)
	}
}

func TestHookReturnsByTheDeadline(t *testing.T) {
	forever := make(chan struct{})
	defer close(forever)
	for name, tc := range map[string]struct {
		start func(tracer.Options) (nriplugin.Session, error)
		min   time.Duration // the hook must have waited so long
		line  string
		stuck bool
	}{
		"start blocks": {func(tracer.Options) (nriplugin.Session, error) { <-forever; return nil, errFake }, 50 * time.Millisecond, "", true},
		"never ready": {func(tracer.Options) (nriplugin.Session, error) {
			s := newFakeSession()
			s.onStop = func(string) { s.end("stop", nil) }
			return s, nil
		}, 50 * time.Millisecond, "not recorded: the tracer ended before it was ready", false},
		"start fails":  {func(tracer.Options) (nriplugin.Session, error) { return nil, errFake }, 0, "not recorded: fake fault", false},
		"start panics": {func(tracer.Options) (nriplugin.Session, error) { panic("oh") }, 0, "panic in a recording", false},
		"dies before it is ready": {func(tracer.Options) (nriplugin.Session, error) {
			s := newFakeSession()
			s.result.Err = errFake
			s.end("killed", nil)
			return s, nil
		}, 0, "not recorded: fake fault", false},
	} {
		t.Run(name, func(t *testing.T) {
			w := &world{t: t, start: tc.start}
			w.open(func(c *nriplugin.Config, _ *nriplugin.Options) { c.StartDeadline = 50 * time.Millisecond })
			began := time.Now()
			w.startContainer("c1")
			if d := time.Since(began); d < tc.min || d > 5*time.Second {
				t.Errorf("the hook took %v, want about %v", d, tc.min)
			}
			w.stopContainer("c1")
			err := w.plugin.Close(context.Background(), nriplugin.CloseOptions{Flush: 200 * time.Millisecond})
			if tc.stuck != (err != nil) {
				t.Errorf("Close() = %v", err)
			}
			if tc.line != "" && len(w.lines(tc.line)) != 1 {
				t.Errorf("log: %q, want %q", w.lines(""), tc.line)
			}
			if len(w.saved()) > 0 || len(w.queued()) > 0 {
				t.Errorf("saved %d lists, queued %d", len(w.saved()), len(w.queued()))
			}
		})
	}
}

func TestLateTracerIsALoss(t *testing.T) {
	s := newFakeSession()
	w := &world{t: t, start: func(tracer.Options) (nriplugin.Session, error) { return s, nil }}
	w.open(func(c *nriplugin.Config, _ *nriplugin.Options) { c.StartDeadline = 20 * time.Millisecond })
	w.startContainer("c1")
	s.arm()
	s.end("exit", nil, "/bin/sh")
	w.idle()
	lists := w.saved()
	if len(lists) != 1 || len(lists[0].Losses) != 1 || lists[0].Losses[0].Reason != "late" || !strings.Contains(lists[0].Losses[0].Detail, "the tracer was ready after") {
		t.Fatalf("lists %+v", lists)
	}
	if len(w.queued()) != 0 || len(w.lines("recorded ")) != 1 || !strings.Contains(w.lines("recorded ")[0], "rebuild not queued: the list is incomplete") {
		t.Errorf("queued %d, log %q", len(w.queued()), w.lines("recorded "))
	}
	if err := w.close(); err != nil {
		t.Error(err)
	}
}

// TestLateTracerOfAShortRun has tracers that are ready too late, and over before anybody looks: that they were late counts.
func TestLateTracerOfAShortRun(t *testing.T) {
	for i := range 10 {
		release := make(chan struct{})
		w := &world{t: t, start: func(tracer.Options) (nriplugin.Session, error) {
			<-release
			s := newFakeSession()
			s.arm()
			s.end("exit", nil, "/bin/sh")
			return s, nil
		}}
		w.open(func(c *nriplugin.Config, _ *nriplugin.Options) { c.StartDeadline = time.Millisecond })
		w.startContainer("c1")
		close(release)
		w.idle()
		if lists := w.saved(); len(lists) != 1 || len(lists[0].Losses) != 1 || !strings.Contains(lists[0].Losses[0].Detail, "the tracer was ready after") {
			t.Errorf("run %d: lists %+v", i, lists)
		}
		if err := w.close(); err != nil {
			t.Error(err)
		}
	}
}

// TestLateTracerThatMissedNothing has a start that went on without its tracer, which was armed before the container's
// command began all the same.
func TestLateTracerThatMissedNothing(t *testing.T) {
	s := newFakeSession()
	s.result.Early = true
	w := &world{t: t, start: func(tracer.Options) (nriplugin.Session, error) { return s, nil }}
	w.open(func(c *nriplugin.Config, _ *nriplugin.Options) { c.StartDeadline = 20 * time.Millisecond })
	w.startContainer("c1")
	s.arm()
	s.end("exit", nil, "/bin/sh")
	w.idle()
	if lists := w.saved(); len(lists) != 1 || !lists[0].Complete() || len(w.queued()) != 1 {
		t.Errorf("lists %+v, queued %d; want a complete one that is built from", lists, len(w.queued()))
	}
	if err := w.close(); err != nil {
		t.Error(err)
	}
}

func TestLossIsKeptNotBuilt(t *testing.T) {
	w := &world{t: t}
	w.open(nil)
	w.startContainer("c1")
	w.session(0).end("exit", []trace.Loss{{Reason: "overflow", Count: -1, Detail: "queue"}}, "/a")
	w.idle()
	if len(w.saved()) != 1 || len(w.queued()) != 0 {
		t.Errorf("%d saved, %d queued, want 1, 0", len(w.saved()), len(w.queued()))
	}
	if l := w.lines("recorded "); len(l) != 1 || !strings.Contains(l[0], "lost overflow: unknown number (queue)") {
		t.Errorf("log %q", l)
	}
	if err := w.close(); err != nil {
		t.Error(err)
	}
}

// TestContainersOfOneImage has two at once, one that stops while the other runs, an
// unknown one that stops, and an id that starts again.
func TestContainersOfOneImage(t *testing.T) {
	w := &world{t: t}
	w.open(nil)
	w.stopContainer("unknown")
	w.startContainer("a")
	w.startContainer("b")
	w.stopContainer("a")
	eventually(t, "a's stop", func() bool { return len(w.session(0).stops()) == 1 })
	w.stopContainer("a") // again
	if got := w.session(1).stops(); len(got) != 0 {
		t.Errorf("b was stopped: %v", got)
	}
	w.startContainer("b") // the same id
	eventually(t, "the first b's stop", func() bool { return len(w.session(1).stops()) == 1 })
	w.session(0).end("stop", nil, "/a")
	w.session(1).end("stop", nil, "/b1")
	eventually(t, "two lists", func() bool { return len(w.saved()) == 2 })
	w.stopContainer("b")
	eventually(t, "the second b's stop", func() bool { return len(w.session(2).stops()) == 1 })
	w.session(2).end("stop", nil, "/b2")
	w.idle()
	var got []string
	for _, l := range w.saved() {
		got = append(got, l.Container+l.Accesses[0].Path)
	}
	// The first two may be saved in either order.
	if len(got) != 3 || got[2] != "b/b2" {
		t.Errorf("saved %v", got)
	}
	if s := w.session(0).stops(); len(s) != 1 || s[0] != "stop" {
		t.Errorf("stops %v, want one", s)
	}
	if err := w.close(); err != nil {
		t.Error(err)
	}
}

func TestStopBeforeTheSessionIsThere(t *testing.T) {
	s := newFakeSession()
	s.arm()
	s.onStop = func(why string) { s.end(why, nil, "/x") }
	gate := make(chan struct{})
	w := &world{t: t, start: func(tracer.Options) (nriplugin.Session, error) { <-gate; return s, nil }}
	w.open(func(c *nriplugin.Config, _ *nriplugin.Options) { c.StartDeadline = 10 * time.Millisecond })
	w.startContainer("c1")
	w.stopContainer("c1")
	close(gate)
	w.idle()
	if l := w.saved(); len(l) != 1 || l[0].End != "stop" {
		t.Errorf("saved %+v", l)
	}
	if err := w.close(); err != nil {
		t.Error(err)
	}
}

func TestWhichContainers(t *testing.T) {
	for name, tc := range map[string]struct {
		images, namespaces []string
		pod, ctr           map[string]string
		pid                uint32
		want               bool
		line               string
	}{
		"all":                    {want: true},
		"sandbox":                {ctr: map[string]string{"io.kubernetes.cri.container-type": "sandbox"}, line: "sandbox"},
		"no pid":                 {pid: ^uint32(0), line: "no process id"},
		"familiar":               {images: []string{"nginx"}, want: true},
		"familiar tag":           {images: []string{"nginx:latest"}, want: true},
		"canonical":              {images: []string{"docker.io/library/nginx:latest"}, want: true},
		"glob over slashes":      {images: []string{"docker.io/*"}, want: true},
		"glob":                   {images: []string{"other", "ngin?:la*"}, want: true},
		"not a regexp":           {images: []string{"docker.io.library.nginx:latest"}, line: "is not in the list"},
		"other image":            {images: []string{"redis*"}, line: `image "docker.io/library/nginx:latest" is not in the list`},
		"namespace":              {namespaces: []string{"def*"}, want: true},
		"other namespace":        {namespaces: []string{"kube-*"}, line: `namespace "default" is not in the list`},
		"pod says no":            {pod: map[string]string{"headstart.dev/trace": "false"}, line: "annotation headstart.dev/trace says so"},
		"pod says yes":           {images: []string{"redis"}, pod: map[string]string{"headstart.dev/trace": "true"}, want: true},
		"container over pod":     {pod: map[string]string{"headstart.dev/trace": "false"}, ctr: map[string]string{"headstart.dev/trace": "1"}, want: true},
		"one container of a pod": {pod: map[string]string{"headstart.dev/trace": "false", "headstart.dev/trace.web": "true"}, want: true},
		"another container":      {pod: map[string]string{"headstart.dev/trace": "false", "headstart.dev/trace.db": "true"}, line: "says so"},
		"nonsense":               {pod: map[string]string{"headstart.dev/trace": "maybe"}, want: true, line: `got "maybe", want true or false`},
	} {
		t.Run(name, func(t *testing.T) {
			w := &world{t: t}
			w.open(func(c *nriplugin.Config, _ *nriplugin.Options) { c.Images, c.Namespaces = tc.images, tc.namespaces })
			ctr := container("c1", tc.ctr)
			if tc.pid != 0 {
				ctr.Pid = 0
			}
			if err := w.plugin.StartContainer(context.Background(), pod("default", tc.pod), ctr); err != nil {
				t.Error(err)
			}
			if got := w.plugin.Runs() == 1; got != tc.want {
				t.Errorf("recorded: %v, want %v", got, tc.want)
			}
			if tc.want {
				w.session(0).end("exit", nil)
			}
			if err := w.close(); err != nil {
				t.Error(err)
			}
			if all := strings.Join(w.lines(""), "\n"); !strings.Contains(all, tc.line) {
				t.Errorf("log %q, want %q", all, tc.line)
			}
		})
	}
}

func TestSynchronize(t *testing.T) {
	w := &world{t: t}
	w.open(nil)
	w.startContainer("a")
	w.startContainer("b")
	running := func(id string) *api.Container {
		c := container(id, nil)
		c.State = api.ContainerState_CONTAINER_RUNNING
		return c
	}
	gone := container("b", nil)
	gone.State = api.ContainerState_CONTAINER_STOPPED
	up, err := w.plugin.Synchronize(context.Background(), nil, []*api.Container{running("a"), gone, running("old1"), running("old2")})
	if err != nil || up != nil {
		t.Errorf("Synchronize() = %v, %v", up, err)
	}
	eventually(t, "b's stop", func() bool { return len(w.session(1).stops()) == 1 })
	if s := w.session(0).stops(); len(s) != 0 {
		t.Errorf("a was stopped: %v", s)
	}
	w.stopContainer("old1") // a stop without a start
	w.session(0).end("exit", nil, "/a")
	w.session(1).end("stop", nil, "/b")
	if err := w.close(); err != nil {
		t.Error(err)
	}
	if l := w.lines("containers run already"); len(l) != 1 || !strings.Contains(l[0], "containers:2") {
		t.Errorf("log %q", l)
	}
	complete := map[string]bool{}
	for _, l := range w.saved() {
		complete[l.Container] = l.Complete()
	}
	if len(complete) != 2 || !complete["a"] || complete["b"] { // of b nobody knows whether it ended
		t.Errorf("lists that are complete: %v, want a's and not b's", complete)
	}
}

func TestImageThatCannotBeAskedFor(t *testing.T) {
	for name, tc := range map[string]struct {
		image func(asked int) (nriplugin.Image, error)
		queue bool
		line  string
	}{
		"containerd down": {func(int) (nriplugin.Image, error) { return nriplugin.Image{}, errFake }, false, "the image's digest is not known: fake fault"},
		"up again at the end": {func(n int) (nriplugin.Image, error) {
			if n == 1 {
				return nriplugin.Image{}, errFake
			}
			return nriplugin.Image{Reference: "docker.io/library/nginx:latest", Digest: fakeDigest, Platform: "linux/arm64/v8"}, nil
		}, true, "rebuild queued"},
		"optimized already": {func(int) (nriplugin.Image, error) {
			return nriplugin.Image{Reference: "x", Digest: fakeDigest, Optimized: true}, nil
		}, false, "is a Nydus image already"},
		"panics": {func(int) (nriplugin.Image, error) { panic("oh") }, false, "panic: oh"},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			asked := 0
			w := &world{t: t, image: func(_, name string) (nriplugin.Image, error) {
				mu.Lock()
				asked++
				n := asked
				mu.Unlock()
				return tc.image(n)
			}}
			w.open(nil)
			w.startContainer("c1")
			w.session(0).end("exit", nil, "/a")
			w.idle()
			if err := w.close(); err != nil {
				t.Error(err)
			}
			if len(w.saved()) != 1 || (len(w.queued()) == 1) != tc.queue {
				t.Errorf("%d lists, %d queued", len(w.saved()), len(w.queued()))
			}
			if w.saved()[0].Reference == "" || w.saved()[0].Platform == "" {
				t.Errorf("list %+v", w.saved()[0])
			}
			if l := w.lines("recorded "); len(l) != 1 || !strings.Contains(l[0], tc.line) {
				t.Errorf("log %q, want %q", l, tc.line)
			}
		})
	}
}

func TestDiskFullIsOneLine(t *testing.T) {
	w := &world{t: t, save: func(*persist.List) error { return errFake }}
	w.open(nil)
	w.startContainer("c1")
	w.session(0).end("exit", nil, "/a")
	w.idle()
	if l := w.lines("recorded "); len(l) != 1 || !strings.Contains(l[0], "not queued: the list was not saved") || !strings.Contains(l[0], "fake fault") {
		t.Errorf("log %q", l)
	}
	w2 := &world{t: t, add: func(rebuild.Request) (rebuild.Decision, error) { return rebuild.Decision{}, errFake }}
	w2.open(nil)
	w2.startContainer("c1")
	w2.session(0).end("exit", nil, "/a")
	w2.idle()
	if l := w2.lines("recorded "); len(l) != 1 || !strings.Contains(l[0], "rebuild not queued: fake fault") {
		t.Errorf("log %q", l)
	}
	for _, w := range []*world{w, w2} {
		if err := w.close(); err != nil {
			t.Error(err)
		}
	}
}

// TestCloseSavesWhatGoesOn ends the plugin while one container runs and one was stopped.
func TestCloseSavesWhatGoesOn(t *testing.T) {
	w := &world{t: t}
	w.open(nil)
	w.startContainer("a")
	w.startContainer("b")
	for i := range 2 {
		s := w.session(i)
		s.onStop = func(why string) { time.AfterFunc(20*time.Millisecond, func() { s.end(why, nil, "/x") }) }
	}
	w.stopContainer("b")
	if err := w.close(); err != nil {
		t.Error(err)
	}
	if len(w.saved()) != 2 || len(w.queued()) != 1 {
		t.Fatalf("%d lists, %d queued, want 2, 1", len(w.saved()), len(w.queued()))
	}
	for _, l := range w.saved() {
		if want := l.Container == "b"; l.Complete() != want || l.End != "stop" {
			t.Errorf("%s: complete %v, end %s", l.Container, l.Complete(), l.End)
		}
	}
	// Hooks after the end do nothing.
	w.startContainer("c")
	w.stopContainer("c")
	if w.plugin.Runs() != 0 {
		t.Error("a closed plugin records")
	}
}

func TestWatchdogSeesAHookThatHangs(t *testing.T) {
	w := &world{t: t, start: func(tracer.Options) (nriplugin.Session, error) {
		s := newFakeSession()
		s.onStop = func(string) { s.end("stop", nil) }
		return s, nil
	}}
	w.open(func(c *nriplugin.Config, o *nriplugin.Options) {
		c.StartDeadline = 300 * time.Millisecond
		o.HookLimit = 30 * time.Millisecond
	})
	w.startContainer("c1")
	w.mu.Lock()
	if len(w.expired) != 1 || w.expired[0] != "StartContainer" {
		t.Errorf("expired %v, want StartContainer", w.expired)
	}
	w.mu.Unlock()
	w.stopContainer("c1")
	if err := w.close(); err != nil {
		t.Error(err)
	}
}

// TestFiveHundredRunsLeaveNothing starts and ends many containers from several goroutines.
func TestFiveHundredRunsLeaveNothing(t *testing.T) {
	before, err := testenv.TakeSnapshot()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t}
	w.start = func(o tracer.Options) (nriplugin.Session, error) {
		s := newFakeSession()
		s.arm()
		s.onStop = func(why string) { s.end(why, nil, "/a", "/b") }
		return s, nil
	}
	w.open(nil)
	var wg sync.WaitGroup
	for g := range 10 {
		wg.Go(func() {
			for i := range 50 {
				id := fmt.Sprintf("c-%d-%d", g, i)
				w.startContainer(id)
				w.stopContainer(id)
			}
		})
	}
	wg.Wait()
	w.idle()
	if len(w.saved()) != 500 {
		t.Errorf("%d lists, want 500", len(w.saved()))
	}
	if err := before.Wait(5 * time.Second); err != nil {
		t.Error(err)
	}
	if err := w.close(); err != nil {
		t.Error(err)
	}
}
