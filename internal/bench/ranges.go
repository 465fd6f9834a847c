package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/workload"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// rangeChunk is the chunk size of the blobs that benchRanges makes, in bytes.
const rangeChunk = 64 << 10

// benchRanges records the start of real programs on an ordinary overlay with whatever is cached, and
// holds the list against the truth: what the same start has to read when nothing is cached and
// nothing is read ahead, from an EROFS of its own.
func benchRanges(ctx context.Context, b *bench) error {
	fmt.Fprintf(b.out, "\nwhat a start touches, and the prefetch blob that is made of its list (chunks of %d KiB, zstd)\n", rangeChunk>>10)
	fmt.Fprintf(b.out, "%-18s %6s %10s %10s %10s %10s %9s %10s %10s %9s  %s\n", "", "files", "whole", "recorded", "certain", "truth", "covered",
		"blob raw", "blob", "covered", "grade")
	for _, name := range []workload.Name{workload.Nginx, workload.Python, workload.Node, workload.JDK} {
		if err := b.ranges(ctx, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// extent is a set of pages of one file.
type extent map[int64]bool

func (b *bench) ranges(ctx context.Context, name workload.Name) (err error) {
	img, err := workload.Build(ctx, name, workload.Options{Log: b.log})
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(b.dir, "ranges-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	root := filepath.Join(dir, "root")
	if err := unpackLayers(ctx, img, root); err != nil {
		return err
	}
	truth, err := coldPages(ctx, dir, root, img)
	if err != nil {
		return fmt.Errorf("cold start: %w", err)
	}
	stock := []string{"--root", root}
	for _, e := range img.Config.Config.Env {
		stock = append(stock, "--env", e)
	}
	stock = append(append(stock, "--"), img.Command()...)
	for _, how := range []struct {
		name string
		args []string
	}{{string(name), stock}, {string(name) + ", --exact", []string{"--exact", "--scratch", dir, "oci:" + img.Dir}}} {
		if err := b.rangesOf(ctx, dir, how.name, how.args, img, truth); err != nil {
			return fmt.Errorf("%s: %w", how.name, err)
		}
	}
	return nil
}

// rangesOf records a start, builds an image around the list, and prints both against the truth.
func (b *bench) rangesOf(ctx context.Context, dir, name string, args []string, img *workload.Image, truth map[string]extent) error {
	list := filepath.Join(dir, "list")
	record := []string{b.bin + "optimizer", "record", "--quiet", "--server-path", b.bin + "optimizer-server", "-o", list, "--timeout", startLimit + "s"}
	if _, err := timed(ctx, append(record, args...)); err != nil {
		return err
	}
	f, err := os.Open(list)
	if err != nil {
		return err
	}
	l, err := persist.Read(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, b.bin+"optimizer", "convert", "--quiet", "--temp-dir", dir, "--chunk-size", "64KiB", "--profile", list, "-o", "json",
		"oci:"+img.Dir, "oci:"+filepath.Join(dir, "out")+":bench").Output()
	if err != nil {
		return fmt.Errorf("convert: %w", err)
	}
	var made convert.Summary
	if err := json.Unmarshal(out, &made); err != nil {
		return fmt.Errorf("convert: %w", err)
	}
	b.printRanges(name, l, truth, made.Prefetch)
	return nil
}

// startLimit is how long a program may take to start, in seconds; servers are stopped then.
const startLimit = "5"

func unpackLayers(ctx context.Context, img *workload.Image, root string) error {
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	for _, l := range img.Manifest.Layers {
		blob := filepath.Join(img.Dir, "blobs", l.Digest.Algorithm().String(), l.Digest.Encoded())
		if _, err := timed(ctx, []string{"tar", "-C", root, "-xzf", blob}); err != nil {
			return err
		}
	}
	return nil
}

// coldPages starts the image's command, which is killed when it does not end, on a private, cold copy of its root and returns
// which pages the kernel had to read for it.
func coldPages(ctx context.Context, dir, root string, img *workload.Image) (pages map[string]extent, err error) {
	image, lower := filepath.Join(dir, "erofs"), filepath.Join(dir, "cold")
	if err := os.Mkdir(lower, 0o755); err != nil {
		return nil, err
	}
	if _, err := timed(ctx, []string{"mkfs.erofs", image, root}, []string{"mount", "-t", "erofs", "-o", "loop,ro", image, lower}); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unix.Unmount(lower, 0)) }()
	var st unix.Stat_t
	if err := unix.Stat(lower, &st); err != nil {
		return nil, err
	}
	ahead := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	if err := os.WriteFile(ahead, []byte("0"), 0o644); err != nil {
		return nil, err
	}
	over := filepath.Join(dir, "over")
	if err := os.Mkdir(over, 0o755); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "unshare", append([]string{"--mount", "--pid", "--fork", "sh", "-c", `
		mount -t tmpfs tmpfs "$0"; mkdir "$0/upper" "$0/work" "$0/merged"
		mount -t overlay overlay -o "lowerdir=$1,upperdir=$0/upper,workdir=$0/work" "$0/merged"
		mount -t proc proc "$0/merged/proc"; mount --rbind /dev "$0/merged/dev"
		shift; timeout -s KILL ` + startLimit + ` chroot "$0/merged" "$@"; code=$?; [ $code = 0 ] || [ $code = 137 ]`, over, lower}, img.Command()...)...)
	cmd.Env = img.Config.Config.Env // as recorded
	if said, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, tail(said))
	}
	pages = make(map[string]extent)
	err = filepath.WalkDir(lower, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		got, err := cachedPages(p)
		if len(got) > 0 {
			pages[strings.TrimPrefix(p, lower)] = got
		}
		return err
	})
	return pages, err
}

