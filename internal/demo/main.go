// Command demo shows the main job from end to end on this machine, as root: it starts a
// private containerd, runs a workload without and with the plugin, waits for the access
// list and the rebuilt image, checks that image and prints what changed.
//
//	go run ./internal/demo
//	IMAGE=docker.io/library/nginx:latest go run ./internal/demo
//	IMAGE=oci:/path/to/layout CMD="/usr/bin/app --version" go run ./internal/demo
//
// Without IMAGE the workload is made from the Go toolchain. CMD replaces the image's
// command, split at blanks. A workload that does not end by itself is stopped after
// some seconds. Nothing is left running or mounted; the list and the image stay in a
// directory that the demo names. Exit status: 0 done, 1 a step or a check failed.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	runs        = 5                // of the workload, without and with the plugin
	runLimit    = 15 * time.Second // a workload that goes on is a server: it is stopped
	serverLimit = 3 * time.Second  // the same once it is known for one
	keepDemos   = 24 * time.Hour   // results of earlier demos are removed after this
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	o := options{image: os.Getenv("IMAGE"), cmd: strings.Fields(os.Getenv("CMD")), times: runs}
	if err := run(ctx, o, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		stop()
		os.Exit(1) //nolint:gocritic // stop was called
	}
}

// options say what the demo runs.
type options struct {
	image string        // as in IMAGE; empty: made from the Go toolchain
	cmd   []string      // replaces the image's command
	times int           // without and with the plugin
	limit time.Duration // of one run; 0: runLimit
	dir   string        // where results go; empty: headstart/demo in the user's cache directory
}

// run is the demo; stdout gets the steps and the table, stderr the progress of long steps.
func run(ctx context.Context, o options, stdout, stderr io.Writer) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root: containerd, runc and fanotify do")
	}
	dir, err := resultDir(o.dir)
	if err != nil {
		return fmt.Errorf("make the directory of the results: %w", err)
	}
	d := &demo{options: o, dir: dir, out: stdout, log: stderr}
	defer func() {
		err = errors.Join(err, d.close())
		if err != nil && ctx.Err() != nil {
			err = fmt.Errorf("interrupted; everything was taken down: %w", err)
		}
	}()
	if err := d.start(ctx); err != nil {
		return err
	}
	if err := d.prepare(ctx); err != nil {
		return err
	}
	before, err := d.runs(ctx, d.times, "without the plugin")
	if err != nil {
		return err
	}
	if err := d.dropPlugin(ctx); err != nil {
		return err
	}
	first, err := d.runs(ctx, 1, "with the plugin")
	if err != nil {
		return err
	}
	built, err := d.rebuilt(ctx, first)
	if err != nil {
		return err
	}
	with, err := d.runs(ctx, d.times, "with the plugin, for the time that takes")
	if err != nil {
		return err
	}
	if err := d.check(ctx, built); err != nil {
		return err
	}
	return d.table(ctx, before, first, with, built)
}

// resultDir makes a directory that outlives the demo and removes those of earlier ones.
func resultDir(parent string) (string, error) {
	if parent == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		parent = filepath.Join(cache, "headstart", "demo")
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", err
	}
	old, err := os.ReadDir(parent)
	if err != nil {
		return "", err
	}
	for _, e := range old {
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > keepDemos {
			if err := os.RemoveAll(filepath.Join(parent, e.Name())); err != nil {
				return "", err
			}
		}
	}
	return os.MkdirTemp(parent, "run-")
}
