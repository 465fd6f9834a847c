package e2e_test

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/workload"
)

// testByHand starts the plugin when containers already run, and lets containerd
// restart under it.
func testByHand(t *testing.T, h *host, img *workload.Image) {
	pod := h.pod(t)
	early, err := pod.Create(t.Context(), testcri.ContainerOptions{Image: img.Reference, Name: "early", Args: []string{"read", "/data/a", "wait"}})
	must(t, err)
	_, err = early.Start(t.Context())
	must(t, err)

	u := h.newSetup(t, nil)
	p := u.start(t)
	r := h.runIn(t, pod, testcri.ContainerOptions{Image: img.Reference, Name: "first", Args: []string{"read", "/data/b"}})
	expectPaths(t, u.list(t, r.id), "/bin/touch", "/data/b")
	must(t, early.Stop(t.Context(), 5*time.Second))
	if paths, _ := filepath.Glob(filepath.Join(u.persist, "lists", "*", "*", early.ID+".list")); len(paths) > 0 {
		l, err := readList(paths[0])
		must(t, err)
		if l.Complete() {
			t.Errorf("the list of a container that ran before the plugin claims to be complete: %d files", len(l.Accesses))
		}
	}

	must(t, h.Restart(t.Context()))
	eventually(t, "a container is traced after containerd's restart", func() error {
		name := fmt.Sprint("after", time.Now().UnixNano())
		r := h.runIn(t, pod, testcri.ContainerOptions{Image: img.Reference, Name: name, Args: []string{"read", "/data/b"}})
		time.Sleep(300 * time.Millisecond)
		paths, _ := filepath.Glob(filepath.Join(u.persist, "lists", "*", "*", r.id+".list"))
		if len(paths) == 0 {
			return errors.New("no list")
		}
		return nil
	})
	if !alive(p.cmd.Process.Pid) {
		t.Error("the plugin did not outlive containerd")
	}
	p.quit(t)
}

// registryImage pushes the image with a configuration of its own, so that the runtime
// does not know it by another name, and returns its reference and manifest digest.
func registryImage(t *testing.T, r *testcri.Registry, img *workload.Image, repository, tag string) (string, digest.Digest) {
	t.Helper()
	index, err := layout.ImageIndexFromPath(img.Dir)
	must(t, err)
	hash, err := v1.NewHash(img.Target.Digest.String())
	must(t, err)
	v1img, err := index.Image(hash)
	must(t, err)
	config, err := v1img.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	config.Author = "registry test"
	v1img, err = mutate.ConfigFile(v1img, config)
	must(t, err)
	ref, err := r.Push(t.Context(), repository, tag, v1img)
	must(t, err)
	manifest, err := v1img.Digest()
	must(t, err)
	return ref, digest.Digest(manifest.String())
}

// testRegistry pulls an image by digest from the real registry, drops its layers from
// containerd, and has the rebuilt image pushed to the registry under another name.
func testRegistry(t *testing.T, h *host, img *workload.Image) {
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	must(t, h.AddHost(r.Host, r.HostsTOML()))
	tagged, manifest := registryImage(t, r, img, "team/static", "v1")
	ref := strings.TrimSuffix(tagged, ":v1") + "@" + manifest.String()
	_, err := h.Pull(t.Context(), ref)
	must(t, err)
	dropLayers(t, h, img)

	u := h.newSetup(t, settings{
		"rebuild.target": `"registry"`, "rebuild.reference": fmt.Sprintf("%q", r.Host+"/fast/{repository}:{digest}-optimized"),
	})
	p := u.start(t)
	ran := h.run(t, testcri.ContainerOptions{Image: ref})
	if ran.exit != 0 {
		t.Fatalf("exit code %d: %s", ran.exit, ran.errOut)
	}
	list := u.list(t, ran.id)
	if list.Digest != manifest.String() || !strings.Contains(list.Reference, "@sha256:") {
		t.Errorf("list of %q, digest %q; want a reference by digest and %s", list.Reference, list.Digest, manifest)
	}
	path := filepath.Join(u.persist, "team", "static@sha256-"+manifest.Encoded())
	eventually(t, path, func() error { _, err := os.Stat(path); return err })

	res := u.built(t, manifest)
	want := r.Host + "/fast/team/static:" + manifest.Encoded()[:12] + "-optimized"
	if res.Target != want {
		t.Errorf("target = %q, want %q", res.Target, want)
	}
	dir := pullBack(t, want, res.Manifest)
	openRebuilt(t, dir, digest.Digest(res.Manifest)).verify(t, mergedRoot(t, h.Client(), img), list)
	p.quit(t)
}

