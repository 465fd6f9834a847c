package profiles_test

import (
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/profiles"
	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// containerd keeps profiles and optimized images, also when it collects garbage.
func TestContainerd(t *testing.T) {
	e := critest.Start(t, testcri.Options{})
	o := remote.Options{ContainerdAddress: e.Address()}
	from, image := zoo(t)
	const nydus, fast = "containerd:example/registry.test/app:nydus", "containerd:example/registry.test/app:fast"
	build := builder.DefaultOptions()
	build.TempDir = t.TempDir()
	if _, err := convert.Run(t.Context(), convert.Options{Source: from, Target: nydus, Platform: platform, Build: build, TargetRemote: o}); err != nil {
		t.Fatal(err)
	}
	opts := profiles.Options{Platform: platform, Remote: o}
	for n, path := range []string{"/app/main", "/bin/tool"} {
		if _, err := profiles.Push(t.Context(), nydus, run(t, image, n, path), opts); err != nil {
			t.Fatal(err)
		}
	}
	found, err := profiles.Pull(t.Context(), nydus, opts)
	if err != nil {
		t.Fatal(err)
	}
	sum, err := convert.Optimize(t.Context(), convert.OptimizeOptions{
		Source: nydus, Target: fast, Platform: platform, SourceRemote: o, TargetRemote: o,
		Build: builder.OptimizeOptions{List: found.Profile.List(persist.Union), TempDir: t.TempDir()},
	})
	if err != nil || sum.Prefetch.Files != 2 || sum.Uploaded != 3 {
		t.Fatalf("Optimize = %+v, %v", sum, err)
	}
	ctx := namespaces.WithNamespace(t.Context(), "example")
	l, err := e.Client().LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Client().LeasesService().Delete(ctx, l, leases.SynchronousDelete); err != nil { // runs the collector
		t.Fatal(err)
	}
	for _, ref := range []string{nydus, fast} {
		f, err := profiles.Pull(t.Context(), ref, opts)
		if err != nil || f.Artifacts != 2 || !slices.Equal(paths(f.Profile), []string{"/app/main", "/bin/tool"}) {
			t.Errorf("pull %s: %+v, %v", ref, f, err)
		}
	}
}
