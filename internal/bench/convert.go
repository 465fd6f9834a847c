package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/headstart-oci/headstart/internal/workload"
)

// benchConvert converts a two-layer gzip image of about 300 MB unpacked, with zstd, to
// RAFS v6: nydus-image makes both layers and merges them, optimizer makes, checks and
// packages the whole image.
func benchConvert(ctx context.Context, b *bench) (err error) {
	peer, err := b.tools.Ensure(ctx, "nydus-image")
	if err != nil {
		return err
	}
	img, err := workload.Build(ctx, workload.GoTool, workload.Options{Log: b.log})
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(b.dir, "convert-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	theirs, ours := filepath.Join(dir, "nydus"), filepath.Join(dir, "ours")
	peerSide := side{prepare: emptied(theirs)}
	merge := []string{peer, "merge", "--log-level", "error", "-B", filepath.Join(theirs, "merged.boot")}
	for i, layer := range img.Manifest.Layers {
		boot := filepath.Join(theirs, fmt.Sprintf("layer%d.boot", i))
		blob := filepath.Join(img.Dir, "blobs", layer.Digest.Algorithm().String(), layer.Digest.Encoded())
		peerSide.lines = append(peerSide.lines, []string{
			peer, "create", "--log-level", "error", "-t", "targz-rafs", "--fs-version", "6", "--compressor", "zstd",
			"--whiteout-spec", "none", "-B", boot, "-D", filepath.Join(theirs, "blobs"), blob,
		})
		merge = append(merge, boot)
	}
	peerSide.lines = append(peerSide.lines, merge)
	ourSide := side{prepare: emptied(ours), lines: [][]string{{
		b.bin + "optimizer", "convert", "--quiet", "--temp-dir", ours, "oci:" + img.Dir, "oci:" + filepath.Join(ours, "out") + ":bench",
	}}}
	theirRuns, ourRuns, err := compare(ctx, b.runs, peerSide, ourSide)
	if err != nil {
		return err
	}
	peerBytes, err := treeSize(theirs)
	if err != nil {
		return err
	}
	ourBytes, err := treeSize(filepath.Join(ours, "out"))
	if err != nil {
		return err
	}
	fmt.Fprintf(b.out, "\nconvert %s (%d layers), zstd, RAFS v6; median of %d interleaved runs\n", img.Reference, len(img.Manifest.Layers), b.runs)
	fmt.Fprintf(b.out, "%-44s %10s %10s %10s %10s\n", "", "wall", "cpu", "memory", "bytes")
	printSide(b, "nydus-image 2.2.0 create ×layers + merge", theirRuns, peerBytes)
	printSide(b, "optimizer convert (checked, packaged)", ourRuns, ourBytes)
	fmt.Fprintf(b.out, "%-44s %10.2f %10.2f %10.2f %10.3f\n", "ratio ours / theirs", ratio(medianWall(ourRuns), medianWall(theirRuns)),
		ratio(medianCPU(ourRuns), medianCPU(theirRuns)), float64(maxRSS(ourRuns))/float64(maxRSS(theirRuns)), float64(ourBytes)/float64(peerBytes))
	return nil
}

func printSide(b *bench, name string, s []sample, bytes int64) {
	fmt.Fprintf(b.out, "%-44s %9.2fs %9.2fs %10s %10s\n", name, medianWall(s).Seconds(), medianCPU(s).Seconds(), mib(maxRSS(s)), mb(bytes))
}

func ratio(a, b time.Duration) float64 { return a.Seconds() / b.Seconds() }

// emptied returns a preparation that leaves dir (with an empty blobs directory) new.
func emptied(dir string) func() error {
	return func() error {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		return os.MkdirAll(filepath.Join(dir, "blobs"), 0o755)
	}
}

// treeSize returns the bytes of the regular files below dir.
func treeSize(dir string) (int64, error) {
	var n int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += info.Size()
		}
		return err
	})
	return n, err
}
