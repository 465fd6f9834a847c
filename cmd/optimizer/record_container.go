package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"

	"github.com/headstart-oci/headstart/internal/readylog"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/remote"
)

func hostPlatform() string { return runtime.GOOS + "/" + runtime.GOARCH }

// attach finds the container's process and fills in what containerd knows of it.
func (o *recordOptions) attach(ctx context.Context, l *persist.List) (err error) {
	ro := o.remote.options()
	address, namespace := ro.ContainerdAddress, ro.Namespace
	if address == "" {
		address = "/run/containerd/containerd.sock"
	}
	// The client would try for 10 s to reach a socket that is not there.
	probe, err := (&net.Dialer{}).DialContext(ctx, "unix", address)
	if err == nil {
		err = probe.Close()
	}
	if err != nil {
		return fmt.Errorf("containerd at %s: %w", address, err)
	}
	client, err := containerd.New(address, containerd.WithTimeout(10*time.Second))
	if err != nil {
		return fmt.Errorf("containerd at %s: %w", address, err)
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	c, namespace, err := findContainer(ctx, client, namespace, o.container)
	if err != nil {
		return fmt.Errorf("container %s in %w", o.container, err)
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	if o.pid, err = runningPID(ctx, c); err != nil {
		return err
	}
	if o.untilLog != nil {
		if err := o.watchLog(ctx, address, c.ID()); err != nil {
			return err
		}
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
		o.imageOf(ctx, client, namespace, info, l)
	}
	return nil
}

// imageOf notes the digest of the container's image; without it the list is good all the same.
func (o *recordOptions) imageOf(ctx context.Context, client *containerd.Client, namespace string, info containers.Container, l *persist.List) {
	err := func() (err error) {
		ref, err := remote.Containerd(namespace, info.Image)
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
		snapshot, err := client.SnapshotService(info.Snapshotter).Stat(ctx, info.SnapshotKey)
		if err != nil {
			return fmt.Errorf("the container's snapshot: %w", err)
		}
		for _, choose := range []func(context.Context, remote.Source, string) (remote.Image, error){remote.Select, remote.SelectNydus} {
			img, err := choose(ctx, src, "")
			if err != nil {
				return err
			}
			// The name may have been given to another image since the container was made.
			if identity.ChainID(img.Config.RootFS.DiffIDs).String() == snapshot.Parent {
				l.Digest = img.Descriptor.Digest.String()
				return nil
			}
		}
		return fmt.Errorf("%s has other layers today than the container", info.Image)
	}()
	if err != nil {
		o.warn("the list will not name the image's digest (--digest does): %v", err)
	}
}

// runningPID returns the container's first process.
func runningPID(ctx context.Context, c containerd.Container) (int, error) {
	task, err := c.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return 0, fmt.Errorf("container %s does not run", c.ID())
	}
	if err != nil {
		return 0, fmt.Errorf("container %s: %w", c.ID(), err)
	}
	status, err := task.Status(ctx)
	if err != nil {
		return 0, fmt.Errorf("container %s: %w", c.ID(), err)
	}
	if status.Status == containerd.Stopped || status.Status == containerd.Unknown || task.Pid() == 0 {
		return 0, fmt.Errorf("container %s does not run: it is %s", c.ID(), status.Status)
	}
	return int(task.Pid()), nil
}

// watchLog has the recording end at the line of the container's log that --until-log asks for; the
// log is read from the container's beginning. What reads it ends with ctx, and o.watched tells that it did.
func (o *recordOptions) watchLog(ctx context.Context, address, id string) error {
	path, created, err := readylog.Path(ctx, address, id)
	if err != nil {
		return fmt.Errorf("--until-log takes a container with a log of the CRI: %w", err)
	}
	o.watched = make(chan struct{})
	go func() {
		defer close(o.watched)
		if _, err := readylog.Wait(ctx, path, created, o.untilLog); err == nil {
			close(o.said)
		} else if ctx.Err() == nil {
			o.warn("--until-log: %v", err)
		}
	}()
	return nil
}

// place is a container and where it is.
type place struct {
	namespace string
	container containerd.Container
}

// findContainer returns the container with this id, or the only one whose id begins with it, in the
// namespace, or in all when it is empty.
func findContainer(ctx context.Context, client *containerd.Client, namespace, id string) (containerd.Container, string, error) {
	names := []string{namespace}
	if namespace == "" {
		var err error
		if names, err = client.NamespaceService().List(ctx); err != nil {
			return nil, "", fmt.Errorf("containerd's namespaces: %w", err)
		}
		slices.Sort(names)
	}
	where := "namespace " + strings.Join(names, ", ")
	if len(names) > 1 {
		where = "namespaces " + strings.Join(names, ", ")
	}
	var exact, begin []place
	for _, ns := range names {
		all, err := client.Containers(namespaces.WithNamespace(ctx, ns))
		if err != nil {
			return nil, "", fmt.Errorf("namespace %s: %w", ns, err)
		}
		for _, c := range all {
			switch {
			case c.ID() == id:
				exact = append(exact, place{ns, c})
			case strings.HasPrefix(c.ID(), id):
				begin = append(begin, place{ns, c})
			}
		}
	}
	found := exact
	if len(exact) == 0 {
		found = begin
	}
	switch len(found) {
	case 0:
		return nil, "", fmt.Errorf("%s: there is none", where)
	case 1:
		return found[0].container, found[0].namespace, nil
	}
	const shown = 5
	var ids []string
	for _, p := range found[:min(len(found), shown)] {
		ids = append(ids, p.namespace+"/"+p.container.ID())
	}
	if len(found) > shown {
		ids = append(ids, "…")
	}
	return nil, "", fmt.Errorf("%s: %d containers have ids that begin so (%s); give more of the id, or --namespace", where, len(found), strings.Join(ids, ", "))
}
