package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/endproc"
	"github.com/headstart-oci/headstart/internal/nydusd"
	"github.com/headstart-oci/headstart/internal/peakmem"
	"github.com/headstart-oci/headstart/internal/workload"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

const (
	lazyPairs  = 40        // of timed reads of each side
	lazyMounts = 20        // whose daemon's memory is printed
	lazyBytes  = 100 << 20 // of files that are read
	lazyReads  = 20_000    // random reads of 4 KiB in one timed run
)

// lazyRig is a state directory with a daemon and a holder of its own.
type lazyRig struct {
	b    *bench
	dir  string
	boot string // the image's bare bootstrap, once it was kept
}

// benchLazy reads a complete lazy mount against a plain EROFS mount of the same tree and against nydusd, all in the page cache, whole
// trees while they are fetched from a registry, and prints the memory of a daemon that serves many mounts.
func benchLazy(ctx context.Context, b *bench) (err error) {
	dir, err := os.MkdirTemp(b.dir, "lazy-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r := &lazyRig{b: b, dir: dir}
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "state"), 0o700), os.Mkdir(filepath.Join(dir, "run"), 0o700)); err != nil {
		return err
	}
	img, err := workload.Build(ctx, workload.Python, workload.Options{Log: b.log})
	if err != nil {
		return err
	}
	layout := filepath.Join(dir, "layout")
	ref := "oci:" + layout + ":bench"
	if _, err := timed(ctx, []string{b.bin + "optimizer", "convert", "--quiet", "--temp-dir", dir, "oci:" + img.Dir, ref}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.end(context.WithoutCancel(ctx))) }()
	if err := r.warmReads(ctx, img, layout); err != nil {
		return fmt.Errorf("warm reads: %w", err)
	}
	if err := r.coldReads(ctx, "oci:"+img.Dir); err != nil {
		return fmt.Errorf("cold reads: %w", err)
	}
	return r.memory(ctx, ref)
}

// warmReads prints the ratios of reads.
func (r *lazyRig) warmReads(ctx context.Context, img *workload.Image, layout string) (err error) {
	root, image, plain := filepath.Join(r.dir, "root"), filepath.Join(r.dir, "erofs"), filepath.Join(r.dir, "plain")
	if err := errors.Join(unpackLayers(ctx, img, root), os.Mkdir(plain, 0o755)); err != nil {
		return err
	}
	if _, err := timed(ctx, []string{"mkfs.erofs", image, root}); err != nil {
		return err
	}
	if err := unix.Mount(image, plain, "erofs", unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount %s: %w", image, err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(plain, 0)) }()
	ours, err := r.mount(ctx, "warm", "--background", "full", "--wait", "oci:"+layout+":bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.optimizer(context.WithoutCancel(ctx), nil, "umount", ours)) }()
	if err := r.keepBootstrap(ctx); err != nil {
		return err
	}
	peer, err := r.nydusd(ctx, nydusd.Files(filepath.Join(layout, "blobs", "sha256")))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, peer.Close()) }()
	names, err := largest(root, lazyBytes)
	if err != nil {
		return err
	}
	fmt.Fprintf(r.b.out, "\nreads of a complete lazy mount in the page cache; %d interleaved pairs, ratio of times and its 95 %% interval\n", lazyPairs)
	for _, way := range []struct {
		name string
		read func(dir string, names []string) error
	}{{"sequential, 128 KiB at a time", readWhole}, {"random, 4 KiB at a time", readRandom}} {
		if err := r.warmPairs(way.name, []string{plain, ours, plain, peer.Mount}, names, way.read); err != nil {
			return err
		}
	}
	return nil
}

// warmPairs prints the rows of one way to read: dirs are plain, ours, plain again, and nydusd's.
func (r *lazyRig) warmPairs(name string, dirs, names []string, read func(dir string, names []string) error) error {
	var plain, same, peer []float64
	for i := range lazyPairs + 1 {
		took := make([]float64, len(dirs))
		for j := range dirs {
			k := (i + j) % len(dirs) // who is first changes
			began := time.Now()
			if err := read(dirs[k], names); err != nil {
				return err
			}
			took[k] = time.Since(began).Seconds()
		}
		if i > 0 { // the first run fills the page cache
			plain, same = append(plain, math.Log(took[1]/took[0])), append(same, math.Log(took[2]/took[0]))
			peer = append(peer, math.Log(took[1]/took[3]))
		}
	}
	for _, row := range []struct {
		name string
		logs []float64
		most float64
	}{{name + ", of plain EROFS", plain, 1.05}, {"  plain EROFS, of itself", same, 0}, {name + ", of nydusd", peer, 1}} {
		mean, half := interval(row.logs)
		fmt.Fprintf(r.b.out, "%-44s %10.3f  %.3f to %.3f\n", row.name, math.Exp(mean), math.Exp(mean-half), math.Exp(mean+half))
		if row.most > 0 {
			r.b.aim("lazy: "+row.name, math.Exp(mean), row.most)
		}
	}
	return nil
}

