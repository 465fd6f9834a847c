package workload

import (
	"archive/tar"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// goToolRecipe is the Go toolchain of this machine in two layers: the tools, and the
// sources. Its command lists what the standard library and the tools are made of, which
// reads some 7,000 source files in about half a second and needs no network.
func goToolRecipe(ctx context.Context) (*recipe, error) {
	version, err := goEnv(ctx, "GOVERSION")
	if err != nil {
		return nil, err
	}
	root, err := goEnv(ctx, "GOROOT")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(root, "src", "cmd")); err != nil {
		return nil, fmt.Errorf("%w: the Go toolchain has no sources: %w", ErrUnavailable, err)
	}
	build := func(ctx context.Context, w *layoutWriter, _ string) error {
		return buildGoTool(ctx, w, root)
	}
	return &recipe{
		name: GoTool, reference: "docker.io/headstart/gotool:1",
		inputs: []string{version, "gotool 2"}, build: build,
	}, nil
}

func buildGoTool(ctx context.Context, w *layoutWriter, root string) error {
	const prefix = "usr/local/go"
	env := append(slices.Clone(w.config.Config.Env),
		"HOME=/tmp", "GOROOT=/"+prefix, "GOTOOLCHAIN=local", "GOFLAGS=", "GOPROXY=off", "GOTELEMETRY=off",
		"CGO_ENABLED=0", "GO111MODULE=on", "GOCACHE=/tmp/go-build")
	w.config.Config.Env = env
	w.config.Config.Cmd = []string{"/" + prefix + "/bin/go", "list", "-deps", "std", "cmd"}
	w.config.Config.WorkingDir = "/tmp"
	dir := tar.Header{Typeflag: tar.TypeDir}
	system := []entry{
		{name: "tmp/", mode: 0o1777, header: dir},
		{name: "dev/", mode: 0o755, header: dir},
		{name: "proc/", mode: 0o755, header: dir},
		{name: "sys/", mode: 0o755, header: dir},
		{name: "etc/passwd", mode: 0o644, data: []byte("root:x:0:0:root:/tmp:/bin/sh\n")},
		{name: "etc/group", mode: 0o644, data: []byte("root:x:0:\n")},
		{name: "usr/local/", mode: 0o755, header: dir},
	}
	// The base has everything but the sources; the second layer has those.
	tools := func(rel string, _ fs.DirEntry) bool {
		first, rest, _ := strings.Cut(rel, "/")
		switch first {
		case "bin", "lib", "VERSION", "go.env", "LICENSE":
			return false
		case "pkg":
			return rest != "" && !strings.HasPrefix(rest, "tool") && !strings.HasPrefix(rest, "include")
		}
		return true
	}
	err := w.layer("tools", func(tw *tar.Writer) error {
		if err := writeEntries(tw, system); err != nil {
			return err
		}
		return writeTree(ctx, tw, root, treeOptions{prefix: prefix, skip: tools, root: true})
	})
	if err != nil {
		return err
	}
	return w.layer("sources", func(tw *tar.Writer) error {
		src := filepath.Join(root, "src")
		return writeTree(ctx, tw, src, treeOptions{prefix: prefix + "/src", root: true})
	})
}
