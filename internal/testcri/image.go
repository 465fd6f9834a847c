package testcri

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// StaticImage returns an image of one gzip layer with the program at binary as
// its entrypoint, /<base name>, and files by path in the image. The program must
// be static.
func StaticImage(binary string, files map[string][]byte) (v1.Image, error) {
	program, err := os.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	entry := "/" + filepath.Base(binary)
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, dir := range []string{"proc/", "sys/", "dev/", "etc/", "tmp/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
			return nil, err
		}
	}
	add := func(name string, mode int64, data []byte) error {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: path.Clean(name)[1:], Mode: mode, Size: int64(len(data))}
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("add %s to the layer: %w", name, err)
		}
		_, err := w.Write(data)
		return err
	}
	if err := add(entry, 0o755, program); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := add(path.Join("/", name), 0o644, files[name]); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(layer.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if img, err = mutate.AppendLayers(img, l); err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = runtime.GOOS, runtime.GOARCH
	config.Config.Entrypoint = []string{entry}
	config.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return mutate.ConfigFile(img, config)
}

// Import puts img into containerd's image store as ref, unpacked and ready for
// containers. ref is a full reference: docker.io/library/app:latest.
func (e *Env) Import(ctx context.Context, ref string, img v1.Image) (err error) {
	dir, err := os.MkdirTemp(e.dir, "import-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	l, err := layout.Write(dir, empty.Index)
	if err == nil {
		err = l.AppendImage(img)
	}
	if err != nil {
		return fmt.Errorf("import %s: %w", ref, err)
	}
	return e.ImportOCI(ctx, dir, ref)
}

// ImportOCI puts the image of an OCI layout, a directory or a tar archive, into
// containerd's image store as ref, unpacked and ready for containers. Where the
// layout's index has one entry, ref names that; else it names the index.
func (e *Env) ImportOCI(ctx context.Context, layoutPath, ref string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("import %s as %s: %w", layoutPath, ref, err)
		}
	}()
	fi, err := os.Stat(layoutPath)
	if err != nil {
		return err
	}
	name := containerd.WithDigestRef(func(digest.Digest) string { return ref })
	var archive io.ReadCloser
	if fi.IsDir() {
		n, err := indexEntries(layoutPath)
		if err != nil {
			return err
		}
		if n != 1 {
			name = containerd.WithIndexName(ref)
		}
		archive = tarOf(layoutPath)
	} else if archive, err = os.Open(layoutPath); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, archive.Close()) }()
	ctx = namespaces.WithNamespace(ctx, Namespace)
	client := e.Client()
	if _, err := client.Import(ctx, archive, name); err != nil {
		return err
	}
	img, err := client.GetImage(ctx, ref)
	if err != nil {
		return err
	}
	if err := img.Unpack(ctx, e.snaps); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	return e.waitImage(ctx, ref)
}

// indexEntries returns how many manifests an OCI layout's index names.
func indexEntries(dir string) (int, error) {
	text, err := os.ReadFile(filepath.Join(dir, ocispec.ImageIndexFile))
	if err != nil {
		return 0, err
	}
	var index ocispec.Index
	if err := json.Unmarshal(text, &index); err != nil {
		return 0, fmt.Errorf("%s: %w", ocispec.ImageIndexFile, err)
	}
	return len(index.Manifests), nil
}

// tarOf returns a tar stream of the regular files of dir. Closing it early ends
// the writer.
func tarOf(dir string) io.ReadCloser {
	r, w := io.Pipe()
	go func() {
		t := tar.NewWriter(w)
		err := t.AddFS(os.DirFS(dir))
		w.CloseWithError(errors.Join(err, t.Close()))
	}()
	return r
}

// waitImage returns once the CRI, which follows containerd's image store by its
// events, knows ref.
func (e *Env) waitImage(ctx context.Context, ref string) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		s, err := e.Images().ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
		if err != nil {
			return err
		}
		if s.GetImage() != nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the CRI does not see the image: %w", ctx.Err())
		}
	}
}

// Pull pulls ref through the CRI, as a kubelet does, and returns the image's ID.
func (e *Env) Pull(ctx context.Context, ref string) (string, error) {
	r, err := e.Images().PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		return "", fmt.Errorf("pull %s: %w", ref, err)
	}
	return r.GetImageRef(), nil
}
