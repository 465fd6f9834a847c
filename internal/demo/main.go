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
// directory that the demo names, until the next demo. Exit status: 0 done, 1 a step or a check failed.
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
	d := &demo{options: o, out: stdout, log: stderr}
	kept, err := resultDir(o.dir, d.say)
	if err != nil {
		return fmt.Errorf("make the directory of the results: %w", err)
	}
	defer kept.held.Close() //nolint:errcheck // nothing was written
	d.dir = kept.dir
	defer func() {
		err = errors.Join(err, d.close())
		if err != nil && ctx.Err() != nil {
			err = fmt.Errorf("interrupted; everything was taken down: %w (%w)", ctx.Err(), err) // gRPC's errors wrap no context's
		}
	}()
	if err := d.start(ctx); err != nil {
		return err
	}
	if err := d.prepare(ctx); err != nil {
		return err
	}
	before, err := d.runs(ctx, d.times, "without the plugin", bare)
	if err != nil {
		return err
	}
	if err := d.dropPlugin(ctx); err != nil {
		return err
	}
	first, err := d.runs(ctx, 1, "with the plugin", recorded)
	if err != nil {
		return err
	}
	built, err := d.rebuilt(ctx, first[0])
	if err != nil {
		return err
	}
	with, err := d.runs(ctx, d.times, "recorded and not recorded, in turn, for the time that takes", unrecorded, recorded)
	if err != nil {
		return err
	}
	if err := d.check(ctx, built); err != nil {
		return err
	}
	return d.table(ctx, measured{before[0], first[0], with[0], with[1]}, built)
}

// results is the directory that outlives the demo, until the next one.
type results struct {
	dir  string
	held *os.File // locked as long as this process lives
}

// lockName is the file that a demo holds locked in its directory.
const lockName = "lock"

// resultDir makes the directory and removes those of earlier demos whose process has ended; it says so.
func resultDir(parent string, say func(format string, a ...any)) (*results, error) {
	if parent == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return nil, err
		}
		parent = filepath.Join(cache, "headstart", "demo")
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return nil, err
	}
	// Nobody removes a directory between its making and its lock.
	all, err := lock(filepath.Join(parent, lockName), 0)
	if err != nil {
		return nil, err
	}
	defer all.Close() //nolint:errcheck // nothing was written
	old, err := filepath.Glob(filepath.Join(parent, "run-*"))
	if err != nil {
		return nil, err
	}
	removed := 0
	for _, dir := range old {
		held, err := lock(filepath.Join(dir, lockName), unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			continue // it goes on
		}
		if err == nil {
			err = errors.Join(held.Close(), os.RemoveAll(dir))
		}
		if err != nil {
			return nil, fmt.Errorf("remove the results of an earlier demo: %w", err)
		}
		removed++
	}
	if removed > 0 {
		say("removed the results of %d earlier demos below %s", removed, parent)
	}
	dir, err := os.MkdirTemp(parent, "run-")
	if err != nil {
		return nil, err
	}
	held, err := lock(filepath.Join(dir, lockName), unix.LOCK_NB)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return &results{dir: dir, held: held}, nil
}

func lock(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|flags); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
