package nriplugin

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
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

// Session is one recording, as [tracer.Session] is: Ready is closed when it is armed, Done
// when it has ended; Stop asks it to end and does not block; Result is for after Done.
type Session interface {
	Ready() <-chan struct{}
	Done() <-chan struct{}
	Stop(reason string)
	Result() tracer.Result
}

// Image is what is known of a container's image.
type Image struct {
	Reference string // as the runtime names it
	Digest    string // of the manifest for Platform; empty: not known
	Platform  string // os/arch[/variant]
	// Optimized says that the image is a Nydus image already; it is not rebuilt.
	Optimized bool
}

// Resolver finds out what image a container runs. Name is the reference the runtime gave,
// or empty. On an error the image holds what is known all the same.
type Resolver interface {
	Resolve(ctx context.Context, container, name string) (Image, error)
}

// Store keeps lists, as [persist.Store] does.
type Store interface {
	Save(l *persist.List, o persist.SaveOptions) (persist.Saved, error)
}

// Builds takes rebuilds, as [rebuild.Queue] does.
type Builds interface {
	Add(ctx context.Context, r rebuild.Request) (rebuild.Decision, error)
}

// Backend is everything a configuration opens.
type Backend struct {
	Start func(ctx context.Context, o tracer.Options) (Session, error)
	// Expect says that Start is likely to be called soon; it does not block. Nil: nobody wants to know.
	Expect   func()
	Resolver Resolver
	Store    Store
	Builds   Builds // nil: nothing is rebuilt
	Log      *zap.Logger
	// Created finds what the runtime read to create a container, as [creation.Files] does; nil: nothing.
	Created func(ctx context.Context, o creation.Options) []trace.Access
	// LogPath returns the path of a container's log in the CRI's form; nil: nobody knows it.
	LogPath func(ctx context.Context, container string) (string, error)
	// Retire ends what runs in the background and leaves a running build alone when
	// detach is set; runs that began with this backend may still use it. Close comes
	// last. Either may be nil.
	Retire func(detach bool)
	Close  func() error
}

// Options configures [New].
type Options struct {
	// Own is the configuration of a plugin started by hand with one; what containerd sends is ignored then.
	Own *Config
	// Base is what containerd's configuration is read over.
	Base Config
	// Open opens what a configuration asks for. It must not take long: NRI gives Configure 2 s.
	Open func(Config) (*Backend, error)
	// Log is for what happens outside of a configuration.
	Log *zap.Logger
	// Metrics counts; nil: nothing is counted.
	Metrics *metrics.Metrics
	// HookLimit is after how long Expired is called for a hook that runs; 0: [DefaultHookLimit].
	HookLimit time.Duration
	// Expired must end the process. Nil: nothing ends it.
	Expired func(hook string)
	// Kill has the kernel kill the process should Expired not end it.
	Kill bool
}

// settings is one configuration in force, immutable.
type settings struct {
	text    string
	cfg     Config
	choose  *selector
	backend *Backend
}

// Plugin has the hooks. Its methods are safe for concurrent use. Close it after the last hook.
type Plugin struct {
	o     Options
	watch watchdog
	// finishing bounds how many runs save their lists at once.
	finishing chan struct{}
	// hurry is closed when nobody is to be asked for images any more: lists are to be saved at once.
	hurry     chan struct{}
	hurryOnce sync.Once
	// work counts goroutines of runs and of log lines that hooks leave behind.
	work sync.WaitGroup

	mu      sync.Mutex // guards what follows; held for map operations only, never while blocking
	current *settings
	retired []*settings
	runs    map[string]*run // by container
	all     map[*run]bool   // those too whose container started again
	closed  bool
}

// parallelSaves is how many lists are written at once.
const parallelSaves = 2

