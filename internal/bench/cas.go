package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

const (
	casChunk   = 64 << 10  // bytes of a chunk
	casChunks  = 5_000_000 // of the index that is looked up in
	casLookups = 200_000
	casFiles   = 400 // of an image
	casShared  = 320 // of these, those that all images have
)

// casRig is a directory with images, and a state directory.
type casRig struct {
	*lazyRig
	images map[string]casImage
}

// casImage is a converted image.
type casImage struct {
	ref    string
	layers [][]casFile
}

// casFile is a file of an image: random bytes that a number stands for.
type casFile struct {
	name   string
	number uint64
	size   int
}

func (f casFile) bytes() []byte {
	p := make([]byte, f.size)
	_, _ = rand.NewChaCha8(sha256.Sum256(fmt.Append(nil, f.number))).Read(p) // never fails
	return p
}

// benchCAS prints what it costs to look chunks up, and what sharing them saves.
func benchCAS(ctx context.Context, b *bench) error {
	if err := casLookup(ctx, b); err != nil {
		return err
	}
	return casParts(ctx, b, casMount, casPair, casWays, casPages)
}

// benchDisk prints what the caches of ten images of one base take.
func benchDisk(ctx context.Context, b *bench) error {
	return casParts(ctx, b, casLayers, casFlat, casXFS, casBtrfs)
}

func casParts(ctx context.Context, b *bench, parts ...func(context.Context, *casRig) error) error {
	for _, part := range parts {
		if err := casIn(ctx, b, part); err != nil {
			return err
		}
	}
	return nil
}

// casIn runs one part in a state directory of its own.
func casIn(ctx context.Context, b *bench, part func(context.Context, *casRig) error) (err error) {
	dir, err := os.MkdirTemp(b.dir, "cas-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r := &casRig{lazyRig: &lazyRig{b: b, dir: dir}, images: map[string]casImage{}}
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "state"), 0o700), os.Mkdir(filepath.Join(dir, "run"), 0o700)); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.endRunning(context.WithoutCancel(ctx))) }()
	return part(ctx, r)
}

// endRunning is end, where a daemon runs.
func (r *casRig) endRunning(ctx context.Context) error {
	if s, err := r.status(ctx); err != nil || s.PID == 0 {
		return err
	}
	return r.end(ctx)
}

var casMetric = regexp.MustCompile(`([0-9.]+) (median-ns|p99-ns|anon-MiB|file-MiB)`)

// casLookup runs the benchmark of the index, which is internal to another package.
func casLookup(ctx context.Context, b *bench) error {
	cmd := exec.CommandContext(ctx, "go", "test", "./pkg/lazy/internal/index", "-run", "^$", "-bench", "^BenchmarkLookup$", "-benchtime", fmt.Sprint(casLookups, "x"), "-timeout", "20m")
	cmd.Env = append(os.Environ(), fmt.Sprint("HEADSTART_BENCH_CHUNKS=", casChunks))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("benchmark of the index: %w: %s", err, tail(out))
	}
	found := casMetric.FindAllStringSubmatch(string(out), -1)
	if len(found) != 4 {
		return fmt.Errorf("benchmark of the index says %d figures, want 4: %s", len(found), tail(out))
	}
	slices.SortFunc(found, func(x, y []string) int { return strings.Compare(y[2], x[2]) })
	fmt.Fprintf(b.out, "\na look-up of one chunk in an index of %d, half of them there (%d look-ups; want a median below 20 µs)\n", casChunks, casLookups)
	for _, f := range found {
		what, unit, _ := strings.Cut(f[2], "-")
		what = map[string]string{"anon": "resident, the process' own", "file": "resident, page cache of the index"}[what] + map[string]string{"p99": "p99", "median": "median"}[what]
		fmt.Fprintf(b.out, "%-44s %10s %s\n", what, f[1], unit)
		if what == "median" {
			ns, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				return fmt.Errorf("benchmark of the index: %w", err)
			}
			b.aim(fmt.Sprintf("cas: look-up among %d chunks, median, µs", casChunks), ns/1000, 20)
		}
	}
	return nil
}

