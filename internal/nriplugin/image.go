package nriplugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// containerdResolver asks containerd's image store. The zero connections are made for each
// question: containerd may restart between two.
type containerdResolver struct {
	address, namespace string
	remote             remote.Options
}

// Resolve implements [Resolver].
func (r *containerdResolver) Resolve(ctx context.Context, container, name string) (Image, error) {
	img := Image{Reference: name}
	if err := r.reachable(ctx); err != nil {
		return img, err
	}
	if name == "" || isID(name) {
		found, err := r.nameOf(ctx, container, name)
		if err != nil {
			return img, err
		}
		img.Reference = found
	}
	ref, err := remote.Containerd(r.namespace, img.Reference)
	if err != nil {
		return img, err
	}
	o := r.remote
	o.RegistryFallback = false // what runs is what containerd has
	src, err := remote.OpenSource(ctx, ref, o)
	if err != nil {
		return img, fmt.Errorf("ask containerd for image %s: %w", img.Reference, err)
	}
	defer src.Close() //nolint:errcheck // only read from
	sel, err := r.selectOf(ctx, container, src)
	if err != nil {
		return img, fmt.Errorf("ask containerd for image %s: %w", img.Reference, err)
	}
	img.Digest = sel.Descriptor.Digest.String()
	if p := sel.Descriptor.Platform; p != nil {
		img.Platform = platformString(p)
	}
	img.Optimized = sel.Nydus()
	return img, nil
}

// selectOf returns the image of src that the container was made from: its name may have been given to another image since.
func (r *containerdResolver) selectOf(ctx context.Context, container string, src remote.Source) (remote.Image, error) {
	first, err := remote.Select(ctx, src, "")
	if err != nil {
		return first, err
	}
	below := r.below(ctx, container)
	if below == nil || isChain(below, first) {
		return first, nil
	}
	if nydus, err := remote.SelectNydus(ctx, src, ""); err == nil && isChain(below, nydus) {
		return nydus, nil
	}
	return first, ErrOtherImage
}

// ErrOtherImage is what a [Resolver] says of a name that was given to another image than the container's. It is final: nobody is asked again, since
// nobody can tell any more when the container is gone.
var ErrOtherImage = errors.New("it has other layers today than the container")

// below returns the names of the snapshots of which one is the container's image: the one that the container's own lies on, and, where it has
// users of its own and containerd may have made one with other owners (client.WithRemapperLabels), the next. Nil: containerd does not say.
func (r *containerdResolver) below(ctx context.Context, container string) []string {
	c, err := client.New(r.address, client.WithDefaultNamespace(r.namespace))
	if err != nil {
		return nil
	}
	defer c.Close() //nolint:errcheck // only read from
	ctx = namespaces.WithNamespace(ctx, r.namespace)
	info, err := c.ContainerService().Get(ctx, container)
	if err != nil || info.SnapshotKey == "" {
		return nil
	}
	all := c.SnapshotService(info.Snapshotter)
	own, err := all.Stat(ctx, info.SnapshotKey)
	if err != nil {
		return nil
	}
	names := []string{own.Parent}
	if own.Labels[snapshots.LabelSnapshotUIDMapping] != "" {
		if s, err := all.Stat(ctx, own.Parent); err == nil {
			names = append(names, s.Parent)
		}
	}
	return names
}

// isChain reports whether one of the snapshots is that of the image's layers.
func isChain(names []string, img remote.Image) bool {
	return slices.Contains(names, identity.ChainID(img.Config.RootFS.DiffIDs).String())
}

// reachable returns at once when containerd is down: its client would wait for it.
func (r *containerdResolver) reachable(ctx context.Context) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", strings.TrimPrefix(r.address, "unix://"))
	if err != nil {
		return fmt.Errorf("ask containerd: %w", err)
	}
	return c.Close()
}

func platformString(p *ocispec.Platform) string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// nameOf returns a name of the container's image that has a repository: the one the container was
// made from, or another name of the image whose ID is id.
func (r *containerdResolver) nameOf(ctx context.Context, container, id string) (string, error) {
	c, err := client.New(r.address, client.WithDefaultNamespace(r.namespace))
	if err != nil {
		return "", fmt.Errorf("ask containerd for container %s: %w", container, err)
	}
	defer c.Close() //nolint:errcheck // only read from
	ctx = namespaces.WithNamespace(ctx, r.namespace)
	if id == "" {
		info, err := c.ContainerService().Get(ctx, container)
		if err != nil {
			return "", fmt.Errorf("ask containerd for container %s: %w", container, err)
		}
		id = info.Image
	}
	if id == "" {
		return "", errors.New("containerd knows no image of the container")
	}
	if !isID(id) {
		return id, nil
	}
	img, err := c.ImageService().Get(ctx, id)
	if err != nil {
		return "", fmt.Errorf("ask containerd for image %s: %w", id, err)
	}
	all, err := c.ImageService().List(ctx, "target.digest=="+img.Target.Digest.String())
	if err != nil {
		return "", fmt.Errorf("ask containerd for the names of image %s: %w", id, err)
	}
	best := ""
	for _, i := range all {
		if named, err := reference.ParseNormalizedNamed(i.Name); err == nil && !isID(i.Name) {
			if best == "" || !reference.IsNameOnly(named) && hasTag(named) {
				best = i.Name
			}
		}
	}
	if best == "" {
		return "", fmt.Errorf("image %s has no name", id)
	}
	return best, nil
}

func hasTag(n reference.Named) bool {
	_, ok := n.(reference.Tagged)
	return ok
}

// isID reports whether name is an image ID ("sha256:…"), as containerd's CRI plugin names images too.
func isID(name string) bool {
	_, err := digest.Parse(name)
	return err == nil
}
