package nriplugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/internal/creation"
	"github.com/headstart-oci/headstart/internal/metrics"
	"github.com/headstart-oci/headstart/internal/readylog"
	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/remote"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// BackendOptions configures [OpenBackend].
type BackendOptions struct {
	Stderr   io.Writer
	Launched bool // by containerd, which gives no stderr
	// Command builds a job; see [rebuild.RunChild].
	Command rebuild.Command
	// Metrics counts rebuilds; nil: nothing does. Server, when set, serves them where the
	// configuration says.
	Metrics *metrics.Metrics
	Server  *metrics.Server
	// Pages is where recordings get page events from; nil: they are of whole files.
	Pages *tracefs.Pool
	// Queue, when set, changes the queue's options; for tests.
	Queue func(*rebuild.QueueOptions)
}

// OpenBackend opens what c asks for: the log, the list store, and the queue of rebuilds,
// which is worked on from then on. Nothing of it waits for another process.
func OpenBackend(c Config, o BackendOptions) (*Backend, error) {
	log, logCloser, err := NewLogger(&c, o.Stderr, o.Launched)
	if err != nil {
		return nil, err
	}
	store, err := persist.OpenStore(c.PersistDir)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("key persist_dir: %w", err), logCloser.Close())
	}
	reserve := tracer.NewReserve(c.ServerPath, log)
	b := &Backend{
		Start: func(ctx context.Context, t tracer.Options) (Session, error) {
			t.Pages, t.PagesWait, t.Reserve = o.Pages, pagesWait, reserve
			s, err := tracer.Start(ctx, t)
			if err != nil {
				return nil, err // not a nil *tracer.Session in an interface
			}
			return s, nil
		},
		Resolver: &containerdResolver{address: c.ContainerdAddress, namespace: c.ContainerdNamespace, remote: remote.Options{
			ContainerdAddress: c.ContainerdAddress, Namespace: c.ContainerdNamespace, Log: log,
		}},
		Created: creation.Files,
		LogPath: func(ctx context.Context, container string) (string, error) {
			path, _, err := readylog.Path(ctx, c.ContainerdAddress, container)
			return path, err
		},
		Expect: func() {
			reserve.Expect()
			if o.Pages != nil {
				o.Pages.Expect()
			}
		},
		Store: store,
		Log:   log,
		Close: func() error {
			reserve.Close()
			return errors.Join(store.Close(), logCloser.Close())
		},
	}
	if !c.Rebuild.Enabled {
		o.serve(&c, log)
		return b, nil
	}
	qo := rebuild.QueueOptions{
		Command: o.Command, Log: log,
		Built: func(j rebuild.Job, r rebuild.Result) {
			o.Metrics.Rebuild(metrics.Built)
			LogBuilt(log, j, r)
		},
		Failed: func(j rebuild.Job, f rebuild.Failure) {
			o.Metrics.Rebuild(metrics.NotBuilt)
			LogFailed(log, j, f)
		},
	}
	if o.Queue != nil {
		o.Queue(&qo)
	}
	queue, err := rebuild.Open(filepath.Join(c.PersistDir, "queue"), qo)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("key persist_dir: %w", err), b.Close())
	}
	b.runQueue(queue, log)
	o.serve(&c, log)
	return b, nil
}

// serve serves the metrics where c says. An address that cannot be had costs the metrics, not the tracing.
func (o *BackendOptions) serve(c *Config, log *zap.Logger) {
	if o.Server == nil {
		return
	}
	if err := o.Server.Listen(c.MetricsAddress, o.Metrics); err != nil {
		log.Warn("no metrics: "+oneLine(err.Error()), zap.String("metrics_address", c.MetricsAddress))
	}
}

// runQueue works on the queue until the backend is retired.
func (b *Backend) runQueue(queue *rebuild.Queue, log *zap.Logger) {
	ctx, end := context.WithCancelCause(context.Background())
	idle := make(chan struct{})
	go func() {
		defer close(idle)
		queue.Run(ctx)
	}()
	b.Builds = queue
	b.Retire = func(detach bool) {
		cause := context.Canceled
		if detach {
			cause = rebuild.ErrDetach
		}
		end(cause)
		<-idle
	}
	closeRest := b.Close
	b.Close = func() error {
		b.Retire(true)
		return errors.Join(queue.Close(), closeRest())
	}
	log.Debug("rebuild queue open", zap.String("dir", queue.Dir()))
}
