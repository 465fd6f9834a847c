package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/signal"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/creation"
	"github.com/headstart-oci/headstart/internal/imageroot"
	"github.com/headstart-oci/headstart/internal/runroot"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// runImage unpacks the image, or mounts it, runs it and records it from its first instruction.
func (o *recordOptions) runImage(ctx context.Context, server string, l *persist.List) (err error) {
	root, release, err := o.place(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	run, err := o.runOptions(root)
	if err != nil {
		return fmt.Errorf("image %s: %w", o.image, err)
	}
	o.describe(l, root, run.Args)
	o.pages.open(o)
	p, err := runroot.Start(ctx, o.streamed(run))
	if err != nil {
		return err
	}
	var volumes []creation.Volume
	for i, at := range run.Volumes {
		volumes = append(volumes, creation.Volume{Source: run.VolumeDir(i), Destination: at})
	}
	// We are the runtime here, and read what any reads.
	created := creation.Files(ctx, creation.Options{PID: p.PID(), Volumes: volumes, Before: time.Now()})
	ours, err := o.trace(ctx, server, p.PID(), l, p)
	if err != nil {
		return err
	}
	l.Accesses = creation.Merge(l.Accesses, created)
	o.refine(l, root)
	return o.ended(l, p, ours)
}

// place puts the image where it can be run, and returns what takes it away again.
func (o *recordOptions) place(ctx context.Context) (*imageroot.Root, func() error, error) {
	o.cleanExact(ctx)
	if o.exact {
		r, err := o.mountExact(ctx)
		if err != nil {
			return nil, nil, err
		}
		return r.Root, r.Close, nil
	}
	r, err := o.unpack(ctx)
	if err != nil {
		return nil, nil, err
	}
	return r, r.Close, nil
}

func (o *recordOptions) unpack(ctx context.Context) (_ *imageroot.Root, err error) {
	src, err := remote.OpenSource(ctx, o.ref, o.remote.options())
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", o.image, err)
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	root, err := imageroot.Open(ctx, src, imageroot.Options{
		Base: o.scratch, Platform: o.platform,
		Progress: func(layer, layers int, size int64) {
			o.note("unpacking layer %d/%d, %.1f MB", layer, layers, float64(size)/1e6)
		},
	})
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", o.image, err)
	}
	return root, nil
}

// describe notes in the list what it is of.
func (o *recordOptions) describe(l *persist.List, root *imageroot.Root, command []string) {
	if l.Reference == "" {
		l.Reference = o.ref.String()
		if named, ok := o.ref.Registry(); ok {
			l.Reference = named.Name()
		}
	}
	if l.Digest == "" {
		l.Digest = root.Image.Descriptor.Digest.String()
	}
	if p := root.Image.Descriptor.Platform; p != nil {
		l.Platform = p.OS + "/" + p.Architecture
		if p.Variant != "" {
			l.Platform += "/" + p.Variant
		}
	}
	l.Container = "record-" + strconv.FormatInt(time.Now().UnixNano(), 36)
	l.Command = command
}

// runOptions says how the image is run.
func (o *recordOptions) runOptions(root *imageroot.Root) (runroot.Options, error) {
	c := root.Image.Config.Config
	r := runroot.Options{
		Layers: root.Layers, Scratch: root.Scratch,
		Env: environment(c.Env, o.env), Dir: c.WorkingDir, User: c.User,
		Mounts: o.mounts, NoNetwork: o.net == "none",
	}
	entrypoint, arguments := c.Entrypoint, c.Cmd
	if o.entrypoint != nil {
		entrypoint, arguments = o.entrypoint, nil
	}
	if len(o.command) > 0 {
		arguments = o.command
	}
	if r.Args = slices.Concat(entrypoint, arguments); len(r.Args) == 0 || r.Args[0] == "" {
		return r, errors.New("it names no command; give one after --")
	}
	if o.workDir != "" {
		r.Dir = o.workDir
	}
	if r.Dir != "" && !strings.HasPrefix(r.Dir, "/") {
		r.Dir = "/" + r.Dir // as container runtimes read it
	}
	if o.user != "" {
		r.User = o.user
	}
	r.Volumes = volumes(c)
	if c.StopSignal != "" {
		s, err := signal.ParseSignal(c.StopSignal)
		if err != nil {
			return r, fmt.Errorf("stop signal: %w", err)
		}
		r.StopSignal = s
	}
	return r, nil
}

// volumes returns the image's volumes, sorted, so that one inside another is mounted after it.
func volumes(c ocispec.ImageConfig) []string {
	var at []string
	for v := range c.Volumes {
		if strings.HasPrefix(v, "/") && v != "/" {
			at = append(at, v)
		}
	}
	slices.Sort(at)
	return at
}

// environment returns the image's variables with the user's in their place or behind them.
func environment(image, user []string) []string {
	env := slices.Clone(image)
	for _, e := range user {
		name, _, _ := strings.Cut(e, "=")
		i := slices.IndexFunc(env, func(have string) bool { return strings.HasPrefix(have, name+"=") })
		if i >= 0 {
			env[i] = e
		} else {
			env = append(env, e)
		}
	}
	return env
}
