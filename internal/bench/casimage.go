package main

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	ggcrlayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// image makes an image of layers.
func (r *casRig) image(ctx context.Context, name string, layers [][]casFile, flags ...string) (casImage, error) {
	img, err := mutate.ConfigFile(empty.Image, &ggcr.ConfigFile{Architecture: "amd64", OS: "linux", RootFS: ggcr.RootFS{Type: "layers"}})
	if err != nil {
		return casImage{}, err
	}
	for i, files := range layers {
		path := filepath.Join(r.dir, fmt.Sprintf("%s-%d.tar", name, i))
		if err := casTar(path, files); err != nil {
			return casImage{}, err
		}
		layer, err := tarball.LayerFromFile(path, tarball.WithCompressionLevel(1))
		if err == nil {
			img, err = mutate.AppendLayers(img, layer)
		}
		if err != nil {
			return casImage{}, err
		}
	}
	src, dst := filepath.Join(r.dir, name+"-src"), "oci:"+filepath.Join(r.dir, name)+":bench"
	path, err := ggcrlayout.Write(src, empty.Index)
	if err == nil {
		err = path.AppendImage(img)
	}
	if err == nil {
		_, err = timed(ctx, append([]string{r.b.bin + "optimizer", "convert", "--quiet", "--platform", "linux/amd64", "--temp-dir", r.dir, "oci:" + src, dst}, flags...))
	}
	return casImage{dst, layers}, errors.Join(err, os.RemoveAll(src))
}

func casTar(path string, files []casFile) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	for _, file := range files {
		if err := w.WriteHeader(&tar.Header{Name: file.name, Mode: 0o644, Size: int64(file.size), Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		if _, err := w.Write(file.bytes()); err != nil {
			return err
		}
	}
	return w.Close()
}

// casContent returns n files, of which those that shared says have the same bytes for all seeds.
func casContent(seed uint64, n int, shared func(i int) bool) []casFile {
	files := make([]casFile, n)
	for i := range files {
		number := seed<<32 | uint64(i)
		if shared(i) {
			number = uint64(i)
		}
		files[i] = casFile{fmt.Sprintf("d%d/f%05d", i%11, i), number, 4096 + int(sha256.Sum256(fmt.Append(nil, i))[0])*1500}
	}
	return files
}

// casUnique returns what the chunks of images take in blocks, each once, and each as often as images have it.
func casUnique(images ...casImage) (once, all int64) {
	seen := map[[32]byte]bool{}
	for _, img := range images {
		for _, files := range img.layers {
			for _, f := range files {
				for p := range slices.Chunk(f.bytes(), casChunk) {
					n := int64(len(p)+4095) &^ 4095
					all += n
					if sum := sha256.Sum256(p); !seen[sum] {
						seen[sum], once = true, once+n
					}
				}
			}
		}
	}
	return once, all
}
