// Package testenv answers what a test may ask of the machine it runs on: a tool,
// root, a feature of the kernel, the shared fixtures, one of our own programs.
// What is not there is a visible skip, and a failure where the environment says
// that it has to be there:
//
//	REQUIRE_TOOLS=1    a missing tool, missing fixtures fail the test
//	REQUIRE_KERNEL=1   missing root or a missing kernel feature fail the test
//	NO_TOOL_INSTALL=1  nothing is installed on demand
//
// It also holds what tests of this project need on Linux: a private mount
// namespace, a kernel mount of an EROFS image, an end for a process group, and
// [Main], which fails a test binary that leaks mounts, processes, files or
// goroutines.
package testenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/tools"
)

// installTimeout bounds the installation of one tool from within a test; go test
// ends a package after ten minutes.
const installTimeout = 5 * time.Minute

// memo holds what one test process found out once.
type memo struct {
	mu    sync.Mutex
	tools map[string]result // by name; guarded by mu
	built map[string]result // by package; guarded by mu
}

type result struct {
	path string
	err  error
}

// process is the memory of this test process: a tool that could not be installed
// once is not tried again by the next test.
var process = memo{tools: map[string]result{}, built: map[string]result{}}

// Tool returns the absolute path of the program called name, as package tools
// knows it, after it has installed it where it was missing. Packages that take
// minutes to build are not installed by a test: `make tools` does that. Where
// there is no such program the test is skipped, or fails under REQUIRE_TOOLS=1.
func Tool(t testing.TB, name string) string {
	t.Helper()
	process.mu.Lock()
	defer process.mu.Unlock()
	r, ok := process.tools[name]
	if !ok {
		r.path, r.err = findTool(name)
		process.tools[name] = r
	}
	if r.err != nil {
		missing(t, "REQUIRE_TOOLS", "tool %s: %v", name, r.err)
	}
	return r.path
}

func findTool(name string) (string, error) {
	store, err := tools.NewStore(tools.Options{Out: os.Stderr})
	if err != nil {
		return "", err
	}
	path, err := store.Path(name)
	if !errors.Is(err, tools.ErrMissing) {
		return path, err
	}
	if p, _ := tools.Lookup(name); p.Slow || os.Getenv("NO_TOOL_INSTALL") != "" {
		return "", fmt.Errorf("%w; `make tools` installs it", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), installTimeout)
	defer cancel()
	return store.Ensure(ctx, name)
}

// Root skips the test unless it runs as root in the initial user namespace's
// sense of it: effective user 0. It fails under REQUIRE_KERNEL=1.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "REQUIRE_KERNEL", "needs root, runs as user %d", os.Geteuid())
	}
}

// Kernel skips the test when probe, the error of trying feature, is not nil. It
// fails under REQUIRE_KERNEL=1, where the kernel is known to have it.
func Kernel(t testing.TB, feature string, probe error) {
	t.Helper()
	if probe != nil {
		missing(t, "REQUIRE_KERNEL", "kernel lacks %s: %v", feature, probe)
	}
}

// Missing skips the test, or fails it when REQUIRE_TOOLS=1, for something that is neither a tool nor a fixture.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	missing(t, "REQUIRE_TOOLS", format, args...)
}

// missing ends the test: skipped, or failed where variable is set to 1.
func missing(t testing.TB, variable, format string, args ...any) {
	t.Helper()
	text := fmt.Sprintf(format, args...)
	if os.Getenv(variable) == "1" {
		t.Fatalf("%s=1, and %s", variable, text)
	}
	t.Skipf("skipped: %s", text)
}

// RepoRoot returns the directory of this module's go.mod.
func RepoRoot(t testing.TB) string {
	t.Helper()
	root, err := tools.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// Binary returns the absolute path of our own command cmd/name, built from the
// tree under test without cgo, once per test process. A command that does not
// build fails the test.
func Binary(t testing.TB, name string) string {
	t.Helper()
	return Command(t, "./cmd/"+name)
}

// Command is [Binary] for a main package anywhere in the module: pkg is its
// directory from the module's root and begins with ./
func Command(t testing.TB, pkg string) string {
	t.Helper()
	process.mu.Lock()
	defer process.mu.Unlock()
	r, ok := process.built[pkg]
	if !ok {
		// Not the test's context: the result is for all tests.
		r.path, r.err = tools.BuildCommand(context.Background(), pkg)
		process.built[pkg] = r
	}
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.path
}

// Fixtures returns the directory of the shared fixtures, which lie beside the
// repository: ../shared/fixtures from its root. Without them the test is
// skipped, or fails under REQUIRE_TOOLS=1.
func Fixtures(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(filepath.Dir(RepoRoot(t)), "shared", "fixtures")
	if _, err := os.Stat(dir); err != nil {
		missing(t, "REQUIRE_TOOLS", "shared fixtures: %v", err)
	}
	return dir
}
