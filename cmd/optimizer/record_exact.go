package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/coldcache"
	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/imageroot"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/lazy"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// exactRoot is the root of an image on a lazy mount of its own, with nothing in the page cache and no
// read-ahead: what the kernel reads for a run is what the run touches.
type exactRoot struct {
	*imageroot.Root
	dir    string // everything below it is ours
	lock   *os.File
	client *lazy.Client
	mnt    string
	daemon []int // pidfds of the daemon and its holder
}

// mountExact mounts the image. One that is no Nydus image is converted first, into files beside the mount.
func (o *recordOptions) mountExact(ctx context.Context) (_ *exactRoot, err error) {
	base := o.scratch
	if base == "" {
		base = imageroot.DefaultBase
	}
	if err := os.MkdirAll(base, 0o700); err != nil {
		return nil, err
	}
	r := &exactRoot{}
	if r.dir, r.lock, err = newExactDir(base); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	img, err := o.selectAny(ctx)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", o.image, err)
	}
	ref := o.image
	if !img.Nydus() {
		ref = "oci:" + filepath.Join(r.dir, "layout") + ":exact"
		if err := o.convertExact(ctx, ref, r.dir); err != nil {
			return nil, err
		}
	}
	scratch, mnt := filepath.Join(r.dir, "scratch"), filepath.Join(r.dir, "mnt")
	if err := errors.Join(os.Mkdir(scratch, 0o700), os.Mkdir(mnt, 0o755)); err != nil {
		return nil, err
	}
	r.Root = &imageroot.Root{Image: img, Layers: []string{mnt}, Scratch: scratch}
	if err := r.mount(ctx, o, ref, mnt); err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	return r, nil
}

// selectAny finds the image, a Nydus image where there are both.
func (o *recordOptions) selectAny(ctx context.Context) (img remote.Image, err error) {
	src, err := remote.OpenSource(ctx, o.ref, o.remote.options())
	if err != nil {
		return img, err
	}
	img, err = remote.SelectNydus(ctx, src, o.platform)
	return img, errors.Join(err, src.Close())
}

// convertExact makes a Nydus image of the plain one, as quickly as can be.
func (o *recordOptions) convertExact(ctx context.Context, ref, dir string) error {
	o.note("%s is no Nydus image: converting it for the recording", o.image)
	b := builder.DefaultOptions()
	b.Compressor, b.TempDir = rafs.CompressorNone, dir
	_, err := convert.Run(ctx, convert.Options{
		Source: o.image, Target: ref, Platform: o.platform, Build: b, SourceRemote: o.remote.options(),
	})
	if err != nil {
		return fmt.Errorf("convert %s: %w", o.image, err)
	}
	return nil
}

// exactIdle is how long the recording's own daemon stays with nothing mounted.
const exactIdle = time.Second

// exactClient asks the daemon of the recording in dir.
func exactClient(dir string) (*lazy.Client, error) {
	co := lazy.ClientOptions{StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run")}
	co.Command = []string{"/proc/self/exe", "lazyd", "--state-dir", co.StateDir, "--run-dir", co.RunDir, "--idle", exactIdle.String()}
	return lazy.NewClient(co)
}

// mount starts a daemon of its own, so that nothing of the recording is left in anybody's cache, and mounts.
func (r *exactRoot) mount(ctx context.Context, o *recordOptions, ref, mnt string) (err error) {
	if r.client, err = exactClient(r.dir); err != nil {
		return err
	}
	_, err = r.client.Mount(ctx, mnt, lazy.Request{
		Reference: ref, Platform: o.platform, Remote: o.remote.lazy(), Background: "none", NoPrefetch: true, ReadAhead: -1,
		Driver: lazy.DriverEROFS, // whose pages are what is recorded
	})
	if err != nil {
		return err
	}
	r.mnt = mnt
	s, err := r.client.Status(ctx, false)
	if err != nil {
		return err
	}
	for _, pid := range []int{s.PID, s.Holder} {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return fmt.Errorf("watch the daemon: %w", err)
		}
		r.daemon = append(r.daemon, fd)
	}
	return nil
}

// Close unmounts the image, waits until its daemon has ended, and removes what was there.
func (r *exactRoot) Close() (err error) {
	if r.mnt != "" {
		// What the run started may hold files for a moment; the mount goes with the last of them.
		err = r.client.Unmount(context.Background(), r.mnt, true)
	}
	for _, fd := range r.daemon {
		err = errors.Join(err, awaitEnd(fd, 30*exactIdle), unix.Close(fd))
	}
	r.daemon, r.mnt = nil, ""
	err = errors.Join(err, os.RemoveAll(r.dir))
	if r.lock != nil {
		err = errors.Join(err, r.lock.Close())
		r.lock = nil
	}
	return err
}

// awaitEnd returns when the process of a pidfd has ended, or an error when it has not after limit. Signals, as of a terminal that is resized, do not end it.
func awaitEnd(fd int, limit time.Duration) error {
	for end := time.Now().Add(limit); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(max(0, time.Until(end)).Milliseconds())) //nolint:gosec // a descriptor
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n != 1:
			return errors.New("the recording's daemon does not end")
		default:
			return nil
		}
	}
}

// refine makes the list exact, where the recording was to be, while the mount is still there. What keeps it from that is said.
func (o *recordOptions) refine(l *persist.List, root *imageroot.Root) {
	if !o.exact || l.Grade != persist.GradeFaultAround && l.Grade != persist.GradeExact {
		if o.exact {
			o.warn("the list is of grade %q, not exact", l.Grade)
		}
		return
	}
	exact, err := coldcache.Refine(root.Layers[0], l.Accesses)
	switch {
	case err != nil:
		o.warn("the list is not exact: %v", err)
	case exact:
		l.Grade = persist.GradeExact
	default:
		o.warn("the list is of grade %q, not exact: it has whole files", l.Grade)
	}
}