// disk returns what the caches take on disk.
func (r *casRig) disk() (n int64, err error) {
	err = filepath.WalkDir(filepath.Join(r.dir, "state", "blobs"), func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "data" {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("%s: no stat", p)
		}
		n += st.Blocks * 512
		return nil
	})
	return n, err
}

// of returns the numbers of the mount at dir.
func (r *casRig) of(ctx context.Context, dir string) (lazy.Mount, error) {
	s, err := r.status(ctx)
	for _, m := range s.Mounts {
		if m.Dir == dir {
			return m, nil
		}
	}
	return lazy.Mount{}, errors.Join(err, fmt.Errorf("no mount at %s", dir))
}

// check compares a mount with what its image should be.
func (img casImage) check(dir string) error {
	for _, files := range img.layers {
		for _, f := range files {
			p, err := os.ReadFile(filepath.Join(dir, f.name))
			if err != nil {
				return err
			}
			if !bytes.Equal(p, f.bytes()) {
				return fmt.Errorf("%s: wrong bytes", f.name)
			}
		}
	}
	return nil
}

// casMount compares mounts of an image of 100,000 chunks with and without sharing, beside one that has as many in the index.
func casMount(ctx context.Context, r *casRig) error {
	const files = 100
	var one, two []casFile
	for i := range files {
		f := casFile{fmt.Sprintf("f%d", i), uint64(i), 1000 * 4096}
		one = append(one, f)
		if f.number += 1 << 40; i%5 != 0 {
			f.number -= 1 << 40
		}
		two = append(two, f)
	}
	flags := []string{"--chunk-size", "4KiB", "--compressor", "none"}
	a, err := r.image(ctx, "one", [][]casFile{one}, flags...)
	if err != nil {
		return err
	}
	b, err := r.image(ctx, "two", [][]casFile{two}, flags...)
	if err != nil {
		return err
	}
	if _, err := r.mount(ctx, "a", "--background", "full", "--wait", a.ref); err != nil {
		return err
	}
	var took [2][]time.Duration
	for i := range 2 * (r.b.runs + 1) {
		way := []string{lazy.ShareNone, lazy.ShareAllowed}[(i+i/2)%2]
		began := time.Now()
		dir, err := r.mount(ctx, fmt.Sprint("b", i), "--background", "none", "--share", way, b.ref)
		if err != nil {
			return err
		}
		d := time.Since(began)
		if i > 1 {
			took[(i+i/2)%2] = append(took[(i+i/2)%2], d)
		}
		if err := r.optimizer(ctx, nil, "umount", dir); err != nil {
			return err
		}
	}
	without, with := median(took[0]), median(took[1])
	fmt.Fprintf(r.b.out, "\na mount of an image of %d chunks, 80 %% of them on the node (medians of %d interleaved; want less than 50 ms more)\n", files*1000, r.b.runs)
	fmt.Fprintf(r.b.out, "%-44s %10.1f ms\n%-44s %10.1f ms\n%-44s %+10.1f ms\n", "without sharing", ms(without), "with sharing", ms(with), "difference", ms(with-without))
	return nil
}

func median(d []time.Duration) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func fetched(m lazy.Mount) int64 {
	return m.Stats.Fetched().Bytes
}

// pair makes two images that share 80 % of their files.
func (r *casRig) pair(ctx context.Context) (a, b casImage, err error) {
	shared := func(i int) bool { return i*casShared/casFiles != (i+1)*casShared/casFiles }
	for i, img := range []*casImage{&a, &b} {
		if *img, err = r.image(ctx, fmt.Sprint("pair", i), [][]casFile{casContent(uint64(i)+1, casFiles, shared)}, "--chunk-size", "64KiB"); err != nil {
			return a, b, err
		}
	}
	return a, b, nil
}

