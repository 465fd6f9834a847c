package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/headstart-oci/headstart/internal/runroot"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/persist"
)

// endReady is the end of a recording at a line that --until-log asked for.
const endReady = "ready"

// How long parts of a recording may take before they count as failed.
const (
	armLimit  = 30 * time.Second // until the tracer is armed; milliseconds on an idle machine
	stopGrace = 10 * time.Second // for the command, from SIGTERM to SIGKILL, as container runtimes give
)

// trace records the process pid into l until the recording ends. A command p, if there is
// one, is released when the tracer is armed, and has ended when trace returns; ours says that
// it was ended from here.
func (o *recordOptions) trace(ctx context.Context, server string, pid int, l *persist.List, p *runroot.Process) (ours bool, err error) {
	if p != nil {
		defer p.End(stopGrace)
	}
	o.pages.open(o)
	defer o.pages.release()
	// An interrupt ends the recording; it must not kill the tracer before it has sent everything.
	sess, err := tracer.Start(context.WithoutCancel(ctx), tracer.Options{
		Server: server, Pages: o.pages.pool, PID: pid, Attach: p == nil, Timeout: o.timeout, Idle: o.idle, Log: o.log(),
	})
	if err != nil {
		return false, fmt.Errorf("start the tracer: %w", err)
	}
	defer func() {
		sess.Stop(tracer.EndStop)
		<-sess.Done()
	}()
	if err := armed(ctx, sess); err != nil {
		return false, err
	}
	o.pages.retire()
	if p == nil {
		o.note("recording process %d; Ctrl-C ends it", pid)
	} else if err := p.Release(); err != nil {
		return false, fmt.Errorf("start the command: %w", err)
	}
	select {
	case <-sess.Done():
	case <-o.said:
		sess.Stop(endReady)
		<-sess.Done()
	case <-ctx.Done():
		sess.Stop(tracer.EndStop)
		<-sess.Done()
	}
	res := sess.Result()
	l.Trace, l.End, l.Started, l.Duration = res.Trace, res.End, res.Armed, res.Duration
	l.Engine, l.Grade = cmp.Or(res.Engine, l.Engine), cmp.Or(res.Grade, l.Grade)
	if res.Err != nil {
		o.warn("the tracer: %v", res.Err)
	}
	return res.End != tracer.EndExit, nil
}

// armed waits until the tracer is.
func armed(ctx context.Context, sess *tracer.Session) error {
	limit := time.NewTimer(armLimit)
	defer limit.Stop()
	select {
	case <-sess.Ready():
		return nil
	case <-sess.Done():
		err := sess.Result().Err
		if err == nil {
			err = errors.New("it ended by itself")
		}
		return fmt.Errorf("the tracer was never armed: %w", err)
	case <-limit.C:
		return fmt.Errorf("the tracer was not armed within %s", armLimit)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (o *recordOptions) log() *zap.Logger {
	if o.quiet {
		return zap.NewNop()
	}
	enc := zap.NewProductionEncoderConfig()
	enc.TimeKey, enc.CallerKey = "", ""
	return zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(enc), zapcore.AddSync(o.err), zapcore.WarnLevel))
}
