package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// flat puts the base of ten images into the one layer of each, where only a file system that shares blocks keeps it once.
func flat(base, own []casFile) [][]casFile { return [][]casFile{slices.Concat(base, own)} }

// casFlat prints what ten flattened images of one base take where the state directory is, and what is left of it when no mount has them and what is
// there twice was given up.
func casFlat(ctx context.Context, r *casRig) error {
	return r.ten(ctx, "flattened, one layer each (copies on ext4)", flat, r.disk)
}

func casXFS(ctx context.Context, r *casRig) error { return r.flatOn(ctx, "xfs", "mkfs.xfs", "-q") }
func casBtrfs(ctx context.Context, r *casRig) error {
	return r.flatOn(ctx, "btrfs", "mkfs.btrfs", "-q")
}

// flatOn is casFlat with the state directory on a file system of its own, which says itself what is taken.
func (r *casRig) flatOn(ctx context.Context, name string, mkfs ...string) (err error) {
	what := "flattened, the cache on " + name
	if _, err := exec.LookPath(mkfs[0]); err != nil {
		fmt.Fprintf(r.b.out, "%-44s %10s\n", what, "no "+mkfs[0])
		return nil
	}
	disk, state := filepath.Join(r.dir, "disk"), filepath.Join(r.dir, "state")
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 4<<30)); err != nil {
		return err
	}
	if _, err := timed(ctx, append(mkfs, disk), []string{"mount", "-o", "loop", disk, state}); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, r.endRunning(context.WithoutCancel(ctx)), unix.Unmount(state, unix.MNT_DETACH))
	}()
	empty, err := taken(state)
	if err != nil {
		return err
	}
	return r.ten(ctx, what, flat, func() (int64, error) {
		full, err := taken(state)
		return full - empty, err
	})
}

// taken returns how many bytes of the file system of dir are taken once all is written.
func taken(dir string) (int64, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	var st unix.Statfs_t
	err = errors.Join(unix.Syncfs(int(f.Fd())), unix.Fstatfs(int(f.Fd()), &st), f.Close())
	return int64(st.Blocks-st.Bfree) * st.Bsize, err //nolint:gosec // of a file system
}
