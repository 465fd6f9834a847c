package nriplugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/internal/creation"
	"github.com/headstart-oci/headstart/internal/metrics"
	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// Bounds of one run's steps; none of them is inside a hook.
const (
	// readyLimit is when a tracer that is not ready is given up. Its list would have
	// missed the start anyway.
	readyLimit = 10 * time.Second
	// endLimit is how long a tracer that was told to end may take to hand over its trace.
	endLimit = 30 * time.Second
	// resolveLimit bounds each question to containerd.
	resolveLimit = 10 * time.Second
	// queueLimit bounds the wait for another process that changes the queue.
	queueLimit = 10 * time.Second
)

// run is one start of one container, from the hook to the line in the log.
type run struct {
	plugin   *Plugin
	settings *settings

	id, name, pod, namespace string
	image                    string // as the runtime names it, may be empty
	args                     []string
	pid                      int
	volumes                  []creation.Volume
	until                    limits

	free     chan struct{} // closed when nothing is left to wait for: armed, or failed
	freeOnce func()
	released chan struct{} // closed when the hook is over
	stopping chan struct{} // closed by the first stop

	mu      sync.Mutex // guards what follows
	session Session
	reason  string        // of the first stop; empty: none
	armed   bool          // ready was seen
	held    time.Duration // how long the hook waited in vain; 0: it did not
	cutOff  string        // why it was ended before the container did; "": it was not
	began   time.Time
	late    time.Duration // from began to armed, when the hook did not wait for it
}

func newRun(p *Plugin, s *settings, pod *api.PodSandbox, ctr *api.Container) *run {
	free := make(chan struct{})
	r := &run{
		plugin: p, settings: s,
		id: ctr.GetId(), name: ctr.GetName(), pod: pod.GetName(), namespace: pod.GetNamespace(),
		image: ctr.GetAnnotations()[annotationImage],
		args:  slices.Clone(ctr.GetArgs()),
		pid:   int(ctr.GetPid()), volumes: volumes(ctr),
		free: free, freeOnce: sync.OnceFunc(func() { close(free) }),
		released: make(chan struct{}),
		stopping: make(chan struct{}),
		began:    time.Now(),
	}
	return r
}

// hold keeps the hook until the tracer is ready, at most d.
func (r *run) hold(d time.Duration) {
	defer close(r.released)
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-r.free:
	case <-t.C:
		r.mu.Lock()
		if !r.armed {
			r.held = time.Since(r.began)
			r.plugin.o.Metrics.Late()
		}
		r.mu.Unlock()
	}
}

// stop asks the recording to end; it does not block.
func (r *run) stop(reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reason != "" {
		return
	}
	r.reason = reason
	close(r.stopping)
	if s := r.session; s != nil {
		// Not in the hook's goroutine: the contract is ours to keep, not the session's.
		r.plugin.work.Go(func() { s.Stop(reason) })
	}
}

// cut ends the recording before it is over, for this reason: what would have followed is lost.
func (r *run) cut(why string) {
	r.mu.Lock()
	if r.reason == "" {
		r.cutOff = why
	}
	r.mu.Unlock()
	r.stop("stop")
}

// attach makes s the run's session and hands it a stop that came before it.
func (r *run) attach(s Session) {
	r.mu.Lock()
	r.session = s
	reason := r.reason
	r.mu.Unlock()
	if reason != "" {
		s.Stop(reason)
	}
}

