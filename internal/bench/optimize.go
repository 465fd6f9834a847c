package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/workload"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// optimizeFiles is how many files a start reads, about: numpy and flask read 336.
const optimizeFiles = 320

// benchOptimize gives a Nydus image of about 300 MB unpacked a prefetch blob for some of its
// files, as they are stored and compressed anew, and for its largest, most of its data. There is no peer: nydus-image 2.2.0 does not
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
		for _, c := range []struct {
			name    string
			largest bool
			more    []string
		}{
			{name: "as stored"},
			{name: "compressed anew", more: []string{"--recompress"}},
			{name: "the largest, as stored", largest: true},
		} {
			if err := listFiles(ctx, source, list, c.largest); err != nil {
				return err
			}
			runs, size, err := b.optimizeRuns(ctx, dir, "v"+version, append([]string{"--prefetch-files", list}, c.more...))
			if err != nil {
				return err
			}
			printSide(b, "RAFS v"+version+", "+c.name, runs, size)
			b.aim("optimize: RAFS v"+version+", "+c.name+", seconds", medianWall(runs).Seconds(), 0.5)
			b.aim("optimize: RAFS v"+version+", "+c.name+", MiB of memory", float64(maxRSS(runs))/(1<<20), 64)
		}
	}
	return nil
}

// optimizeRuns optimizes an image again and again, each time in a layout that has only the source, so that all
// that is new is written, and returns the size of the prefetch blob too.
func (b *bench) optimizeRuns(ctx context.Context, dir, tag string, more []string) (runs []sample, size int64, err error) {
	out := filepath.Join(dir, "out")
	source, target := "oci:"+out+":"+tag, "oci:"+out+":fast"
	line := append([]string{b.bin + "optimizer", "optimize", "--quiet", "--temp-dir", dir}, append(more, source, target)...)
	for i := range b.runs + 1 {
		if err := freshLayout(filepath.Join(dir, "images"), out); err != nil {
			return nil, 0, err
		}
		s, err := timed(ctx, line)
		if err != nil {
			return nil, 0, err
		}
		if i > 0 { // the first warms up
			runs = append(runs, s)
		}
	}
	size, err = prefetchSize(ctx, target)
	return runs, size, err
}

// freshLayout makes a layout anew as another one is. Blobs are links: nobody writes them.
func freshLayout(from, to string) error {
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	return filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		other := filepath.Join(to, strings.TrimPrefix(name, from))
		switch {
		case d.IsDir():
			return os.MkdirAll(other, 0o755)
		case filepath.Base(filepath.Dir(name)) == "sha256":
			return linkOrCopy(name, other)
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		return os.WriteFile(other, data, 0o600)
	})
}

// listFiles writes a list of optimizeFiles files of an image: the largest, or evenly spread ones in the order of paths.
func listFiles(ctx context.Context, ref, list string, largest bool) error {
	img, err := nydusimage.Open(ctx, ref, nydusimage.Options{})
	if err != nil {
		return err
	}
	var paths []string
	sizes := map[string]uint64{}
	err = img.RAFS.Walk(func(p string, ino *rafs.Inode) error {
		if ino.IsRegular() && ino.Size > 0 {
			paths, sizes[p] = append(paths, p), ino.Size
		}
		return nil
	})
	if err = errors.Join(err, img.Close()); err != nil {
		return err
	}
	if len(paths) < optimizeFiles {
		return fmt.Errorf("the image has %d files, want %d", len(paths), optimizeFiles)
	}
	if largest {
		slices.SortStableFunc(paths, func(a, b string) int { return cmp.Compare(sizes[b], sizes[a]) })
		paths = paths[:optimizeFiles]
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