// casPair prints what the second of two images fetches.
func casPair(ctx context.Context, r *casRig) error {
	a, b, err := r.pair(ctx)
	if err != nil {
		return err
	}
	if _, err := r.mount(ctx, "a", "--background", "full", "--wait", a.ref); err != nil {
		return err
	}
	dir, err := r.mount(ctx, "b", "--background", "none", b.ref)
	if err != nil {
		return err
	}
	if err := b.check(dir); err != nil {
		return err
	}
	m, err := r.of(ctx, dir)
	if err != nil {
		return err
	}
	once, all := casUnique(a, b)
	_, own := casUnique(b)
	fmt.Fprintf(r.b.out, "\ntwo images in one layer each that share %d of %d files; the whole second one was read and is right (want at most 21 %% fetched)\n", casShared, casFiles)
	fmt.Fprintf(r.b.out, "%-44s %9.1f %%\n%-44s %9.1f %%\n", "of its chunks only it has", 100*float64(once-(all-own))/float64(own), "of its bytes it fetched", 100*float64(fetched(m))/float64(own))
	return nil
}

// casLayers prints what ten images of one base take where the base is a layer of each.
func casLayers(ctx context.Context, r *casRig) error {
	fmt.Fprintf(r.b.out, "\nten images of one base, all read: caches against the unique chunks (want at most 1.02)\n")
	return r.ten(ctx, "the base is a layer of each", func(base, own []casFile) [][]casFile { return [][]casFile{base, own} }, r.disk)
}

func (r *casRig) ten(ctx context.Context, what string, layers func(base, own []casFile) [][]casFile, disk func() (int64, error)) error {
	base := casContent(0, casFiles, func(int) bool { return true })
	var images []casImage
	fetchedAll := int64(0)
	for i := range 10 {
		own := casContent(uint64(i)+100, 20, func(int) bool { return false })
		for j := range own {
			own[j].name = "own/" + own[j].name
		}
		img, err := r.image(ctx, fmt.Sprint("image", i), layers(base, own), "--chunk-size", "64KiB")
		if err != nil {
			return err
		}
		images = append(images, img)
		dir, err := r.mount(ctx, fmt.Sprint("mnt", i), "--background", "full", "--wait", img.ref)
		if err == nil {
			err = img.check(dir)
		}
		if err != nil {
			return err
		}
		m, err := r.of(ctx, dir)
		if err != nil {
			return err
		}
		fetchedAll += fetched(m)
	}
	size, err := disk()
	if err != nil {
		return err
	}
	once, all := casUnique(images...)
	fmt.Fprintf(r.b.out, "%-44s %10.3f  (%s of %s in all images; fetched %s)\n", what, float64(size)/float64(once), mib(once), mib(all), mib(fetchedAll))
	return nil
}

