package testenv

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// binaryAge is how long a built command is kept for other test processes.
const binaryAge = 6 * time.Hour

type buildResult struct {
	path string
	err  error
}

// Binary returns the absolute path of our own command cmd/name, built from the
// tree under test without cgo. It is built once per test process; the file is
// kept by content outside the tree, so that packages tested at once do not
// replace it under one another. A command that does not build fails the test.
func Binary(t testing.TB, name string) string {
	t.Helper()
	process.mu.Lock()
	defer process.mu.Unlock()
	r, ok := process.built[name]
	if !ok {
		r.path, r.err = BuildCommand(t.Context(), "./cmd/"+name)
		process.built[name] = r
	}
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.path
}

// BuildCommand builds the main package pkg, an import path or a directory that
// begins with ./ relative to the repository's root, and returns the path of the
// program, whose file name is the last element of pkg. It is static: no cgo.
func BuildCommand(ctx context.Context, pkg string) (string, error) {
	root, err := repoRoot()
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("build %s: %w", pkg, err)
	}
	store := filepath.Join(cache, "headstart", "testbin")
	if err := os.MkdirAll(store, 0o755); err != nil {
		return "", err
	}
	removeOld(store)
	tmp, err := os.MkdirTemp(store, ".tmp-*")
	if err != nil {
		return "", err
	}
	path, err := buildInto(ctx, root, pkg, store, tmp)
	return path, errors.Join(err, os.RemoveAll(tmp))
}

func buildInto(ctx context.Context, root, pkg, store, tmp string) (string, error) {
	name := filepath.Base(pkg)
	out := filepath.Join(tmp, name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", out, pkg)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w\n%s", pkg, err, text)
	}
	sum, err := hashFile(out)
	if err != nil {
		return "", err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	final := filepath.Join(store, sum)
	if err := os.Rename(tmp, final); err != nil {
		// Another process was first with the same bytes.
		if _, statErr := os.Stat(filepath.Join(final, name)); statErr != nil {
			return "", errors.Join(err, statErr)
		}
		now := time.Now()
		if err := os.Chtimes(final, now, now); err != nil { // it is in use: not old
			return "", err
		}
	}
	return filepath.Join(final, name), nil
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// removeOld removes what no test process has used for a while. Errors do not
// matter: another process may be removing the same.
func removeOld(store string) {
	entries, err := os.ReadDir(store)
	if err != nil {
		return
	}
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && time.Since(fi.ModTime()) > binaryAge {
			_ = os.RemoveAll(filepath.Join(store, e.Name()))
		}
	}
}
