// Package critest wraps package testcri for tests: what cannot be had skips the
// test, what goes wrong fails it with containerd's log, and everything ends with
// the test.
package critest

import (
	"context"
	"os"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testenv"
)

// Start starts a containerd for the test, which is skipped without root or the
// tools. A test that fails prints the end of containerd's log.
func Start(t testing.TB, o testcri.Options) *testcri.Env {
	t.Helper()
	testenv.Root(t)
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "runc"} {
		testenv.Tool(t, name)
	}
	if o.Out == nil {
		o.Out = os.Stderr
	}
	e, err := testcri.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			log := e.Log()
			t.Logf("the end of containerd's log:\n%s", log[max(0, len(log)-8192):])
		}
		if err := e.Close(); err != nil {
			t.Errorf("close containerd: %v", err)
		}
	})
	return e
}

// StartRegistry starts a registry for the test, which is skipped without the
// tool.
func StartRegistry(t testing.TB, o testcri.RegistryOptions) *testcri.Registry {
	t.Helper()
	testenv.Tool(t, "registry")
	r, err := testcri.StartRegistry(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("close registry: %v", err)
		}
	})
	return r
}

// ImportStatic imports an image of one static program of this module, whose main
// package is at pkg ("./internal/…"), and files, as ref.
func ImportStatic(t testing.TB, e *testcri.Env, ref, pkg string, files map[string][]byte) v1.Image {
	t.Helper()
	img, err := testcri.StaticImage(testenv.Command(t, pkg), files)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Import(t.Context(), ref, img); err != nil {
		t.Fatal(err)
	}
	return img
}

// Run runs a container to its end in a pod of its own.
func Run(ctx context.Context, t testing.TB, e *testcri.Env, o testcri.ContainerOptions) testcri.Result {
	t.Helper()
	r, err := e.Run(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}