// casWays prints what the second image of a pair takes on disk with sharing and without, by how it is read.
func casWays(ctx context.Context, r *casRig) error {
	a, b, err := r.pair(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(r.b.out, "\nthe cache of a second image that shares 80 %%, with sharing against without (want at most 1)\n")
	for _, way := range []struct {
		name  string
		flags []string
		read  func(dir string) error
	}{
		{"sequential", []string{"--background", "none"}, b.check},
		{"random, 300 reads of 4 KiB", []string{"--background", "none"}, b.random},
		{"background, by itself", []string{"--background", "full", "--wait"}, func(string) error { return nil }},
	} {
		var sizes, wire [2]int64
		for i, how := range []string{lazy.ShareNone, lazy.ShareAllowed} {
			sub := &casRig{lazyRig: &lazyRig{b: r.b, dir: filepath.Join(r.dir, fmt.Sprint(len(way.name), i))}}
			if err := errors.Join(os.Mkdir(sub.dir, 0o700), os.Mkdir(filepath.Join(sub.dir, "state"), 0o700), os.Mkdir(filepath.Join(sub.dir, "run"), 0o700)); err != nil {
				return err
			}
			sizes[i], wire[i], err = sub.second(ctx, a, b, how, way.flags, way.read)
			if err := errors.Join(err, sub.endRunning(context.WithoutCancel(ctx))); err != nil {
				return err
			}
		}
		fmt.Fprintf(r.b.out, "%-44s %10.3f  (%s against %s; fetched %s against %s)\n", way.name, float64(sizes[1])/float64(sizes[0]), mib(sizes[1]), mib(sizes[0]), mib(wire[1]), mib(wire[0]))
	}
	return nil
}

// second mounts a whole, then b, reads it, and returns what b took on disk and over the wire.
func (r *casRig) second(ctx context.Context, a, b casImage, how string, flags []string, read func(string) error) (size, wire int64, err error) {
	if _, err := r.mount(ctx, "a", "--background", "full", "--wait", "--share", how, a.ref); err != nil {
		return 0, 0, err
	}
	before, err := r.disk()
	if err != nil {
		return 0, 0, err
	}
	dir, err := r.mount(ctx, "b", append(flags, "--share", how, b.ref)...)
	if err != nil {
		return 0, 0, err
	}
	if err := read(dir); err != nil {
		return 0, 0, err
	}
	m, err := r.of(ctx, dir)
	if err != nil {
		return 0, 0, err
	}
	after, err := r.disk()
	return after - before, fetched(m), err
}

// random reads the same places each time.
func (img casImage) random(dir string) error {
	random := rand.New(rand.NewPCG(8, 9)) // the same places each time
	p := make([]byte, 4096)
	for range 300 {
		file := img.layers[0][random.IntN(len(img.layers[0]))]
		f, err := os.Open(filepath.Join(dir, file.name))
		if err != nil {
			return err
		}
		_, err = f.ReadAt(p, int64(random.IntN(max(1, file.size/4096)))*4096)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// casPages prints what the page cache has of one file that is read through two mounts, and whether the kernel would share it.
func casPages(ctx context.Context, r *casRig) error {
	files := []casFile{{"same", 1, 8 << 20}}
	img, err := r.image(ctx, "one", [][]casFile{files}, "--chunk-size", "64KiB")
	if err != nil {
		return err
	}
	var pages []uint64
	for i := range 2 {
		dir, err := r.mount(ctx, fmt.Sprint("mnt", i), "--background", "full", "--wait", img.ref)
		if err != nil {
			return err
		}
		if err := img.check(dir); err != nil {
			return err
		}
		n, err := cached(filepath.Join(dir, files[0].name))
		if err != nil {
			return err
		}
		pages = append(pages, n)
	}
	data, err := filepath.Glob(filepath.Join(r.dir, "state", "blobs", "*", "data"))
	if err != nil {
		return err
	}
	if len(data) != 1 {
		return fmt.Errorf("%d cache files, want 1", len(data))
	}
	below, err := cached(data[0])
	if err != nil {
		return err
	}
	offers := "no"
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen: %w", err)
	}
	if unix.FsconfigSetFlag(fd, "inode_share") == nil {
		offers = "yes"
	}
	fmt.Fprintf(r.b.out, "\npages in memory of a file of %d pages that two mounts read (the kernel offers to share them: %s)\n", files[0].size/4096, offers)
	fmt.Fprintf(r.b.out, "%-44s %10d\n%-44s %10d\n%-44s %10d\n", "of the first mount", pages[0], "of the second mount", pages[1], "of the cache file, which both read", below)
	return unix.Close(fd)
}

// cached returns how many pages of a file are in memory.
func cached(path string) (pages uint64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var all unix.CachestatRange
	var got unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &all, &got, 0); err != nil {
		return 0, fmt.Errorf("cachestat %s: %w", path, err)
	}
	return got.Cache, nil
}
