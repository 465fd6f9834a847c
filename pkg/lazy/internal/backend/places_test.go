package backend_test

import (
	"context"
	"io"
	"path/filepath"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/backend"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// publish copies the image that the real nydusify wrote to ref.
func publish(t *testing.T, to string) {
	t.Helper()
	parse := func(s string) remote.Reference {
		ref, err := remote.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return ref
	}
	src, err := remote.OpenSource(t.Context(), parse("oci:"+zoo(t)), remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	img, err := remote.SelectNydus(t.Context(), src, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	target, err := remote.OpenTarget(t.Context(), parse(to), options().Remote)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	var blobs []remote.Blob
	for _, l := range img.Layers {
		blobs = append(blobs, remote.Blob{Descriptor: l.Descriptor, Open: func(ctx context.Context) (io.ReadCloser, error) { return src.Fetch(ctx, l.Descriptor) }})
	}
	config := remote.Document{Descriptor: img.Manifest.Config, Data: img.ConfigBytes}
	manifest := remote.Document{Descriptor: img.Descriptor, Data: img.ManifestBytes}
	if _, err := remote.Publish(t.Context(), target, blobs, config, manifest, remote.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
}

// The image of nydusify is read whole from the real registry server and from an archive, through the image and through its origin.
func TestPlaces(t *testing.T) {
	t.Parallel()
	testenv.Tool(t, "registry")
	server, err := testcri.StartRegistry(t.Context(), testcri.RegistryOptions{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, ref := range []string{server.Host + "/some/zoo:v", "oci-archive:" + filepath.Join(t.TempDir(), "zoo.tar") + ":v", "oci:" + filepath.Join(t.TempDir(), "zoo") + ":v"} {
		publish(t, ref)
		img, err := backend.Open(t.Context(), ref, options())
		if err != nil {
			t.Fatalf("%s: %v", ref, err)
		}
		origin, parsed := again(t, img.Origin()), img.RAFS
		m := mounted(t, parsed, img.Blobs, time.Minute)
		m.s.Start(fill.Plan{Blobs: m.blobs, Stream: origin.Prefetch, Background: fill.BackgroundFull})
		if failed := m.readAll(); failed != 0 {
			t.Errorf("%s: %d reads failed", ref, failed)
		}
		m.check(true)
		m.s.Close()
		if err := img.Close(); err != nil {
			t.Error(err)
		}
		blobs, err := backend.Reopen(t.Context(), origin, options())
		if err != nil {
			t.Fatalf("%s: %v", ref, err)
		}
		m = mounted(t, parsed, blobs, time.Minute)
		if failed := m.readAll(); failed != 0 {
			t.Errorf("%s, again: %d reads failed", ref, failed)
		}
		m.check(true)
		m.close()
	}
}
