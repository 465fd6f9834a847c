package convert_test

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// refOptions convert the fixture over its own layers.
func refOptions(t *testing.T, target string) convert.Options {
	t.Helper()
	o := options(t, target)
	o.Build.OCIRef, o.Build.Digester = true, rafs.DigesterSHA256
	return o
}

// TestRefRegistry: in the repository of its source an image over OCI layers needs its tables and documents alone, in another one of the
// registry the layers are mounted. What the prefetch blob needs is read by ranges.
func TestRefRegistry(t *testing.T) {
	testenv.Root(t)
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	plain := r.Host + "/one/app:plain"
	copied := options(t, plain)
	copied.MergePlatform = true
	run(t, copied) // brings the plain image to the registry
	for target, want := range map[string]struct{ mounted, warnings int }{"/one/app:ref": {0, 0}, "/two/app:ref": {2, 1}} {
		o := refOptions(t, r.Host+target)
		o.Source = plain
		o.List = list("/app/main", "/bin/tool")
		sum := run(t, o)
		// New: two tables, the prefetch blob, the bootstrap layer and the config.
		if sum.Uploaded != 5 || sum.Existed != 2 || sum.Mounted != want.mounted || sum.Referenced != 2 || len(sum.Warnings) != want.warnings {
			t.Errorf("%s: %+v; want 5 uploaded, 2 existed, %+v", target, sum, want)
		}
		judge(t, o.Target)
	}
	// From elsewhere the layers are sent. A second time nothing is.
	o := refOptions(t, r.Host+"/three/app:ref")
	if sum := run(t, o); sum.Uploaded != 6 || sum.UploadedBytes < sum.ReferencedSize || sum.ReferencedSize == 0 {
		t.Errorf("from a layout: %+v", sum)
	}
	judge(t, o.Target)
	if sum := run(t, o); sum.Uploaded != 0 || sum.Existed != 6 {
		t.Errorf("again: %+v", sum)
	}
	o.Target = r.Host + "/four/app:ref"
	o.MergePlatform = true
	if sum := run(t, o); len(sum.Warnings) != 0 || len(sum.Images) != 1 {
		t.Errorf("beside the plain image: %+v", sum)
	}
	judge(t, o.Target)
	// Optimized in another repository, it takes its layers along.
	opt := optimizeOptions(t, r.Host+"/five/app:fast")
	opt.Source = o.Target
	optimize(t, opt)
	judge(t, opt.Target)
}

// TestRefContainerd: containerd's garbage collector follows the image to the layers that its manifest does not list.
func TestRefContainerd(t *testing.T) {
	e := critest.Start(t, testcri.Options{})
	o := refOptions(t, "containerd:example/registry.test/app:ref")
	o.TargetRemote = remote.Options{ContainerdAddress: e.Address()}
	if sum := run(t, o); sum.Referenced != 2 {
		t.Errorf("%+v", sum)
	}
	ctx := namespaces.WithNamespace(t.Context(), "example")
	l, err := e.Client().LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Client().LeasesService().Delete(ctx, l, leases.SynchronousDelete); err != nil { // runs the collector
		t.Fatal(err)
	}
	img, err := nydusimage.Open(t.Context(), o.Target, nydusimage.Options{Platform: "linux/amd64", Remote: o.TargetRemote, TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range img.RAFS.Blobs {
		f, err := img.OpenBlob(t.Context(), b)
		if err != nil {
			t.Error(err)
			continue
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := errors.Join(img.CheckLayers(t.Context(), true), img.Close()); err != nil {
		t.Error(err)
	}
	// From containerd it goes on to a layout, optimized.
	opt := optimizeOptions(t, "oci:"+t.TempDir()+"/out:fast")
	opt.Source, opt.SourceRemote = o.Target, o.TargetRemote
	optimize(t, opt)
	testenv.Root(t)
	judge(t, opt.Target)
}

// TestRefErrors refuses before anything is read or written.
func TestRefErrors(t *testing.T) {
	t.Parallel()
	for want, change := range map[string]func(o *convert.Options){
		"chunk dictionary": func(o *convert.Options) { o.ChunkDict = "oci:nowhere" },
		"build cache":      func(o *convert.Options) { o.BuildCache = "oci:nowhere" },
		"RAFS v5":          func(o *convert.Options) { o.Build.FSVersion = rafs.V5 },
		"batches":          func(o *convert.Options) { o.Build.BatchSize = 1 << 20 },
	} {
		dir := t.TempDir()
		o := refOptions(t, "oci:"+filepath.Join(dir, "out")+":ref")
		change(&o)
		if _, err := convert.Run(t.Context(), o); !errors.Is(err, builder.ErrUnsupported) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
		empty(t, dir)
		empty(t, o.Build.TempDir)
	}
}
