package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/headstart-oci/headstart/internal/nydusd"
	"github.com/headstart-oci/headstart/internal/testcri"
)

// coldRepo is the repository of what is read while it is fetched.
const coldRepo = "cold"

// coldReads reads the whole tree through a lazy mount and through nydusd, in turn, each with nothing local, from a real registry on
// this machine: what fetching, verifying and storing cost where the link costs nothing.
func (r *lazyRig) coldReads(ctx context.Context, source string) (err error) {
	registry, err := testcri.StartRegistry(ctx, testcri.RegistryOptions{Dir: r.dir, Out: r.b.log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	target := registry.Host + "/" + coldRepo + ":bench"
	if _, err := timed(ctx, []string{r.b.bin + "optimizer", "convert", "--quiet", "--plain-http", "--temp-dir", r.dir, source, target}); err != nil {
		return err
	}
	var ours, theirs []time.Duration
	var size int64
	for i := range r.b.runs {
		a, n, err := r.coldOurs(ctx, i, target)
		if err != nil {
			return err
		}
		b, m, err := r.coldTheirs(ctx, registry.Host)
		if err != nil {
			return fmt.Errorf("nydusd: %w", err)
		}
		if n != m {
			return fmt.Errorf("the lazy mount has %d bytes, nydusd %d", n, m)
		}
		ours, theirs, size = append(ours, a), append(theirs, b), n
	}
	slices.Sort(ours)
	slices.Sort(theirs)
	fmt.Fprintf(r.b.out, "\nreading a whole tree of %s with nothing local, from a registry on this machine; median of %d interleaved runs\n", mb(size), len(ours))
	for _, row := range []struct {
		name string
		took []time.Duration
	}{{"lazy mount, every chunk verified", ours}, {"nydusd 2.2.0", theirs}} {
		median := row.took[len(row.took)/2]
		fmt.Fprintf(r.b.out, "%-44s %9.2fs %7.0f MB/s\n", row.name, median.Seconds(), float64(size)/1e6/median.Seconds())
	}
	return nil
}

// coldOurs mounts and reads with a state directory of its own.
func (r *lazyRig) coldOurs(ctx context.Context, i int, target string) (took time.Duration, size int64, err error) {
	own := &lazyRig{b: r.b, dir: filepath.Join(r.dir, fmt.Sprint("cold", i))}
	if err := errors.Join(os.Mkdir(own.dir, 0o700), os.Mkdir(filepath.Join(own.dir, "state"), 0o700), os.Mkdir(filepath.Join(own.dir, "run"), 0o700)); err != nil {
		return 0, 0, err
	}
	mnt, err := own.mount(ctx, "mnt", "--plain-http", "--background", "none", target)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, own.end(context.WithoutCancel(ctx)), os.RemoveAll(own.dir)) }()
	return readTree(mnt)
}

// keepBootstrap copies the bare bootstrap of the one mount that there is.
func (r *lazyRig) keepBootstrap(ctx context.Context) error {
	s, err := r.status(ctx)
	if err == nil && len(s.Mounts) != 1 {
		err = fmt.Errorf("%d mounts, want one", len(s.Mounts))
	}
	if err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(r.dir, "state", "bootstraps", s.Mounts[0].Bootstrap))
	if err != nil {
		return err
	}
	r.boot = filepath.Join(r.dir, "image.boot")
	return os.WriteFile(r.boot, text, 0o600)
}

// nydusd starts nydusd on the kept bootstrap, in a directory of its own.
func (r *lazyRig) nydusd(ctx context.Context, backend map[string]any) (*nydusd.Daemon, error) {
	program, err := r.b.tools.Ensure(ctx, "nydusd")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(r.dir, "nydusd-")
	if err != nil {
		return nil, err
	}
	return nydusd.Start(ctx, nydusd.Options{Program: program, Bootstrap: r.boot, Dir: dir, Backend: backend})
}

func (r *lazyRig) coldTheirs(ctx context.Context, host string) (took time.Duration, size int64, err error) {
	d, err := r.nydusd(ctx, nydusd.Registry(host, coldRepo))
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return readTree(d.Mount)
}

// readTree reads every regular file below dir, one after the other.
func readTree(dir string) (took time.Duration, size int64, err error) {
	b := make([]byte, 128<<10)
	began := time.Now()
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, b)
		size += n
		return errors.Join(err, f.Close())
	})
	return time.Since(began), size, err
}