// New returns a Plugin. With Options.Own the configuration is opened here, and an error is that of Open.
func New(o Options) (*Plugin, error) {
	if o.HookLimit == 0 {
		o.HookLimit = DefaultHookLimit
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Expired == nil {
		o.Expired = func(string) {}
	}
	p := &Plugin{
		o:         o,
		watch:     watchdog{limit: o.HookLimit, expire: o.Expired, kill: o.Kill},
		finishing: make(chan struct{}, parallelSaves),
		hurry:     make(chan struct{}),
		runs:      map[string]*run{},
		all:       map[*run]bool{},
	}
	if o.Own != nil {
		if err := p.use(*o.Own, ""); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// use puts a configuration in force.
func (p *Plugin) use(c Config, text string) error {
	b, err := p.o.Open(c)
	if err != nil {
		return err
	}
	p.mu.Lock()
	old := p.current
	p.current = &settings{text: text, cfg: c, choose: newSelector(&c), backend: b}
	if old != nil {
		p.retired = append(p.retired, old)
	}
	p.mu.Unlock()
	if old != nil && old.backend.Retire != nil {
		old.backend.Retire(true)
	}
	return nil
}

// events is what the plugin subscribes to: each event costs containerd a round trip under a lock.
const events = api.EventMask(1<<(api.Event_CREATE_CONTAINER-1) | 1<<(api.Event_START_CONTAINER-1) | 1<<(api.Event_STOP_CONTAINER-1))

// Configure takes containerd's configuration for the plugin, unless it has its own, and
// returns the events it needs. A bad configuration is an error that matches [ErrConfig].
func (p *Plugin) Configure(_ context.Context, config, runtime, version string) (api.EventMask, error) {
	p.mu.Lock()
	current := p.current
	p.mu.Unlock()
	if p.o.Own == nil && (current == nil || current.text != config) {
		c, err := ParseConfig([]byte(config), p.o.Base)
		if err == nil {
			err = p.use(c, config)
		}
		if err != nil {
			p.log().Error("configuration refused", zap.Error(err))
			return 0, err
		}
	}
	s := p.settings()
	if s == nil {
		return 0, fmt.Errorf("%w: none", ErrConfig)
	}
	s.backend.Log.Info("configured", zap.String("runtime", runtime), zap.String("version", version),
		zap.String("persist_dir", s.cfg.PersistDir), zap.Bool("own", p.o.Own != nil),
		zap.String("rebuild", s.cfg.rebuildName()))
	return events, nil
}

func (c *Config) rebuildName() string {
	if !c.Rebuild.Enabled {
		return "off"
	}
	return c.Rebuild.Target
}

func (p *Plugin) settings() *settings {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current
}

func (p *Plugin) log() *zap.Logger {
	if s := p.settings(); s != nil {
		return s.backend.Log
	}
	return p.o.Log
}

// Synchronize learns which containers run already. They are not recorded: their start
// is over. Recordings of containers that are gone are ended.
func (p *Plugin) Synchronize(_ context.Context, _ []*api.PodSandbox, ctrs []*api.Container) (_ []*api.ContainerUpdate, _ error) {
	defer p.watch.enter("Synchronize")()
	defer p.recovered("Synchronize")
	alive := map[string]bool{}
	for _, c := range ctrs {
		switch c.GetState() {
		case api.ContainerState_CONTAINER_RUNNING, api.ContainerState_CONTAINER_PAUSED:
			alive[c.GetId()] = true
		default:
		}
	}
	p.mu.Lock()
	var gone []*run
	missed := len(alive)
	for id, r := range p.runs {
		if alive[id] {
			missed--
		} else {
			gone = append(gone, r)
		}
	}
	p.mu.Unlock()
	for _, r := range gone { // it has ended, which its tracer sees by itself, or containerd lost it, and it goes on
		r.cut("containerd came back and does not list the container as running")
	}
	if missed > 0 {
		p.aside(func() {
			p.log().Info("containers run already and are not recorded: their start is over", zap.Int("containers", missed))
		})
	}
	return nil, nil
}

// CreateContainer says that a container that is to be recorded will start soon, so that what that needs is made by then.
// It never changes anything and never returns an error.
func (p *Plugin) CreateContainer(_ context.Context, pod *api.PodSandbox, ctr *api.Container) (_ *api.ContainerAdjustment, _ []*api.ContainerUpdate, _ error) {
	defer p.timed("CreateContainer", time.Now())
	defer p.watch.enter("CreateContainer")()
	defer p.recovered("CreateContainer")
	s := p.settings()
	if s == nil || s.backend.Expect == nil {
		return nil, nil, nil
	}
	if reason, _ := s.choose.choose(pod, ctr); reason == "" {
		s.backend.Expect()
	}
	return nil, nil, nil
}

// StartContainer begins a recording and returns when it is armed, when it cannot be, or
// at the deadline. It never returns an error.
func (p *Plugin) StartContainer(_ context.Context, pod *api.PodSandbox, ctr *api.Container) (_ error) {
	entered := time.Now()
	defer p.timed("StartContainer", entered)
	defer p.watch.enter("StartContainer")()
	defer p.recovered("StartContainer")
	if r := p.begin(pod, ctr); r != nil {
		r.hold(r.settings.cfg.StartDeadline - time.Since(entered))
	}
	return nil
}

// StopContainer ends the container's recording, if there is one.
func (p *Plugin) StopContainer(_ context.Context, _ *api.PodSandbox, ctr *api.Container) (_ []*api.ContainerUpdate, _ error) {
	defer p.timed("StopContainer", time.Now())
	defer p.watch.enter("StopContainer")()
	defer p.recovered("StopContainer")
	p.mu.Lock()
	r := p.runs[ctr.GetId()]
	p.mu.Unlock()
	if r != nil {
		r.stop("stop")
	}
	return nil, nil
}

// timed counts a hook that began at entered.
func (p *Plugin) timed(hook string, entered time.Time) { p.o.Metrics.Hook(hook, time.Since(entered)) }

// Shutdown is told by a runtime that goes down; what follows is the connection's end.
func (p *Plugin) Shutdown(context.Context) {}

// begin makes the run of a container, or returns nil when it is not to be recorded.
func (p *Plugin) begin(pod *api.PodSandbox, ctr *api.Container) *run {
	s := p.settings()
	if s == nil {
		return nil
	}
	reason, warn := s.choose.choose(pod, ctr)
	if ctr.GetPid() == 0 && reason == "" {
		reason = "the runtime gave no process id"
	}
	var warns []string
	if warn != "" {
		warns = append(warns, warn)
	}
	var until limits
	if reason == "" {
		var more []string
		until, more = s.choose.limitsOf(pod, ctr)
		warns = append(warns, more...)
	}
	if len(warns) > 0 || reason != "" {
		id, name := ctr.GetId(), ctr.GetName()
		p.aside(func() {
			for _, warn := range warns {
				ignored(s.backend.Log.With(zap.String("container", id)), name, warn)
			}
			if reason != "" {
				s.backend.Log.Info("not recorded", zap.String("container", id), zap.String("name", name), zap.String("why", reason))
			}
		})
	}
	if reason != "" {
		return nil
	}
	r := newRun(p, s, pod, ctr)
	r.until = until
	p.mu.Lock()
	old := p.runs[r.id]
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.runs[r.id], p.all[r] = r, true
	p.work.Add(1)
	p.mu.Unlock()
	p.o.Metrics.Began()
	if old != nil {
		old.stop("stop") // the id starts again: what was recorded before is a run of its own
	}
	go r.main()
	return r
}

// ignored says to a container's log that an annotation means nothing.
func ignored(log *zap.Logger, name, why string) {
	log.Warn("annotation ignored", zap.String("name", name), zap.String("why", why))
}

// forget removes r unless another run of the same container took its place.
func (p *Plugin) forget(r *run) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.all, r)
	if p.runs[r.id] == r {
		delete(p.runs, r.id)
	}
}

// Runs returns how many recordings are going on or being saved.
func (p *Plugin) Runs() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.all)
}