// main is the run's goroutine.
func (r *run) main() {
	log := r.settings.backend.Log.With(zap.String("container", r.id))
	defer r.plugin.work.Done()
	defer r.plugin.forget(r)
	defer r.plugin.o.Metrics.Ended()
	defer r.freeOnce()
	defer func() {
		if v := recover(); v != nil {
			log.Error("panic in a recording", zap.Any("panic", v), zap.ByteString("stack", debug.Stack()))
		}
	}()
	c := &r.settings.cfg
	ctx, end := context.WithCancel(context.Background())
	defer end()
	created := r.created(ctx)
	// The session ends by its own rules or by Stop; a context would kill it with its trace.
	s, err := r.settings.backend.Start(context.Background(), tracer.Options{
		Server: c.ServerPath, PID: r.pid, Timeout: r.until.timeout, Idle: r.until.idle, Log: log,
	})
	if err != nil {
		r.freeOnce()
		r.failed(err)
		return
	}
	r.attach(s)
	resolved := r.resolve()
	r.awaitReady(s)
	if r.until.ready != nil || len(r.until.asked) > 0 {
		r.plugin.work.Go(func() { r.watchLog(ctx, log) })
	}
	if !r.awaitEnd(s) {
		r.failed(fmt.Errorf("the tracer did not end within %v of being told to", endLimit))
		return
	}
	end() // the log is not watched any longer
	found := <-resolved
	res := s.Result()
	res.Trace.Accesses = creation.Merge(res.Trace.Accesses, created())
	r.plugin.finishing <- struct{}{}
	defer func() { <-r.plugin.finishing }()
	r.finish(res, found)
}

// awaitReady waits until the session is ready or over, and frees the hook.
func (r *run) awaitReady(s Session) {
	defer r.freeOnce()
	t := time.NewTimer(readyLimit)
	defer t.Stop()
	select {
	case <-s.Ready():
		r.ready()
	case <-s.Done():
		select {
		case <-s.Ready(): // it was, and is over already
			r.ready()
		default:
		}
	case <-t.C:
		r.stop("late")
	}
}

// ready notes that the session is armed, and how late.
func (r *run) ready() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.armed = true
	if r.held > 0 {
		r.late = time.Since(r.began)
	}
}

// awaitEnd waits until the session is over; false: it does not end though it was told to.
func (r *run) awaitEnd(s Session) bool {
	select {
	case <-s.Done():
		return true
	case <-r.stopping:
	}
	t := time.NewTimer(endLimit)
	defer t.Stop()
	select {
	case <-s.Done():
		return true
	case <-t.C:
		return false
	}
}

// resolution is what became known of a run's image, and what went wrong.
type resolution struct {
	image Image
	err   error
}

// resolve asks for the image as soon as the hook is over: the container may be gone soon.
func (r *run) resolve() <-chan resolution {
	c := make(chan resolution, 1)
	r.plugin.work.Go(func() {
		<-r.released
		c <- r.ask()
	})
	return c
}

func (r *run) ask() (res resolution) {
	defer func() {
		if v := recover(); v != nil {
			res = resolution{Image{Reference: r.image}, fmt.Errorf("panic: %v", v)}
		}
		if res.image.Reference == "" {
			res.image.Reference = r.image
		}
		if res.image.Platform == "" {
			res.image.Platform = runtime.GOOS + "/" + runtime.GOARCH
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), resolveLimit)
	defer cancel()
	go func() {
		select {
		case <-r.plugin.hurry:
			cancel()
		case <-ctx.Done():
		}
	}()
	res.image, res.err = r.settings.backend.Resolver.Resolve(ctx, r.id, r.image)
	return res
}

// failed logs the one line of a run that recorded nothing.
func (r *run) failed(err error) {
	r.plugin.o.Metrics.Run(metrics.Failed, 0)
	r.settings.backend.Log.Warn("not recorded: "+err.Error(), zap.String("image", r.image), zap.String("container", r.id),
		zap.String("name", r.name), zap.String("pod", r.pod), zap.String("namespace", r.namespace))
}

// finish saves the list, queues the rebuild and logs the run's line.
func (r *run) finish(res tracer.Result, found resolution) {
	if res.Armed.IsZero() {
		if res.Err == nil {
			res.Err = fmt.Errorf("the tracer ended before it was ready (%s)", res.End)
		}
		r.failed(res.Err)
		return
	}
	if found.err != nil && !errors.Is(found.err, ErrOtherImage) {
		// Containerd may have been starting; it has had the whole run's time since.
		if again := r.ask(); again.err == nil {
			found = again
		}
	}
	list := r.list(res, found.image).Fit() // with its loss, where that leaves something out
	c := &r.settings.cfg
	saved, err := r.settings.backend.Store.Save(list, persist.SaveOptions{Readable: c.Readable, Overwrite: c.Overwrite, Timeout: r.until.timeout})
	r.count(list, saved, err)
	rec := r.recording(list, saved)
	var outcome string
	switch {
	case err != nil && saved.Native == "":
		outcome = "not queued: the list was not saved"
	default:
		outcome = r.queue(list, rec, found)
	}
	r.report(list, rec, saved, outcome, errors.Join(err, res.Err))
}

