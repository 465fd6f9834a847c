package tools

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
	"time"
)

// Built commands are kept for other test processes: for binaryAge, and for crowdedAge where there are more
// than crowded. Both are longer than any test process goes on after it has built a command, long runs apart,
// whose commands run already.
const (
	binaryAge  = 6 * time.Hour
	crowdedAge = time.Hour
	crowded    = 30 // some 15 MB each
)

// BuildCommand builds the main package pkg of this module, a directory that
// begins with ./ and is relative to the module's root, and returns the path of
// the program, whose file name is the last element of pkg. It is static: no cgo.
// The file is kept by content outside the tree, in the user's cache, so that
// processes that build at once do not replace it under one another.
func BuildCommand(ctx context.Context, pkg string) (string, error) {
	root, err := ModuleRoot()
	if err != nil {
		return "", fmt.Errorf("build %s: %w", pkg, err)
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
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", out, pkg)
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
	age := binaryAge
	if len(entries) > crowded {
		age = crowdedAge
	}
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && time.Since(fi.ModTime()) > age {
			_ = os.RemoveAll(filepath.Join(store, e.Name()))
		}
	}
}

// ModuleRoot returns the directory of the go.mod at or above the working
// directory: go test runs a package's tests in the package's directory.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		_, err := os.Stat(filepath.Join(dir, "go.mod"))
		if err == nil {
			return dir, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("no go.mod at or above the working directory")
		}
	}
}
