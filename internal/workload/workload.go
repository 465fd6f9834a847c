// Package workload makes real container images to run: a static program, a burst of
// 60,000 small files, the Go toolchain, and Debian's python3 with numpy and flask, nginx, node with some
// packages, and Java. Tests, the demo and the benchmarks share them.
//
// An image is an OCI layout in a cache directory outside the source tree, named after
// what it is made of (its recipe): a recipe that changes gives a new directory. Images
// are published by rename under a lock, so any number of processes may ask for the same
// image at once and one of them builds it.
//
//	img, err := workload.Build(ctx, workload.GoTool, workload.Options{Log: os.Stderr})
//	if err != nil { … }
//	err = img.WriteArchive(w) // a tar that container runtimes import
//
// Limits: Linux only; root is needed for every image but the static ones; the Debian
// images need debootstrap and a package mirror the first time.
package workload

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Name names one of the images that [Build] makes.
type Name string

// The images.
const (
	// Static is one small static program and a few data files; its layers hold a
	// whiteout, an opaque directory, hard links and extended attributes too.
	Static Name = "static"
	// Burst is BurstFiles small files and a static program that reads all of them.
	Burst Name = "burst"
	// GoTool is the Go toolchain of this machine; its command reads thousands of files.
	GoTool Name = "gotool"
	// Python is Debian with python3, numpy and flask and a small server.
	Python Name = "python"
	// Nginx is Debian with nginx.
	Nginx Name = "nginx"
	// Node is Debian with node, some packages and a small server.
	Node Name = "node"
	// JDK is Debian with a headless Java runtime and a small server, compiled.
	JDK Name = "jdk"
)

// BurstFiles is the number of small files in the [Burst] image.
const BurstFiles = 60000

// BuildTimeout bounds one build when Options.Timeout is zero; a cold Debian image takes
// about a minute on two cores.
const BuildTimeout = 10 * time.Minute

// ErrUnavailable says that an image cannot be made on this machine: a tool, root or the
// package mirror is missing. Tests skip on it.
var ErrUnavailable = errors.New("workload unavailable here")

// Options are the settings of [Build]; the zero value is ready to use.
type Options struct {
	CacheDir string        // where images are kept; empty: headstart/images in os.UserCacheDir
	Log      io.Writer     // progress, one line per step; nil: none
	Timeout  time.Duration // bound of a build; 0: BuildTimeout
}

// Names returns all names in the order in which a reader would try them.
func Names() []Name { return []Name{Static, Burst, GoTool, Python, Nginx, Node, JDK} }

// recipe says what an image is made of and how.
type recipe struct {
	name      Name
	reference string
	inputs    []string // everything the result depends on; hashed into the directory name
	// build fills the layout that b writes; scratch is an empty directory for its use.
	build func(ctx context.Context, b *layoutWriter, scratch string) error
}

// dirName returns the recipe's directory in the cache.
func (r *recipe) dirName() string {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%s\n", layoutVersion, r.reference)
	for _, in := range r.inputs {
		fmt.Fprintf(h, "%d %s\n", len(in), in)
	}
	return string(r.name) + "-" + hex.EncodeToString(h.Sum(nil))[:16]
}

// Build returns the image called name, from the cache or newly made. It returns
// ErrUnavailable when this machine lacks what the image is made with. Safe for
// concurrent use, by several processes too.
func Build(ctx context.Context, name Name, o Options) (*Image, error) {
	if o.Log == nil {
		o.Log = io.Discard
	}
	if o.Timeout == 0 {
		o.Timeout = BuildTimeout
	}
	if o.CacheDir == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("find cache directory: %w", err)
		}
		o.CacheDir = filepath.Join(dir, "headstart", "images")
	}
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	r, err := recipeOf(ctx, name, o)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	img, err := cached(ctx, o, r)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	return img, nil
}

func recipeOf(ctx context.Context, name Name, o Options) (*recipe, error) {
	switch name {
	case Static:
		return staticRecipe(ctx)
	case Burst:
		return burstRecipe(ctx)
	case GoTool:
		return goToolRecipe(ctx)
	case Python, Nginx, Node, JDK:
		return debianRecipe(ctx, name, o)
	}
	return nil, fmt.Errorf("unknown workload %q, want one of %v", name, Names())
}

// cached opens the recipe's directory, building it first under a lock when it is absent.
func cached(ctx context.Context, o Options, r *recipe) (*Image, error) {
	dir := filepath.Join(o.CacheDir, r.dirName())
	if img, err := Open(dir); err == nil {
		return img, nil
	}
	err := once(ctx, o, dir, func(ctx context.Context, tmp string) error {
		fmt.Fprintf(o.Log, "workload %s: building %s\n", r.name, dir)
		start := time.Now()
		w, err := newLayoutWriter(filepath.Join(tmp, "layout"), o.Log)
		if err != nil {
			return err
		}
		scratch := filepath.Join(tmp, "scratch")
		if err := os.Mkdir(scratch, 0o755); err != nil {
			return err
		}
		if err := r.build(ctx, w, scratch); err != nil {
			return err
		}
		if err := w.finish(r.reference); err != nil {
			return err
		}
		fmt.Fprintf(o.Log, "workload %s: built in %.1f s\n", r.name, time.Since(start).Seconds())
		return publish(filepath.Join(tmp, "layout"), dir)
	})
	if err != nil {
		return nil, err
	}
	return Open(dir)
}

// once runs build with a temporary directory beside dir unless dir exists, holding a
// lock that other processes wait for. The temporary directory goes in every case; those
// of builders that were killed go when the next one holds the lock.
func once(ctx context.Context, o Options, dir string, build func(ctx context.Context, tmp string) error) (err error) {
	if err := os.MkdirAll(o.CacheDir, 0o755); err != nil {
		return fmt.Errorf("make cache directory: %w", err)
	}
	lock, err := lockFile(ctx, dir+".lock")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if _, err := os.Lstat(dir); err == nil {
		return nil
	}
	prefix := "." + filepath.Base(dir) + ".tmp-"
	entries, err := os.ReadDir(o.CacheDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			if err := os.RemoveAll(filepath.Join(o.CacheDir, e.Name())); err != nil {
				return fmt.Errorf("remove an earlier builder's files: %w", err)
			}
		}
	}
	tmp, err := os.MkdirTemp(o.CacheDir, prefix)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	return build(ctx, tmp)
}

// publish moves a finished directory to its name, after its contents are on disk.
func publish(from, to string) error {
	d, err := os.Open(from)
	if err != nil {
		return err
	}
	syncErr := unix.Syncfs(int(d.Fd()))
	if err := errors.Join(syncErr, d.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", from, err)
	}
	return os.Rename(from, to)
}

// lockFile returns path opened and locked exclusively, waiting until ctx ends. Closing
// the file releases the lock, and so does the death of the process.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, ctx.Err()), f.Close())
		case <-tick.C:
		}
	}
}
