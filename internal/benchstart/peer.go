package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/headstart-oci/headstart/internal/nydusimage"
)

// peerImage is the image that the real nydus-image has made.
type peerImage struct {
	tag  string
	repo string
}

// makePeer makes the image with nydus-image, zstd and chunks of its default size, with the list's files in its
// prefetch table, and pushes it as nydusify would.
func (b *bench) makePeer(ctx context.Context, img *image, dir, list string) (p peerImage, err error) {
	nydusImage, err := b.tools.Ensure(ctx, "nydus-image")
	if err != nil {
		return p, err
	}
	paths, err := b.command(ctx, nil, b.optimizer, "profile", "export", "--format", "paths", "-o", "-", list)
	if err != nil {
		return p, err
	}
	blobs := filepath.Join(dir, "peer")
	if err := os.Mkdir(blobs, 0o700); err != nil {
		return p, err
	}
	boot := filepath.Join(dir, "peer.boot")
	merge := []string{"merge", "--log-level", "error", "--prefetch-policy", "fs", "-B", boot, "-D", blobs}
	for i, l := range img.source.Manifest.Layers {
		one := filepath.Join(dir, fmt.Sprint("layer", i))
		if err := os.Mkdir(one, 0o700); err != nil {
			return p, err
		}
		if _, err := b.command(ctx, nil, nydusImage, "create", "--log-level", "error", "-t", "targz-rafs", "--fs-version", "6", "--compressor", "zstd",
			"--whiteout-spec", "oci", "--blob-inline-meta", "-D", one, filepath.Join(img.source.Dir, "blobs", l.Digest.Algorithm().String(), l.Digest.Encoded())); err != nil {
			return p, err
		}
		made, err := filepath.Glob(filepath.Join(one, "*"))
		if err != nil || len(made) != 1 {
			return p, errors.Join(err, fmt.Errorf("layer %d became the files %q, want one", i, made))
		}
		blob := filepath.Join(blobs, filepath.Base(made[0]))
		if err := os.Rename(made[0], blob); err != nil {
			return p, err
		}
		merge = append(merge, blob)
	}
	if _, err := b.command(ctx, paths, nydusImage, merge...); err != nil {
		return p, err
	}
	p = peerImage{repo: img.name + "-peer", tag: "nydus"}
	return p, b.pushPeer(ctx, p, boot, blobs)
}

// pushPeer pushes loose files as an image.
func (b *bench) pushPeer(ctx context.Context, p peerImage, boot, blobs string) error {
	n, err := nydusimage.OpenFiles(boot, blobs)
	if err != nil {
		return err
	}
	var add []mutate.Addendum
	for _, blob := range n.RAFS.Blobs {
		data, err := os.ReadFile(filepath.Join(blobs, blob.ID))
		if err != nil {
			return errors.Join(err, n.Close())
		}
		add = append(add, mutate.Addendum{
			Layer: static.NewLayer(data, nydusimage.MediaTypeBlob), MediaType: nydusimage.MediaTypeBlob,
			Annotations: map[string]string{nydusimage.AnnotationBlob: "true"},
		})
	}
	if err := n.Close(); err != nil {
		return err
	}
	layer, err := bootstrapTar(boot)
	if err != nil {
		return err
	}
	add = append(add, mutate.Addendum{
		Layer: static.NewLayer(layer, types.OCILayer), MediaType: types.OCILayer,
		Annotations: map[string]string{nydusimage.AnnotationBootstrap: "true", nydusimage.AnnotationFSVersion: "6"},
	})
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if image, err = mutate.Append(image, add...); err != nil {
		return err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return err
	}
	ref, err := name.ParseReference(b.registry.Host+"/"+p.repo+":"+p.tag, name.Insecure)
	if err != nil {
		return err
	}
	return remote.Write(ref, image, remote.WithContext(ctx))
}

// bootstrapTar returns the bootstrap as a layer: image/image.boot in a gzipped tar.
func bootstrapTar(boot string) ([]byte, error) {
	data, err := os.ReadFile(boot)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	tw := tar.NewWriter(z)
	err = errors.Join(tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "image", Mode: 0o755}),
		tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "image/image.boot", Mode: 0o444, Size: int64(len(data))}))
	if err == nil {
		_, err = tw.Write(data)
	}
	err = errors.Join(err, tw.Close(), z.Close())
	return out.Bytes(), err
}
