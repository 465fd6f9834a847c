package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/workload"
)

// benchConvert converts gzip images with zstd to RAFS v6: nydus-image makes the layers, one after the other, and
// merges them, optimizer makes, checks and packages the whole image. The first has two layers of
// about 300 MB unpacked, half of it Debian and half Go.
func benchConvert(ctx context.Context, b *bench) (err error) {
	peer, err := b.tools.Ensure(ctx, "nydus-image")
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(b.dir, "convert-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	images, err := convertImages(ctx, b, filepath.Join(dir, "mixed"))
	if err != nil {
		return err
	}
	for _, img := range images {
		if err := b.convertOne(ctx, peer, dir, img); err != nil {
			return fmt.Errorf("%s: %w", img.Reference, err)
		}
	}
	return nil
}

// convertImages returns the images to convert; the mixed one is made in dir. Without Debian's there
// is only Go's.
func convertImages(ctx context.Context, b *bench, dir string) ([]*workload.Image, error) {
	goTool, err := workload.Build(ctx, workload.GoTool, workload.Options{Log: b.log})
	if err != nil {
		return nil, err
	}
	python, err := workload.Build(ctx, workload.Python, workload.Options{Log: b.log})
	if errors.Is(err, workload.ErrUnavailable) {
		fmt.Fprintf(b.log, "bench: convert: %v\n", err)
		return []*workload.Image{goTool}, nil
	}
	if err != nil {
		return nil, err
	}
	var layers []ocispec.Descriptor
	var diffIDs []digest.Digest
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return nil, err
	}
	for i, img := range []*workload.Image{python, goTool} {
		n := i * (len(img.Manifest.Layers) - 1) // Debian below, the compiler above
		layers, diffIDs = append(layers, img.Manifest.Layers[n]), append(diffIDs, img.Config.RootFS.DiffIDs[n])
		name := filepath.Join("blobs", "sha256", layers[i].Digest.Encoded())
		if err := linkOrCopy(filepath.Join(img.Dir, name), filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	if err := writeLayout(dir, layers, diffIDs); err != nil {
		return nil, err
	}
	mixed := &workload.Image{Dir: dir, Reference: "bench (Debian and Go)"}
	mixed.Manifest.Layers = layers
	return []*workload.Image{mixed, goTool, python}, nil
}

// linkOrCopy makes a file of the same content, on another filesystem as a copy. It holds none of it in
// memory: a child's largest resident set counts that of the process that started it.
func linkOrCopy(from, to string) (err error) {
	if os.Link(from, to) == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func (b *bench) convertOne(ctx context.Context, peer, dir string, img *workload.Image) error {
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
	peerBytes, err := packagedSize(filepath.Join(theirs, "blobs"), filepath.Join(theirs, "merged.boot"))
	if err != nil {
		return err
	}
	ourBytes, err := treeSize(filepath.Join(ours, "out"))
	if err != nil {
		return err
	}
	plain, err := unpackedSize(img)
	if err != nil {
		return err
	}
	fmt.Fprintf(b.out, "\nconvert %s (%d layers, %s unpacked), zstd, RAFS v6; median of %d interleaved runs\n",
		img.Reference, len(img.Manifest.Layers), mb(plain), b.runs)
	fmt.Fprintf(b.out, "bytes: the blobs and the gzipped bootstrap, and for ours the manifest and the config\n")
	fmt.Fprintf(b.out, "%-44s %10s %10s %10s %10s\n", "", "wall", "cpu", "memory", "bytes")
	printSide(b, "nydus-image 2.2.0, layer by layer, + merge", theirRuns, peerBytes)
	printSide(b, "optimizer convert (checked, packaged)", ourRuns, ourBytes)
	fmt.Fprintf(b.out, "%-44s %10.2f %10.2f %10.2f %10.3f\n", "ratio ours / theirs", ratio(medianWall(ourRuns), medianWall(theirRuns)),
		ratio(medianCPU(ourRuns), medianCPU(theirRuns)), float64(maxRSS(ourRuns))/float64(maxRSS(theirRuns)), float64(ourBytes)/float64(peerBytes))
	b.aim("convert: "+img.Reference+", wall of nydus-image", ratio(medianWall(ourRuns), medianWall(theirRuns)), 0.5)
	b.aim("convert: "+img.Reference+", bytes of nydus-image", float64(ourBytes)/float64(peerBytes), 1.03)
	return nil
}

// packagedSize returns the bytes that an image of these blobs and this bootstrap takes in a registry, without
// its manifest and config: the blobs as they are, the bootstrap as a gzipped layer, as ours are.
func packagedSize(blobs, bootstrap string) (n int64, err error) {
	if n, err = treeSize(blobs); err != nil {
		return 0, err
	}
	data, err := os.ReadFile(bootstrap)
	if err != nil {
		return 0, err
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(data); err != nil {
		return 0, err
	}
	if err := z.Close(); err != nil {
		return 0, err
	}
	return n + int64(packed.Len()), nil
}

// unpackedSize returns the bytes of an image's tars.
func unpackedSize(img *workload.Image) (n int64, err error) {
	for _, layer := range img.Manifest.Layers {
		f, err := os.Open(filepath.Join(img.Dir, "blobs", layer.Digest.Algorithm().String(), layer.Digest.Encoded()))
		if err != nil {
			return 0, err
		}
		z, err := gzip.NewReader(f)
		if err == nil {
			var m int64
			m, err = io.Copy(io.Discard, z)
			n += m
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return 0, err
		}
	}
	return n, nil
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
