package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/headstart-oci/headstart/internal/workload"
)

// benchCheck checks and unpacks an image of one blob that nydus-image has made, whose unpack
// takes no more. nydus-image checks metadata alone; optimizer does with --no-data, and
// without it verifies every chunk, the blob's tables and its id besides.
func benchCheck(ctx context.Context, b *bench) (err error) {
	peer, err := b.tools.Ensure(ctx, "nydus-image")
	if err != nil {
		return err
	}
	img, err := workload.Build(ctx, workload.GoTool, workload.Options{Log: b.log})
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(b.dir, "check-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for i := range img.Manifest.Layers {
		if err := b.checkLayer(ctx, peer, filepath.Join(dir, fmt.Sprint(i)), img, i); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	return nil
}

// checkLayer runs the rows for an image of one layer.
func (b *bench) checkLayer(ctx context.Context, peer, dir string, img *workload.Image, layer int) error {
	one, err := makeOneBlob(ctx, peer, dir, img, layer)
	if err != nil {
		return err
	}
	fmt.Fprintf(b.out, "\ncheck and unpack of layer %d of %s, %s stored in one blob, RAFS v6, zstd; median of %d interleaved runs\n", layer, img.Reference, mb(one.size), b.runs)
	fmt.Fprintf(b.out, "%-34s %10s %10s %10s %10s %10s %10s\n", "", "wall", "cpu", "memory", "peer wall", "peer cpu", "ratio")
	ours := []string{b.bin + "optimizer", "--bootstrap", one.boot, "--blob-dir", one.blobs, "--quiet"}
	verb := func(name string, args ...string) []string {
		return append(append([]string{ours[0], name}, ours[1:]...), args...)
	}
	theirTar, ourTar := filepath.Join(dir, "theirs.tar"), filepath.Join(dir, "ours.tar")
	theirCheck := []string{peer, "check", "--log-level", "error", "-D", one.blobs, one.boot}
	theirUnpack := []string{peer, "unpack", "--log-level", "error", "-b", one.blob, "--output", theirTar, one.boot}
	for _, c := range []struct {
		name         string
		theirs, ours []string
		out          [2]string
		like         bool // both do the same
	}{
		{name: "check --no-data (as nydus-image)", like: true, theirs: theirCheck, ours: verb("check", "--no-data")},
		{name: "check, every chunk", theirs: theirCheck, ours: verb("check")},
		{name: "unpack to a tar", like: true, theirs: theirUnpack, ours: verb("unpack", "--output", ourTar), out: [2]string{theirTar, ourTar}},
	} {
		theirRuns, ourRuns, err := compare(ctx, b.runs, side{removed(c.out[0]), [][]string{c.theirs}}, side{removed(c.out[1]), [][]string{c.ours}})
		if err != nil {
			return err
		}
		fmt.Fprintf(b.out, "%-34s %9.2fs %9.2fs %10s %9.2fs %9.2fs %10.2f\n", c.name, medianWall(ourRuns).Seconds(), medianCPU(ourRuns).Seconds(), mib(maxRSS(ourRuns)),
			medianWall(theirRuns).Seconds(), medianCPU(theirRuns).Seconds(), ratio(medianWall(ourRuns), medianWall(theirRuns)))
		if c.like {
			b.aim(fmt.Sprintf("check: layer %d, %s, of nydus-image", layer, c.name), ratio(medianWall(ourRuns), medianWall(theirRuns)), 1)
		}
	}
	return nil
}

// removed returns a preparation that leaves no file of that name.
func removed(name string) func() error {
	return func() error {
		if err := os.Remove(name); err != nil && name != "" && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
}

// oneBlob is an image of one blob in files.
type oneBlob struct {
	boot, blob, blobs string // the bootstrap, the blob, and the directory it is in
	size              int64  // of the blob in bytes
}

// makeOneBlob has nydus-image make an image of one layer in dir.
func makeOneBlob(ctx context.Context, peer, dir string, img *workload.Image, n int) (o oneBlob, err error) {
	layer := img.Manifest.Layers[n]
	o.boot, o.blobs = filepath.Join(dir, "one.boot"), filepath.Join(dir, "one")
	if err := os.MkdirAll(o.blobs, 0o755); err != nil {
		return o, err
	}
	if _, err := timed(ctx, []string{
		peer, "create", "--log-level", "error", "-t", "targz-rafs", "--fs-version", "6", "--compressor", "zstd",
		"--whiteout-spec", "none", "-B", o.boot, "-D", o.blobs, filepath.Join(img.Dir, "blobs", layer.Digest.Algorithm().String(), layer.Digest.Encoded()),
	}); err != nil {
		return o, err
	}
	blobs, err := os.ReadDir(o.blobs)
	if err != nil {
		return o, err
	}
	if len(blobs) != 1 {
		return o, fmt.Errorf("nydus-image made %d blobs of one layer", len(blobs))
	}
	o.blob = filepath.Join(o.blobs, blobs[0].Name())
	o.size, err = treeSize(o.blobs)
	return o, err
}
