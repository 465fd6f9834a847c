package testcri

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/headstart-oci/headstart/internal/testenv/procfs"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// marker is the environment variable that containerd and its shims carry, with
// the Env's identity.
const marker = "HEADSTART_TESTCRI"

// records holds one directory per live Env of this machine. In it are the shims'
// sockets, whose directory containerd limits to 42 bytes (core/runtime/v2
// maxSocketDirLen), and a file, locked by the owner, that names the Env's
// directory: an unlocked one is what a killed process left.
const records = "/run/headstart-testcri"

// newEnv makes the directories and the record of an Env.
func newEnv(bins binaries, o Options) (_ *Env, err error) {
	id := strings.ToLower(rand.Text()[:8])
	base := o.Dir
	if base == "" {
		base = os.TempDir()
	}
	// Resolved, because the kernel's mount table has no symbolic links.
	base, err = filepath.EvalSymlinks(base)
	if err != nil {
		return nil, err
	}
	e := &Env{
		id: id, dir: filepath.Join(base, "cri-"+id), runDir: filepath.Join(records, id), bins: bins, extra: o.Env,
		snaps: cmp.Or(o.Snapshotter, defaultSnapshotter),
	}
	if err := os.MkdirAll(e.runDir, 0o755); err != nil {
		return nil, err
	}
	e.owner, err = os.OpenFile(filepath.Join(e.runDir, "owner"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(e.runDir))
	}
	err = unix.Flock(int(e.owner.Fd()), unix.LOCK_EX)
	if err == nil {
		_, err = e.owner.WriteString(e.dir)
	}
	if err == nil {
		err = os.Mkdir(e.dir, 0o711)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(e.runDir), e.owner.Close())
	}
	return e, nil
}

// Close stops and removes every pod, ends containerd, and removes all that the
// Env made: processes, mounts, cgroups, sockets, files. Its error names what
// would not go. It is safe to call twice, and after Kill9.
func (e *Env) Close() error {
	e.closing.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		e.removePods(ctx)
		err := e.down(func(d *daemon) { d.stop() })
		e.closed = errors.Join(err, sweep(e.id, e.dir), e.owner.Close())
	})
	return e.closed
}

// removePods lets containerd take the pods down in order, for what that tests
// (a plugin's stop hooks). What it does not manage, the sweep does.
func (e *Env) removePods(ctx context.Context) {
	if e.PID() == 0 {
		return
	}
	r := e.Runtime()
	list, err := r.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return
	}
	for _, p := range list.GetItems() {
		_, _ = r.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.GetId()})
		_, _ = r.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.GetId()})
	}
}

// reapStale sweeps up after the Envs whose process died without Close.
func reapStale() error {
	entries, err := os.ReadDir(records)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		errs = append(errs, reapRecord(entry.Name()))
	}
	return errors.Join(errs...)
}

func reapRecord(id string) (err error) {
	f, err := os.OpenFile(filepath.Join(records, id, "owner"), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // being made or removed at this moment
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil // locked: its owner lives
	}
	dir, err := os.ReadFile(f.Name())
	if err != nil || len(dir) == 0 {
		return nil // being made or removed at this moment
	}
	return sweep(id, string(dir))
}

// sweep removes everything of the Env id by force.
func sweep(id, dir string) error {
	return errors.Join(
		killAll(id, dir),
		removeInstances(),
		unmountBelow(dir),
		removeCgroups(cgroupParent(id)),
		removeTree(dir),
		os.RemoveAll(filepath.Join(records, id)),
	)
}

// removeInstances removes the trace instances of dead processes: containerd kills the plugins that it launched
// when it ends, also one that is about to remove its own. A tracer that was killed just now holds its
// instance for a moment longer.
func removeInstances() error {
	fs, err := tracefs.Open()
	if err != nil {
		return nil //nolint:nilerr // where there is none nothing was left
	}
	deadline := time.Now().Add(stopTimeout)
	for {
		if err = fs.Clean(); err == nil || time.Now().After(deadline) {
			return errors.Join(err, fs.Close())
		}
		<-time.After(10 * time.Millisecond)
	}
}

// removeTree removes dir, but never through a mount that is left.
func removeTree(dir string) error {
	if left, err := procfs.MountsBelow(dir); err != nil || len(left) > 0 {
		return errors.Join(err, fmt.Errorf("keep %s: mounted below: %q", dir, left))
	}
	return os.RemoveAll(dir)
}

// killAll kills the Env's processes until there are none.
func killAll(id, dir string) error {
	deadline := time.Now().Add(stopTimeout)
	for {
		pids, err := processes(id, dir)
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v survive SIGKILL", pids)
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		<-time.After(10 * time.Millisecond)
	}
}

// processes returns the live processes of an Env: those that carry its mark
// (containerd, its shims), whose program lies below its directory (launched
// plugins, which NRI starts with an empty environment), that are in its cgroup
// (containers), and the process groups of all these (what a plugin started).
func processes(id, dir string) ([]int, error) {
	all, err := procfs.Processes()
	if err != nil {
		return nil, err
	}
	groups := map[int]bool{}
	own := map[int]bool{}
	for _, p := range all {
		if p.HasEnv(marker+"="+id) || strings.HasPrefix(p.Program(), dir+"/") || p.Below(cgroupParent(id)) {
			own[p.PID], groups[p.Group] = true, true
		}
	}
	delete(groups, unix.Getpgrp())
	var pids []int
	for _, p := range all {
		if !p.Zombie && (own[p.PID] || groups[p.Group]) {
			pids = append(pids, p.PID)
		}
	}
	return pids, nil
}

func unmountBelow(dir string) error {
	mounts, err := procfs.MountsBelow(dir)
	if err != nil {
		return err
	}
	slices.Reverse(mounts)
	var errs []error
	for _, m := range mounts {
		if err := unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, &os.PathError{Op: "unmount", Path: m, Err: err})
		}
	}
	return errors.Join(errs...)
}

// cgroupParent returns the path of the cgroup that an Env's pods are in, from
// the root of each hierarchy.
func cgroupParent(id string) string { return "/headstart-" + id }

// removeCgroups removes the cgroup called name and those below it from every
// hierarchy. A cgroup stays busy for a moment after its last process.
func removeCgroups(name string) error {
	mounts, err := procfs.Mounts()
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range mounts {
		if m.Type == "cgroup" || m.Type == "cgroup2" {
			errs = append(errs, removeCgroup(filepath.Join(m.Point, name)))
		}
	}
	return errors.Join(errs...)
}

func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeCgroup(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	for range 100 {
		if err = unix.Rmdir(dir); !errors.Is(err, unix.EBUSY) {
			break
		}
		<-time.After(10 * time.Millisecond)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "remove cgroup", Path: dir, Err: err}
	}
	return nil
}
