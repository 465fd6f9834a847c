package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/testenv"
)

// Containers of another namespace than the CRI's, made by containerd's client as ctr and nerdctl do.
func TestRecordContainerElsewhere(t *testing.T) {
	e := critest.Start(t, testcri.Options{})
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(t.Context(), "elsewhere"), time.Minute)
	defer cancel()
	c := e.Client()
	for _, id := range []string{"twin-a", "twin-b"} {
		if _, err := c.ContainerService().Create(ctx, containers.Container{ID: id, Runtime: containers.RuntimeInfo{Name: "io.containerd.runc.v2"}}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := c.ContainerService().Delete(context.WithoutCancel(ctx), id); err != nil {
				t.Error(err)
			}
		})
	}
	server := testenv.Binary(t, "optimizer-server")
	list := filepath.Join(t.TempDir(), "list")
	for _, tc := range []struct {
		id, want string
		more     []string
	}{
		{"twin", "2 containers have ids that begin so (elsewhere/twin-a, elsewhere/twin-b); give more of the id, or --namespace", nil},
		{"twin-a", "container twin-a does not run", nil},
		{"twin-a", "container twin-a in namespace k8s.io: there is none", []string{"--namespace", "k8s.io"}},
		{"nobody", "container nobody in namespaces elsewhere, k8s.io: there is none", nil},
	} {
		code, _, errs := invoke(t, append([]string{"record", "--container", tc.id, "--containerd-address", e.Address(), "--server-path", server, "-o", list}, tc.more...)...)
		if code != exitFailed || !strings.Contains(errs, tc.want) {
			t.Errorf("%s %v: status %d, stderr %s, want %s", tc.id, tc.more, code, errs, tc.want)
		}
	}
	if _, err := os.Lstat(list); err == nil {
		t.Error("a list was written")
	}
	task := startElsewhere(ctx, t, c)
	attached := make(chan struct{})
	errs := &watched{want: "recording process", seen: func() { close(attached) }}
	done := make(chan error, 1)
	go func() {
		done <- run(t.Context(), []string{"record", "--container", "lone", "--containerd-address", e.Address(), "--server-path", server, "-o", list}, nil, io.Discard, errs)
	}()
	select {
	case <-attached:
	case err := <-done:
		t.Fatal(err)
	}
	if err := task.Kill(ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if l := readListFile(t, list); l.End != "exit" || l.Container != "lone-container" || l.Reference != "docker.io/library/lone:v1" || l.Digest == "" {
		t.Errorf("list of %s %s %s, ended by %s", l.Container, l.Reference, l.Digest, l.End)
	}
}

// startElsewhere runs a container in ctx's namespace until the test ends.
func startElsewhere(ctx context.Context, t *testing.T, c *containerd.Client) containerd.Task {
	t.Helper()
	img, err := testcri.StaticImage(testenv.Command(t, helloPackage), nil)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag("docker.io/library/lone:v1")
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(tarball.Write(tag, img, w)) }()
	imported, err := c.Import(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(imported, func(i images.Image) bool { return strings.Contains(i.Name, "lone") })
	if at < 0 {
		t.Fatalf("imported %v", imported)
	}
	image := containerd.NewImage(c, imported[at])
	if err := image.Unpack(ctx, "overlayfs"); err != nil {
		t.Fatal(err)
	}
	ctr, err := c.NewContainer(ctx, "lone-container", containerd.WithImage(image), containerd.WithSnapshotter("overlayfs"),
		containerd.WithRuntime("io.containerd.runc.v2", &options.Options{BinaryName: testenv.Tool(t, "runc")}),
		containerd.WithNewSnapshot("lone", image), containerd.WithNewSpec(oci.WithImageConfigArgs(image, []string{"sleep"})))
	if err != nil {
		t.Fatal(err)
	}
	clean := context.WithoutCancel(ctx)
	t.Cleanup(func() {
		if err := ctr.Delete(clean, containerd.WithSnapshotCleanup); err != nil {
			t.Error(err)
		}
	})
	task, err := ctr.NewTask(ctx, cio.NullIO)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := task.Delete(clean, containerd.WithProcessKill); err != nil {
			t.Error(err)
		}
	})
	if err := task.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return task
}
