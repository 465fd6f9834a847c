package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/headstart-oci/headstart/internal/runroot"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/remote"
)

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
	// An interrupt ends the recording; it must not kill the tracer before it has sent everything.
	sess, err := tracer.Start(context.WithoutCancel(ctx), tracer.Options{
		Server: server, PID: pid, Timeout: o.timeout, Idle: o.idle, Log: o.log(),
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
	if p == nil {
		o.note("recording process %d; Ctrl-C ends it", pid)
	} else if err := p.Release(); err != nil {
		return false, fmt.Errorf("start the command: %w", err)
	}
	select {
	case <-sess.Done():
	case <-ctx.Done():
		sess.Stop(tracer.EndStop)
		<-sess.Done()
	}
	res := sess.Result()
	l.Trace, l.End, l.Started, l.Duration = res.Trace, res.End, res.Armed, res.Duration
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

func hostPlatform() string { return runtime.GOOS + "/" + runtime.GOARCH }

// attach finds the container's process and fills in what containerd knows of it.
func (o *recordOptions) attach(ctx context.Context, l *persist.List) (err error) {
	ro := o.remote.options()
	address, namespace := ro.ContainerdAddress, ro.Namespace
	if address == "" {
		address = "/run/containerd/containerd.sock"
	}
	if namespace == "" {
		namespace = remote.DefaultNamespace
	}
	// The client would try for 10 s to reach a socket that is not there.
	probe, err := (&net.Dialer{}).DialContext(ctx, "unix", address)
	if err == nil {
		err = probe.Close()
	}
	if err != nil {
		return fmt.Errorf("containerd at %s: %w", address, err)
	}
	client, err := containerd.New(address, containerd.WithDefaultNamespace(namespace), containerd.WithTimeout(10*time.Second))
	if err != nil {
		return fmt.Errorf("containerd at %s: %w", address, err)
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	c, err := findContainer(ctx, client, o.container)
	if err != nil {
		return fmt.Errorf("container %s in namespace %s: %w", o.container, namespace, err)
	}
	task, err := c.Task(ctx, nil)
	if err != nil {
		return fmt.Errorf("container %s does not run: %w", c.ID(), err)
	}
	o.pid = int(task.Pid())
	if o.pid == 0 {
		return fmt.Errorf("container %s does not run", c.ID())
	}
	info, err := c.Info(ctx, containerd.WithoutRefreshedMetadata)
	if err != nil {
		return fmt.Errorf("container %s: %w", c.ID(), err)
	}
	l.Container, l.Platform = c.ID(), hostPlatform()
	if spec, err := c.Spec(ctx); err == nil {
		// containerd's CRI plugin writes these; internal/cri/annotations in its source.
		const prefix = "io.kubernetes.cri."
		l.Name = spec.Annotations[prefix+"container-name"]
		l.Pod, l.Namespace = spec.Annotations[prefix+"sandbox-name"], spec.Annotations[prefix+"sandbox-namespace"]
		if spec.Process != nil {
			l.Command = spec.Process.Args
		}
	}
	if l.Reference == "" {
		l.Reference = info.Image
	}
	if l.Digest == "" && info.Image != "" {
		o.imageOf(ctx, namespace, info.Image, l)
	}
	return nil
}

// imageOf notes digest and platform of the container's image; without them the list is
// good all the same.
func (o *recordOptions) imageOf(ctx context.Context, namespace, name string, l *persist.List) {
	err := func() (err error) {
		ref, err := remote.Containerd(namespace, name)
		if err != nil {
			return err
		}
		ro := o.remote.options()
		ro.RegistryFallback = false
		src, err := remote.OpenSource(ctx, ref, ro)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, src.Close()) }()
		img, err := remote.Select(ctx, src, "")
		if err != nil {
			return err
		}
		l.Digest = img.Descriptor.Digest.String()
		return nil
	}()
	if err != nil {
		o.warn("the list will not name the image's digest: %v", err)
	}
}

// findContainer returns the container with this id, or the only one whose id begins with it.
func findContainer(ctx context.Context, client *containerd.Client, id string) (containerd.Container, error) {
	all, err := client.Containers(ctx)
	if err != nil {
		return nil, err
	}
	var found []containerd.Container
	for _, c := range all {
		switch {
		case c.ID() == id:
			return c, nil
		case len(id) < len(c.ID()) && c.ID()[:len(id)] == id:
			found = append(found, c)
		}
	}
	switch len(found) {
	case 0:
		return nil, errors.New("there is none")
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("%d containers have ids that begin so", len(found))
}
