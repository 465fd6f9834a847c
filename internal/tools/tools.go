// Package tools obtains the programs that this project is tested and measured
// with: a real containerd and runc, a real registry, the EROFS and Nydus tools,
// the linter. Each is pinned by name and version, built or installed on first
// use, and kept in the user's cache directory, outside the source tree:
//
//	<cache>/headstart/tools/<name>@<version>/bin/<program>
//
// The model: a [Package] brings one or more programs (binaries); a [Store] is
// the directory that holds them; a group is a set of packages that a Makefile
// target needs. Debian packages are installed into the system instead.
//
//	store, err := tools.NewStore(tools.Options{Out: os.Stderr})
//	path, err := store.Ensure(ctx, "containerd")
//
// What is installed is said on Options.Out before it happens. Several processes
// may install at once: the first builds, the others wait for it. What is already
// there needs no network.
package tools

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// Errors of this package, for errors.Is.
var (
	// ErrUnknown is returned for a name that is neither a package nor a program
	// of the catalogue.
	ErrUnknown = errors.New("unknown tool")
	// ErrMissing is returned when a tool is not installed, and was not to be
	// installed or could not be.
	ErrMissing = errors.New("tool is not installed")
)

// Options says where a [Store] lives. The zero value is the user's store, silent.
type Options struct {
	Dir string    // directory of the store; empty: headstart/tools in the user's cache directory
	Out io.Writer // gets one line before each installation and every half minute of it; nil: nothing
}

// Store is a directory of installed tools. It is safe for concurrent use by
// several goroutines and processes.
type Store struct {
	dir string
	out io.Writer
}

// NewStore returns the store that o describes. It creates nothing. It fails when
// o.Dir is empty and the user has no cache directory (neither XDG_CACHE_HOME nor
// HOME is set).
func NewStore(o Options) (*Store, error) {
	if o.Dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("find the cache directory for tools: %w", err)
		}
		o.Dir = filepath.Join(cache, "headstart", "tools")
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("tool store %s: %w", o.Dir, err)
	}
	if o.Out == nil {
		o.Out = io.Discard
	}
	return &Store{dir: dir, out: o.Out}, nil
}

// Dir returns the absolute path of the store's directory, which may not exist.
func (s *Store) Dir() string { return s.dir }

// Path returns the absolute path of the program called name, which may also be
// a package's name if the package has a program of that name or exactly one. It
// installs nothing: the error is [ErrMissing] then, or [ErrUnknown].
func (s *Store) Path(name string) (string, error) {
	p, ok := Lookup(name)
	if !ok {
		return "", fmt.Errorf("%w: %q", ErrUnknown, name)
	}
	binary := name
	if !slices.Contains(p.Binaries, name) {
		binary = p.Binaries[0]
	}
	path, err := s.find(p, binary)
	if err != nil {
		return "", fmt.Errorf("%w: %s (%s): %w", ErrMissing, binary, p, err)
	}
	return path, nil
}

// Ensure returns what [Store.Path] returns, after it has installed the package
// where that was needed.
func (s *Store) Ensure(ctx context.Context, name string) (string, error) {
	path, err := s.Path(name)
	if !errors.Is(err, ErrMissing) {
		return path, err
	}
	p, _ := Lookup(name)
	if err := s.Install(ctx, p); err != nil {
		return "", err
	}
	return s.Path(name)
}

// Installed says whether every program of p is there.
func (s *Store) Installed(p Package) bool {
	for _, b := range p.Binaries {
		if _, err := s.find(p, b); err != nil {
			return false
		}
	}
	return true
}

// Install makes sure that p and what its build needs are installed. It returns
// quickly when they are. An installation that fails leaves nothing behind and
// wraps [ErrMissing].
func (s *Store) Install(ctx context.Context, p Package) error {
	if s.Installed(p) {
		return nil
	}
	for _, need := range p.Needs {
		n, ok := Lookup(need)
		if !ok {
			return fmt.Errorf("%w: %q, needed by %s", ErrUnknown, need, p)
		}
		if err := s.Install(ctx, n); err != nil {
			return fmt.Errorf("install %s: %w", p, err)
		}
	}
	lock := p.String()
	if p.kind == debian {
		lock = "debian" // apt knows one installation at a time
	}
	unlock, err := s.lock(ctx, lock)
	if err != nil {
		return fmt.Errorf("install %s: %w", p, err)
	}
	defer unlock()
	if s.Installed(p) {
		return nil // by the process that we waited for
	}
	start := time.Now()
	if p.kind == debian {
		err = s.installDebian(ctx, p)
	} else {
		err = s.build(ctx, p)
	}
	if err != nil {
		return fmt.Errorf("%w: install %s: %w", ErrMissing, p, err)
	}
	if !s.Installed(p) {
		return fmt.Errorf("%w: install %s: done, and yet not all of %q are there", ErrMissing, p, p.Binaries)
	}
	s.sayf("installed %s in %.0f s", p, time.Since(start).Seconds())
	return nil
}

// find returns the path of one program of p.
func (s *Store) find(p Package, binary string) (string, error) {
	if p.kind == debian {
		return findSystem(binary)
	}
	path := filepath.Join(s.dir, p.String(), "bin", binary)
	fi, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0 {
		return "", fmt.Errorf("%s is no program (mode %v)", path, fi.Mode())
	}
	return path, nil
}

// findSystem looks for a program of the system, also where a user's PATH does
// not reach.
func findSystem(binary string) (string, error) {
	path, err := exec.LookPath(binary)
	if err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, binary)); err == nil {
			return path, nil
		}
	}
	return "", err
}

func (s *Store) sayf(format string, args ...any) {
	// A message that cannot be printed must not stop an installation.
	_, _ = fmt.Fprintf(s.out, "tools: "+format+"\n", args...)
}