// largest returns the largest regular files of a tree, as many as have n bytes together, relative to it.
func largest(root string, n int64) ([]string, error) {
	type file struct {
		name string
		size int64
	}
	var files []file
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			files = append(files, file{strings.TrimPrefix(p, root), info.Size()})
		}
		return err
	})
	slices.SortFunc(files, func(a, b file) int { return int(b.size - a.size) })
	var names []string
	for _, f := range files {
		if n <= 0 {
			break
		}
		names, n = append(names, f.name), n-f.size
	}
	return names, err
}

func readWhole(dir string, names []string) error {
	b := make([]byte, 128<<10)
	for _, name := range names {
		f, err := os.Open(dir + name)
		if err != nil {
			return err
		}
		_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, b)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// readRandom reads the same places each time.
func readRandom(dir string, names []string) error {
	random := rand.New(rand.NewPCG(3, 4)) // the same places each time
	b := make([]byte, 4<<10)
	for _, name := range names {
		f, err := os.Open(dir + name)
		if err != nil {
			return err
		}
		info, err := f.Stat()
		for range lazyReads / len(names) {
			if err == nil {
				_, err = f.ReadAt(b, random.Int64N(max(1, info.Size()/int64(len(b))))*int64(len(b)))
			}
			if errors.Is(err, io.EOF) {
				err = nil
			}
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// memory prints the largest resident sets of a daemon and its holder that serve many mounts, after all were read.
func (r *lazyRig) memory(ctx context.Context, ref string) error {
	var dirs []string
	for i := range lazyMounts {
		dir, err := r.mount(ctx, "many"+strconv.Itoa(i), "--background", "none", ref)
		if err != nil {
			return err
		}
		dirs = append(dirs, dir)
	}
	for _, dir := range dirs {
		if _, err := timed(ctx, []string{"sh", "-c", `find "$0" -xdev -type f -exec cat {} + > /dev/null`, dir + "/usr/lib/python3"}); err != nil {
			return err
		}
	}
	s, err := r.status(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(r.b.out, "\nmemory with %d lazy mounts, each read in part (largest resident sets)\n", len(dirs))
	for _, p := range []struct {
		name string
		pid  int
	}{{"daemon", s.PID}, {"holder", s.Holder}} {
		rss, err := peakmem.RSS(p.pid)
		if err != nil {
			return err
		}
		fmt.Fprintf(r.b.out, "%-44s %10s\n", p.name, mib(rss))
	}
	for _, dir := range dirs {
		if err := r.optimizer(ctx, nil, "umount", dir); err != nil {
			return err
		}
	}
	return nil
}

func (r *lazyRig) mount(ctx context.Context, name string, args ...string) (string, error) {
	dir := filepath.Join(r.dir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	return dir, r.optimizer(ctx, nil, "mount", append(args, dir)...)
}

func (r *lazyRig) status(ctx context.Context) (s lazy.Status, err error) {
	var out bytes.Buffer
	if err := r.optimizer(ctx, &out, "status", "-o", "json"); err != nil {
		return s, err
	}
	return s, json.Unmarshal(out.Bytes(), &s)
}

func (r *lazyRig) optimizer(ctx context.Context, out io.Writer, verb string, args ...string) error {
	all := append([]string{verb, "--state-dir", filepath.Join(r.dir, "state"), "--run-dir", filepath.Join(r.dir, "run")}, args...)
	cmd := exec.CommandContext(ctx, r.b.bin+"optimizer", all...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("optimizer %s: %w: %s", strings.Join(all, " "), err, tail(said.Bytes()))
	}
	return nil
}

// end unmounts what an error left and ends holder and daemon.
func (r *lazyRig) end(ctx context.Context) error {
	s, err := r.status(ctx)
	if err != nil {
		return err
	}
	for _, m := range s.Mounts {
		if !mounted(m.Dir) {
			continue // a mount namespace that somebody made meanwhile has it too
		}
		err = errors.Join(err, r.optimizer(ctx, nil, "umount", "--lazy", m.Dir))
	}
	err = errors.Join(err, endproc.Logging(filepath.Join(r.dir, "run"), s.Spare, s.Holder, s.PID))
	return err
}

// mounted reports whether something is mounted at dir.
func mounted(dir string) bool {
	var at, above unix.Stat_t
	return unix.Stat(dir, &at) == nil && unix.Stat(filepath.Dir(dir), &above) == nil && at.Dev != above.Dev
}