// aside does what a hook must not wait for.
func (p *Plugin) aside(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.work.Go(f)
}

// recovered is deferred by every hook: a panic is a log line, not a failed container.
func (p *Plugin) recovered(hook string) {
	if v := recover(); v != nil {
		stack := debug.Stack()
		p.aside(func() {
			p.log().Error("panic in a hook", zap.String("hook", hook), zap.Any("panic", v), zap.ByteString("stack", stack))
		})
	}
}

// How long [Plugin.Close] waits.
const (
	// DrainTime is how long recordings may go on after containerd has gone.
	DrainTime = 45 * time.Second
	// FlushTime is how long a recording that was told to end may take to end and be saved.
	FlushTime = 10 * time.Second
)

// CloseOptions says how [Plugin.Close] goes about it.
type CloseOptions struct {
	// Drain is how long recordings may go on to their own end; then they are cut short.
	Drain time.Duration
	// Flush bounds the saving of what was cut short.
	Flush time.Duration
	// Detach leaves a running build alone; without it the build is called off, and done
	// when the plugin starts again.
	Detach bool
}

// Close lets recordings end, ends those that do not, saves all, and releases what
// configurations opened. A recording cut short is kept with a loss, so that nothing is
// built from it. Close returns at the latest after Drain + Flush, or Flush after ctx's end,
// and an error when lists were not saved by then.
func (p *Plugin) Close(ctx context.Context, o CloseOptions) error {
	p.mu.Lock()
	p.closed = true
	all := p.retired
	if p.current != nil {
		all = append(all, p.current)
	}
	p.mu.Unlock()
	var retiring sync.WaitGroup
	for _, s := range all {
		if s.backend.Retire != nil {
			retiring.Go(func() { s.backend.Retire(o.Detach) })
		}
	}
	idle := make(chan struct{})
	go func() {
		p.work.Wait()
		close(idle)
	}()
	if !waitFor(ctx, idle, o.Drain) {
		p.hurryOnce.Do(func() { close(p.hurry) })
		p.mu.Lock()
		for r := range p.all {
			r.cut("the plugin ended before the recording did")
		}
		p.mu.Unlock()
		if !waitFor(context.WithoutCancel(ctx), idle, o.Flush) {
			return fmt.Errorf("%d recordings were not saved within %v", p.Runs(), o.Flush)
		}
	}
	retiring.Wait()
	var err error
	for _, s := range all {
		if s.backend.Close != nil {
			err = errors.Join(err, s.backend.Close())
		}
	}
	return err
}

// waitFor waits for c, at most d and until ctx ends, and reports whether c was closed.
func waitFor(ctx context.Context, c <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-c:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	select {
	case <-c:
		return true
	default:
		return false
	}
}
