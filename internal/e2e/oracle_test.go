package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/workload"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

const (
	snapshotter  = "overlayfs"
	criNamespace = "k8s.io"
)

// rootMounts prepares the image's root in containerd's snapshotter and returns its
// mounts: a writable one over the image's layers, or a view of them.
func rootMounts(t *testing.T, client *containerd.Client, img *workload.Image, writable bool) []mount.Mount {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), criNamespace)
	parent := identity.ChainID(img.Config.RootFS.DiffIDs).String()
	key := fmt.Sprintf("%s-%t-%s", strings.ReplaceAll(t.Name(), "/", "-"), writable, filepath.Base(t.TempDir()))
	service := client.SnapshotService(snapshotter)
	prepare := service.View
	if writable {
		prepare = service.Prepare
	}
	// A root of its own, or containerd's next garbage collection takes it.
	root := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": time.Now().UTC().Format(time.RFC3339)})
	mounts, err := prepare(ctx, key, parent, root)
	must(t, err)
	t.Cleanup(func() {
		if err := service.Remove(context.WithoutCancel(ctx), key); err != nil {
			t.Error(err)
		}
	})
	return mounts
}

// mergedRoot mounts the container's merged root read-only for the rest of the test.
func mergedRoot(t *testing.T, client *containerd.Client, img *workload.Image) string {
	t.Helper()
	mounts := rootMounts(t, client, img, false)
	dir := t.TempDir()
	must(t, mount.All(mounts, dir))
	t.Cleanup(func() {
		if err := testenv.Unmount(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// straceRun runs the command in a root like the container's, with strace, and returns
// which files of the image it touched and how. Wait waits for the end of the command,
// whose root is at root, and may bring it about.
func straceRun(t *testing.T, client *containerd.Client, img *workload.Image, argv []string, wait func(cmd *exec.Cmd, root string) error) *straced {
	t.Helper()
	strace := testenv.Tool(t, "strace")
	mounts := rootMounts(t, client, img, true)
	pristine := mergedRoot(t, client, img)
	root, log := t.TempDir(), filepath.Join(t.TempDir(), "strace")
	var got *straced
	testenv.MountNamespace(t, func() error {
		if err := mount.All(mounts, root); err != nil {
			return fmt.Errorf("mount root: %w", err)
		}
		if err := systemMounts(root); err != nil {
			return err
		}
		args := []string{"-f", "-y", "-s", "0", "-e", straceCalls, "-e", "signal=none", "-o", log, "env", "-i"}
		args = append(args, img.Config.Config.Env...)
		// runc sets HOME where the image does not.
		args = append(args, "HOME=/root", "/usr/sbin/chroot", root)
		cmd := exec.CommandContext(t.Context(), strace, append(args, argv...)...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			return err
		}
		if err := wait(cmd, root); err != nil {
			_ = cmd.Process.Kill()
			return fmt.Errorf("strace %v: %w\n%s", argv, err, out.Bytes())
		}
		f, err := os.Open(log)
		if err != nil {
			return err
		}
		got, err = straceLog(f, root)
		return errors.Join(err, f.Close())
	})
	must(t, got.load(pristine))
	for _, path := range got.paths() {
		info, err := os.Lstat(filepath.Join(pristine, path))
		if err != nil || !info.Mode().IsRegular() || shadowed(path) {
			got.leaveOut(path)
		}
	}
	return got
}

// systemMounts gives root what every container has.
func systemMounts(root string) error {
	for _, m := range []struct{ fstype, dir, data string }{
		{"proc", "proc", ""}, {"tmpfs", "dev", "mode=755"}, {"sysfs", "sys", ""},
	} {
		dir := filepath.Join(root, m.dir)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, dir, m.fstype, unix.MS_NOSUID|unix.MS_NOEXEC, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.fstype, err)
		}
	}
	for name, minor := range map[string]uint32{"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9} {
		if err := unix.Mknod(filepath.Join(root, "dev", name), unix.S_IFCHR|0o666, int(unix.Mkdev(1, minor))); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(target, filepath.Join(root, "dev", name)); err != nil {
			return err
		}
	}
	return nil
}

// shadowed reports whether the runtime mounts something else over the path.
func shadowed(path string) bool {
	for _, dir := range []string{"/proc/", "/dev/", "/sys/"} {
		if strings.HasPrefix(path, dir) {
			return true
		}
	}
	return slices.Contains([]string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}, path)
}

// compareWithStrace holds the list to account: every file that strace saw opened is
// there, none that was not, what was read says so, and so does every page of what was read.
func compareWithStrace(t *testing.T, list *persist.List, want *straced) {
	t.Helper()
	faults := append(straceFaults(list, want.touched), rangeFaults(list, want)...)
	if len(faults) > 0 {
		t.Errorf("list of %d files, strace %d, %d differences:\n%s", len(list.Accesses), len(want.touched), len(faults),
			strings.Join(faults[:min(len(faults), differencesShown)], "\n"))
		return
	}
	t.Logf("list (grade %s) and strace agree on %d files, %d bytes read of %d of them, %d mapped", list.Grade, len(want.touched),
		bytesOf(want.reads), len(want.reads), len(want.mapped))
}

// straceFaults returns one line for each way in which the list differs from want.
func straceFaults(list *persist.List, want touched) (faults []string) {
	fault := func(what, path string) { faults = append(faults, what+": "+path) }
	got := touched{}
	for i, a := range list.Accesses {
		if a.How == trace.Runtime {
			continue // read by the container runtime, before the container was there to be watched
		}
		if _, twice := got[a.Path]; twice {
			fault("listed twice", a.Path)
		}
		if i > 0 && a.Elapsed < list.Accesses[i-1].Elapsed {
			fault("touched before the one above it", a.Path)
		}
		got[a.Path] = a.How
		if _, ok := want[a.Path]; !ok {
			fault("too many", a.Path)
		}
	}
	for path, how := range want {
		g, ok := got[path]
		switch {
		case !ok:
			fault("missing", path)
		case how&trace.Read != 0 && g&trace.Read == 0:
			fault("was read and does not say so", path)
		case how&trace.Read == 0 && g&trace.Read != 0:
			fault("says it was read and was not", path)
		case how&trace.Executed != g&trace.Executed:
			fault(fmt.Sprintf("says executed: %t, strace says %t", g&trace.Executed != 0, how&trace.Executed != 0), path)
		}
	}
	slices.Sort(faults)
	return faults
}

// TestStraceFaults holds the comparison itself to account.
func TestStraceFaults(t *testing.T) {
	t.Parallel()
	want := touched{"/a": trace.Opened | trace.Read, "/b": trace.Opened, "/c": trace.Opened | trace.Read | trace.Executed}
	whole := []trace.Access{
		{Path: "/c", How: trace.Opened | trace.Read | trace.Executed},
		{Path: "/a", How: trace.Opened | trace.Read, Elapsed: 1},
		{Path: "/b", How: trace.Opened, Elapsed: 2},
	}
	for name, test := range map[string]struct {
		change func(a []trace.Access) []trace.Access
		fault  string // empty: none
	}{
		"equal":    {func(a []trace.Access) []trace.Access { return a }, ""},
		"missing":  {func(a []trace.Access) []trace.Access { return a[:2] }, "missing: /b"},
		"too many": {func(a []trace.Access) []trace.Access { return append(a, trace.Access{Path: "/d", Elapsed: 3}) }, "too many: /d"},
		"twice":    {func(a []trace.Access) []trace.Access { return append(a, a[2]) }, "listed twice: /b"},
		"unread":   {func(a []trace.Access) []trace.Access { a[1].How = trace.Opened; return a }, "was read and does not say so: /a"},
		"read":     {func(a []trace.Access) []trace.Access { a[2].How |= trace.Read; return a }, "says it was read and was not: /b"},
		"executed": {func(a []trace.Access) []trace.Access { a[0].How &^= trace.Executed; return a }, "says executed: false, strace says true: /c"},
		"order":    {func(a []trace.Access) []trace.Access { a[2].Elapsed = 0; return a }, "touched before the one above it: /b"},
	} {
		l := &persist.List{Trace: trace.Trace{Accesses: test.change(slices.Clone(whole))}}
		if got := strings.Join(straceFaults(l, want), "\n"); got != test.fault {
			t.Errorf("%s: straceFaults = %q, want %q", name, got, test.fault)
		}
	}
}