// dropLayers deletes the image's layers from containerd's content store, as
// discard_unpacked_layers does; the snapshots stay.
func dropLayers(t *testing.T, h *host, img *workload.Image) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), criNamespace)
	for _, l := range img.Manifest.Layers {
		must(t, h.Client().ContentStore().Delete(ctx, l.Digest))
	}
	t.Cleanup(func() {
		// Later tests read the layers from containerd.
		if err := h.ImportOCI(context.WithoutCancel(t.Context()), img.Dir, img.Reference); err != nil {
			t.Error(err)
		}
	})
}

// pullBack copies an image from a registry into a layout with another project's client.
func pullBack(t *testing.T, ref, manifest string) string {
	t.Helper()
	parsed, err := name.ParseReference(ref, name.Insecure)
	must(t, err)
	transport := &http.Transport{DisableKeepAlives: true}
	img, err := remote.Image(parsed, remote.WithContext(t.Context()), remote.WithTransport(transport))
	must(t, err)
	got, err := img.Digest()
	must(t, err)
	if got.String() != manifest {
		t.Errorf("the registry has %s under %s, want %s", got, ref, manifest)
	}
	layers, err := img.Layers()
	must(t, err)
	dir := t.TempDir()
	for _, l := range layers {
		d, err := l.Digest()
		must(t, err)
		rc, err := l.Compressed()
		must(t, err)
		writeBlob(t, dir, d.Hex, rc)
		must(t, rc.Close())
	}
	config, err := img.RawConfigFile()
	must(t, err)
	writeBlob(t, dir, sha(config), strings.NewReader(string(config)))
	raw, err := img.RawManifest()
	must(t, err)
	writeBlob(t, dir, sha(raw), strings.NewReader(string(raw)))
	return dir
}

func writeBlob(t *testing.T, dir, hex string, r io.Reader) {
	t.Helper()
	path := filepath.Join(dir, "blobs", "sha256", hex)
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	f, err := os.Create(path)
	must(t, err)
	_, err = io.Copy(f, r)
	must(t, errors.Join(err, f.Close()))
}

// testContainerdTarget has the rebuilt image put into containerd's own image store.
func testContainerdTarget(t *testing.T, h *host, img *workload.Image) {
	u := h.newSetup(t, settings{"rebuild.target": `"containerd"`})
	p := u.start(t)
	ran := h.run(t, testcri.ContainerOptions{Image: img.Reference})
	list := u.list(t, ran.id)
	res := u.built(t, img.Target.Digest)
	want := strings.TrimSuffix(img.Reference, ":1") + ":1-optimized"
	if !strings.HasPrefix(res.Target, "containerd:") || !strings.HasSuffix(res.Target, want) {
		t.Errorf("target = %q, want containerd:…%s", res.Target, want)
	}
	ctx := namespaces.WithNamespace(t.Context(), criNamespace)
	got, err := h.Client().ImageService().Get(ctx, want)
	must(t, err)
	if got.Target.Digest.String() != res.Manifest {
		t.Errorf("containerd has %s under %s, want %s", got.Target.Digest, want, res.Manifest)
	}
	dir := exportLayout(t, h, want)
	openRebuilt(t, dir, digest.Digest(res.Manifest)).verify(t, mergedRoot(t, h.Client(), img), list)
	p.quit(t)
}

// exportLayout exports an image of containerd's store into a layout directory.
func exportLayout(t *testing.T, h *host, ref string) string {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), criNamespace)
	r, w := io.Pipe()
	go func() {
		w.CloseWithError(h.Client().Export(ctx, w, archive.WithImage(h.Client().ImageService(), ref), archive.WithSkipNonDistributableBlobs()))
	}()
	defer r.Close()
	dir := t.TempDir()
	tr := tar.NewReader(r)
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		must(t, err)
		if rest, ok := strings.CutPrefix(hdr.Name, "blobs/sha256/"); ok && hdr.Typeflag == tar.TypeReg {
			writeBlob(t, dir, rest, tr)
		}
	}
}
