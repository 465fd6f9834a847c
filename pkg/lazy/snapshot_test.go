package lazy_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// A containerd snapshotter's Prepare: the image is named by labels, credentials are a file of the snapshotter's own, and a mount that
// is there already, also from before a restart of the snapshotter, is found again.
func Example_snapshotter() {
	prepare := func(ctx context.Context, c *lazy.Client, dir string, labels map[string]string) (lazy.Mount, error) {
		if m, err := c.Find(ctx, dir); err == nil {
			return m, nil
		}
		r, err := lazy.RequestFromLabels(labels)
		if err != nil {
			return lazy.Mount{}, err
		}
		// The daemon reads config.json there whenever it needs credentials. Who has short-lived ones writes it anew,
		// to another name first, and renames it.
		r.Remote.DockerConfig = "/run/my-snapshotter/credentials"
		r.Remote.HostsDir = "/etc/containerd/certs.d"
		r.Background = "full"
		return c.Mount(ctx, dir, r)
	}
	c, err := lazy.NewClient(lazy.ClientOptions{
		StateDir: "/var/lib/my-snapshotter/lazy", RunDir: "/run/my-snapshotter",
		Command: []string{"/usr/local/bin/optimizer", "lazyd", "--state-dir", "/var/lib/my-snapshotter/lazy", "--run-dir", "/run/my-snapshotter"},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = prepare(context.Background(), c, os.DevNull, map[string]string{})
	fmt.Println(err)
	// Output: no label containerd.io/snapshot/cri.image-ref: which image is it?
}

func TestRequestOf(t *testing.T) {
	t.Parallel()
	sum := digest.FromString("manifest")
	amd64 := &ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
	for _, tt := range []struct {
		repository string
		manifest   ocispec.Descriptor
		want       lazy.Request
		fault      string
	}{
		{repository: "registry.example/team/app", manifest: ocispec.Descriptor{Digest: sum}, want: lazy.Request{Reference: "registry.example/team/app@" + sum.String()}},
		{repository: "registry.example:5000/app:v1", manifest: ocispec.Descriptor{Digest: sum, MediaType: ocispec.MediaTypeImageIndex, Platform: amd64}, want: lazy.Request{Reference: "registry.example:5000/app@" + sum.String(), Platform: "linux/arm64/v8"}},
		{repository: "nginx:1@" + digest.FromString("other").String(), manifest: ocispec.Descriptor{Digest: sum, MediaType: ocispec.MediaTypeImageManifest}, want: lazy.Request{Reference: "docker.io/library/nginx@" + sum.String()}},
		{repository: "oci:/images:tag", manifest: ocispec.Descriptor{Digest: sum}, want: lazy.Request{Reference: "oci:/images@" + sum.String()}},
		{repository: "app", manifest: ocispec.Descriptor{}, fault: "digest"},
		{repository: "app", manifest: ocispec.Descriptor{Digest: "sha256:12"}, fault: "digest"},
		{repository: "app", manifest: ocispec.Descriptor{Digest: sum, MediaType: ocispec.MediaTypeImageLayerGzip}, fault: "media type"},
		{repository: "a b", manifest: ocispec.Descriptor{Digest: sum}, fault: "a b"},
	} {
		got, err := lazy.RequestOf(tt.repository, tt.manifest)
		if got != tt.want || (err == nil) != (tt.fault == "") || err != nil && !strings.Contains(err.Error(), tt.fault) {
			t.Errorf("RequestOf(%q, %+v) = %+v, %v, want %+v, %q", tt.repository, tt.manifest, got, err, tt.want, tt.fault)
		}
	}
}

func TestRequestFromLabels(t *testing.T) {
	t.Parallel()
	sum := digest.FromString("manifest").String()
	for want, labels := range map[string]map[string]string{
		"registry.example/app:v1":     {lazy.LabelReference: "registry.example/app:v1", "other": "x"},
		"registry.example/app@" + sum: {lazy.LabelReference: "registry.example/app:v1", lazy.LabelManifest: sum},
	} {
		if got, err := lazy.RequestFromLabels(labels); err != nil || got != (lazy.Request{Reference: want}) {
			t.Errorf("RequestFromLabels(%v) = %+v, %v, want %s", labels, got, err, want)
		}
	}
	for _, labels := range []map[string]string{nil, {lazy.LabelManifest: sum}, {lazy.LabelReference: "app", lazy.LabelManifest: "md5:0"}, {lazy.LabelReference: "A B"}} {
		if got, err := lazy.RequestFromLabels(labels); err == nil || got != (lazy.Request{}) {
			t.Errorf("RequestFromLabels(%v) = %+v, %v, want an error", labels, got, err)
		}
	}
}

// The manifest of the digest is mounted, whatever the tag names.
func TestMountByDescriptor(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	byName := b.mount(b.mountpoint("name"), layout(t))
	repository := layout(t).Reference
	r, err := lazy.RequestOf(repository, ocispec.Descriptor{Digest: digest.Digest(byName.Digest)})
	if err != nil {
		t.Fatal(err)
	}
	r.Background = "none"
	m := b.mount(b.mountpoint("descriptor"), r)
	if m.Digest != byName.Digest || m.Bootstrap != byName.Bootstrap {
		t.Errorf("Mount() = %+v, want the image of %+v", m, byName)
	}
	compare(t, m.Dir)
	if found, err := b.client.Find(t.Context(), filepath.Join(b.dir, "descriptor")); err != nil || found.ID != m.ID {
		t.Errorf("Find() = %+v, %v, want %s", found, err, m.ID)
	}
}
