package tools_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/tools"
)

// newStore returns an empty store, what it says, and a directory that is the
// only one in PATH besides the shell's.
func newStore(t *testing.T) (s *tools.Store, said *bytes.Buffer, bin string) {
	t.Helper()
	bin = t.TempDir()
	for _, name := range []string{"sh", "sleep", "mkdir", "touch", "chmod", "dirname"} {
		if err := os.Symlink(filepath.Join("/bin", name), filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin)
	said = &bytes.Buffer{}
	s, err := tools.NewStore(tools.Options{Dir: filepath.Join(t.TempDir(), "store"), Out: said})
	if err != nil {
		t.Fatal(err)
	}
	return s, said, bin
}

func script(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

// fakeGo answers go install by making the programs that it was asked for.
const fakeGo = `set -e
echo call >>"$0.calls"
for a in "$@"; do case "$a" in *@*) p="${a%@*}"; touch "$GOBIN/${p##*/}"; chmod +x "$GOBIN/${p##*/}";; esac; done
sleep 0.3`

func calls(t *testing.T, program string) []string {
	t.Helper()
	text, err := os.ReadFile(program + ".calls")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

func lookup(t *testing.T, name string) tools.Package {
	t.Helper()
	p, ok := tools.Lookup(name)
	if !ok {
		t.Fatalf("Lookup(%s) found nothing", name)
	}
	return p
}

func TestCatalogue(t *testing.T) {
	seen := map[string]string{}
	for _, p := range tools.Packages() {
		names := slices.Compact(append([]string{p.Name}, p.Binaries...)) // gcc brings gcc
		for _, name := range names {
			if other, ok := seen[name]; ok && other != p.Name {
				t.Errorf("%s is brought by %s and by %s", name, other, p.Name)
			}
			seen[name] = p.Name
		}
		for _, need := range p.Needs {
			if _, ok := tools.Lookup(need); !ok {
				t.Errorf("%s needs %s, which is unknown", p, need)
			}
		}
	}
	for _, g := range tools.Groups() {
		if packages, ok := tools.Group(g); !ok || len(packages) == 0 {
			t.Errorf("Group(%s) = %v, %v, want packages", g, packages, ok)
		}
	}
	if _, ok := tools.Group("containerd"); ok {
		t.Error("Group(containerd) found a group")
	}
}

func TestPathInstallsNothing(t *testing.T) {
	s, said, _ := newStore(t)
	if _, err := s.Path("no-such-tool"); !errors.Is(err, tools.ErrUnknown) {
		t.Errorf("Path(no-such-tool) = %v, want ErrUnknown", err)
	}
	if _, err := s.Path("ctr"); !errors.Is(err, tools.ErrMissing) {
		t.Errorf("Path(ctr) = %v, want ErrMissing", err)
	}
	if _, err := os.Stat(s.Dir()); !errors.Is(err, os.ErrNotExist) || said.Len() > 0 {
		t.Errorf("Path made %s (%v) and said %q, want nothing", s.Dir(), err, said)
	}
}

func TestEnsureUsesTheCache(t *testing.T) {
	s, said, bin := newStore(t)
	script(t, filepath.Join(bin, "go"), fakeGo)
	first, err := s.Ensure(t.Context(), "ctr")
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(s.Dir(), lookup(t, "ctr").String(), "bin", "ctr"); first != want {
		t.Errorf("Ensure(ctr) = %s, want %s", first, want)
	}
	if !strings.HasPrefix(said.String(), "tools: installing containerd@") {
		t.Errorf("it said %q, want first of all that it installs", said)
	}
	if err := os.Remove(filepath.Join(bin, "go")); err != nil { // as without a network
		t.Fatal(err)
	}
	for _, name := range []string{"ctr", "containerd", "containerd-shim-runc-v2"} {
		if _, err := s.Ensure(t.Context(), name); err != nil {
			t.Errorf("Ensure(%s) of what is there = %v", name, err)
		}
	}
}

func TestInstallTwiceAtOnce(t *testing.T) {
	s, _, bin := newStore(t)
	script(t, filepath.Join(bin, "go"), fakeGo)
	var wg sync.WaitGroup
	errs := make([]error, 4)
	for i := range errs {
		wg.Go(func() {
			other, err := tools.NewStore(tools.Options{Dir: s.Dir()})
			if err == nil {
				err = other.Install(context.Background(), lookup(t, "registry"))
			}
			errs[i] = err
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if got := calls(t, filepath.Join(bin, "go")); len(got) != 1 {
		t.Errorf("go ran %d times, want once", len(got))
	}
}

func TestFailedInstallLeavesNothing(t *testing.T) {
	s, _, bin := newStore(t)
	script(t, filepath.Join(bin, "go"), `touch "$GOBIN/registry"; chmod +x "$GOBIN/registry"; echo no route to the module; exit 1`)
	_, err := s.Ensure(t.Context(), "registry")
	if !errors.Is(err, tools.ErrMissing) || !strings.Contains(err.Error(), "no route to the module") {
		t.Errorf("Ensure with a go that fails = %v, want ErrMissing and its output", err)
	}
	left, err := os.ReadDir(s.Dir())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		if !strings.HasPrefix(e.Name(), ".lock-") {
			t.Errorf("left behind: %s", e.Name())
		}
	}
}

func TestInstallRemovesWhatAKilledOneLeft(t *testing.T) {
	s, _, bin := newStore(t)
	script(t, filepath.Join(bin, "go"), fakeGo)
	p := lookup(t, "registry")
	stale := filepath.Join(s.Dir(), ".tmp-"+p.String()+"-123")
	half := filepath.Join(s.Dir(), p.String(), "bin")
	for _, dir := range []string{stale, half} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Ensure(t.Context(), "registry"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stat %s = %v, want ErrNotExist", stale, err)
	}
}

func TestInstallEndsWithItsContext(t *testing.T) {
	s, _, bin := newStore(t)
	script(t, filepath.Join(bin, "go"), "sleep 600 & sleep 600")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := s.Ensure(ctx, "registry"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Ensure with a go that hangs = %v, want DeadlineExceeded", err)
	}
}

func TestDebian(t *testing.T) {
	s, said, bin := newStore(t)
	p := lookup(t, "strace")
	if s.Installed(p) {
		t.Skipf("skipped: %s is in a system directory that PATH does not name", p)
	}
	err := s.Install(t.Context(), p)
	if want := "install strace with the package manager"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Install without apt-get = %v, want %q", err, want)
	}
	apt := filepath.Join(bin, "apt-get")
	script(t, apt, fmt.Sprintf(`echo "$*" >>"$0.calls"; case "$*" in *install*) touch %[1]s/strace; chmod +x %[1]s/strace;; esac`, bin))
	err = s.Install(t.Context(), p)
	if os.Geteuid() != 0 {
		if err == nil || !strings.Contains(err.Error(), "sudo apt-get install --no-install-recommends strace") {
			t.Errorf("Install without root = %v, want the command to type", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	got := calls(t, apt)
	if len(got) != 2 || !strings.HasSuffix(got[0], " update") || !strings.HasSuffix(got[1], " install --no-install-recommends strace") {
		t.Errorf("apt-get was called with %q, want update, then install", got)
	}
	if !strings.Contains(said.String(), "apt-get install strace") {
		t.Errorf("it said %q, want that it installs into the system", said)
	}
	if err := os.Remove(filepath.Join(bin, "strace")); err != nil {
		t.Fatal(err)
	}
	if err := s.Install(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if got := calls(t, apt); len(got) != 3 {
		t.Errorf("apt-get was called with %q, want no second update", got)
	}
}