// cachedPages asks the kernel which pages of a file are cached (cachestat(2), Linux 6.5).
func cachedPages(name string) (extent, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	page := int64(os.Getpagesize())
	all := (info.Size() + page - 1) / page
	count := func(first, n int64) (int64, error) {
		var st unix.Cachestat_t
		err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{Off: uint64(first * page), Len: uint64(n * page)}, &st, 0) //nolint:gosec // positive
		return int64(st.Cache), err                                                                                         //nolint:gosec // pages of one file
	}
	n, err := count(0, max(all, 1))
	if err != nil || n == 0 {
		return nil, err
	}
	got := make(extent)
	for p := range all {
		n, err := count(p, 1)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			got[p] = true
		}
	}
	return got, nil
}

// printRanges prints one workload's row.
func (b *bench) printRanges(name string, l *persist.List, truth map[string]extent, blob convert.Prefetch) {
	page := int64(os.Getpagesize())
	var whole, recorded, certain, needed, covered, chunks int64
	found := make(map[string]int)
	for p := range truth {
		needed += int64(len(truth[p])) * page
	}
	for _, a := range l.Accesses {
		whole += a.Size
		upper, inChunk := make(extent), make(extent)
		ranges := a.Ranges
		if ranges == nil && a.Size > 0 {
			ranges = []trace.Range{{Length: a.Size}}
		}
		for _, r := range ranges {
			recorded += r.Length
			if r.Certain {
				certain += r.Length
			}
			for at := r.Offset; at < r.Offset+r.Length; at += page {
				upper[at/page], inChunk[at/rangeChunk] = true, true
			}
		}
		for p := range truth[a.Path] {
			if upper[p] {
				covered += page
				found[a.Path]++
			}
			if inChunk[p*page/rangeChunk] {
				chunks += page
			}
		}
	}
	for _, p := range slices.Sorted(maps.Keys(truth)) {
		if n := len(truth[p]) - found[p]; n > 0 {
			fmt.Fprintf(b.log, "bench: %s: %d of %d pages are not in the list: %s\n", name, n, len(truth[p]), p)
		}
	}
	if name == string(workload.Python) {
		b.aim("ranges: "+name+", prefetch blob, MB raw", float64(blob.RawBytes)/1e6, 32)
		b.aim("ranges: "+name+", prefetch blob, MB", float64(blob.Bytes)/1e6, 12.5)
		b.aim("ranges: "+name+", % of the truth that is not in it", 100-100*float64(chunks)/float64(max(needed, 1)), 0.1)
	}
	share := func(n int64) string { return fmt.Sprintf("%.2f %%", 100*float64(n)/float64(max(needed, 1))) }
	fmt.Fprintf(b.out, "%-18s %6d %10s %10s %10s %10s %9s %10s %10s %9s  %s\n", name, len(l.Accesses), mb(whole), mb(recorded), mb(certain), mb(needed),
		share(covered), mb(blob.RawBytes), mb(blob.Bytes), share(chunks), l.Grade)
}
