package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/workload"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// optimizeFiles is how many files a start reads, about: numpy and flask read 336.
const optimizeFiles = 320

// benchOptimize gives a Nydus image of about 300 MB unpacked a prefetch blob for some of its
// files, as they are stored and compressed anew. There is no peer: nydus-image 2.2.0 does not
// do it, and what later ones make of v6 images is refused by their own check.
func benchOptimize(ctx context.Context, b *bench) (err error) {
	img, err := workload.Build(ctx, workload.GoTool, workload.Options{Log: b.log})
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(b.dir, "optimize-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	list := filepath.Join(dir, "list")
	fmt.Fprintf(b.out, "\noptimize %s, %d files; median of %d runs\n", img.Reference, optimizeFiles, b.runs)
	fmt.Fprintf(b.out, "%-44s %10s %10s %10s %10s\n", "", "wall", "cpu", "memory", "bytes")
	for _, version := range []string{"6", "5"} {
		source := "oci:" + filepath.Join(dir, "images") + ":v" + version
		if _, err := timed(ctx, []string{b.bin + "optimizer", "convert", "--quiet", "--temp-dir", dir, "--fs-version", version, "oci:" + img.Dir, source}); err != nil {
			return err
		}
		if err := everyNth(ctx, source, list); err != nil {
			return err
		}
		for _, more := range [][]string{nil, {"--recompress"}} {
			target := source + "-fast"
			line := append([]string{b.bin + "optimizer", "optimize", "--quiet", "--temp-dir", dir, "--prefetch-files", list, source, target}, more...)
			var runs []sample
			for i := range b.runs + 1 {
				s, err := timed(ctx, line)
				if err != nil {
					return err
				}
				if i > 0 { // the first warms up
					runs = append(runs, s)
				}
			}
			size, err := prefetchSize(ctx, target)
			if err != nil {
				return err
			}
			name := "RAFS v" + version + ", chunks as they are stored"
			if more != nil {
				name = "RAFS v" + version + ", compressed anew"
			}
			printSide(b, name, runs, size)
		}
	}
	return nil
}

// everyNth writes a list of optimizeFiles files of an image, evenly spread in the order of paths.
func everyNth(ctx context.Context, ref, list string) error {
	img, err := nydusimage.Open(ctx, ref, nydusimage.Options{})
	if err != nil {
		return err
	}
	var paths []string
	err = img.RAFS.Walk(func(p string, ino *rafs.Inode) error {
		if ino.IsRegular() && ino.Size > 0 {
			paths = append(paths, p)
		}
		return nil
	})
	if err = errors.Join(err, img.Close()); err != nil {
		return err
	}
	if len(paths) < optimizeFiles {
		return fmt.Errorf("the image has %d files, want %d", len(paths), optimizeFiles)
	}
	var text bytes.Buffer
	for i := range optimizeFiles {
		text.WriteString(paths[i*len(paths)/optimizeFiles] + "\n")
	}
	return os.WriteFile(list, text.Bytes(), 0o600)
}

// prefetchSize returns the bytes of an image's prefetch blob.
func prefetchSize(ctx context.Context, ref string) (int64, error) {
	img, err := nydusimage.Open(ctx, ref, nydusimage.Options{})
	if err != nil {
		return 0, err
	}
	n, ok := img.PrefetchBlob()
	size := int64(0)
	if ok {
		size = int64(img.RAFS.Blobs[n].CompressedSize) //nolint:gosec // a file's size
	} else {
		err = errors.New("the result has no prefetch blob")
	}
	return size, errors.Join(err, img.Close())
}