// list makes the access list of what was recorded.
func (r *run) list(res tracer.Result, image Image) *persist.List {
	l := &persist.List{
		Reference: image.Reference, Digest: image.Digest, Platform: image.Platform,
		Container: r.id, Name: r.name, Pod: r.pod, Namespace: r.namespace, Command: r.args,
		Engine: cmp.Or(res.Engine, "fanotify"), Grade: cmp.Or(res.Grade, trace.GradeFile),
		Started: res.Armed, Duration: max(res.Duration, 0), End: res.End, Trace: res.Trace,
	}
	l.Losses = slices.Clone(l.Losses)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held > 0 && !res.Early {
		detail := fmt.Sprintf("the container went on after %v, the tracer was ready after %v",
			r.held.Round(time.Millisecond), r.late.Round(time.Millisecond))
		if r.late == 0 {
			detail = fmt.Sprintf("the container went on after %v, before the tracer was ready", r.held.Round(time.Millisecond))
		}
		l.Losses = append(l.Losses, trace.Loss{Reason: "late", Count: -1, Detail: detail})
	}
	if r.cutOff != "" && res.End == "stop" {
		l.Losses = append(l.Losses, trace.Loss{Reason: "killed", Count: -1, Detail: r.cutOff})
	}
	if res.Err != nil && len(l.Losses) == 0 {
		l.Losses = append(l.Losses, trace.Loss{Reason: "killed", Count: -1, Detail: oneLine(res.Err.Error())})
	}
	return l
}

// queue asks for a rebuild and returns what the log says about it.
func (r *run) queue(l *persist.List, rec rebuild.Recording, found resolution) string {
	outcome, count := r.enqueue(l, rec, found)
	if count != "" {
		r.plugin.o.Metrics.Rebuild(count)
	}
	return outcome
}

// enqueue asks for a rebuild and returns what the log says about it, and what is counted, "" for nothing: a job that was queued
// counts when it ends.
func (r *run) enqueue(l *persist.List, rec rebuild.Recording, found resolution) (outcome, count string) {
	b := r.settings.backend
	switch {
	case b.Builds == nil:
		return "off", ""
	case !l.Complete():
		return "not queued: the list is incomplete", metrics.NotQueued
	case !slices.ContainsFunc(l.Accesses, func(a trace.Access) bool { return a.How != trace.Runtime }):
		// Nothing, or what is read of every image: the container was gone before it did anything.
		return "not queued: the list is empty", metrics.NotQueued
	case found.image.Optimized:
		return "not queued: the image is a Nydus image already", metrics.NotQueued
	case found.image.Digest == "":
		return "not queued: the image's digest is not known: " + oneLine(fmt.Sprint(found.err)), metrics.NotQueued
	}
	ctx, cancel := context.WithTimeout(context.Background(), queueLimit)
	defer cancel()
	d, err := b.Builds.Add(ctx, rebuild.Request{
		Image:     rebuild.Image{Reference: l.Reference, Digest: l.Digest, Platform: l.Platform},
		List:      rec.List,
		ListHash:  l.ContentHash(),
		Options:   r.settings.cfg.Build(),
		Recording: rec,
		Overwrite: r.settings.cfg.Overwrite,
	})
	if err != nil {
		return "not queued: " + oneLine(err.Error()), metrics.NotQueued
	}
	switch d.Verdict {
	case rebuild.Queued, rebuild.Replaced:
	case rebuild.Unchanged:
		count = metrics.Unchanged
	default:
		count = metrics.NotQueued
	}
	return verdict(d), count
}
