package tracer_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// TestFilesystems holds paths and ranges on the filesystems that nodes have, in the roots that snapshotters
// make there: an overlay, a plain directory, and what the btrfs snapshotter mounts, a subvolume.
func TestFilesystems(t *testing.T) {
	const size = 1<<20 + 123
	args, truth := knownCalls(size)
	setup := identitySetup + "; " + knownFiles(size) + "; for f in cloned; do head -c 200000 /dev/urandom > k/$f; done"
	overlay := identityArgs
	plain := []string{"/program", "files", "read:/s/plain", "open:/s/opened", "unshared:/s/private", "pause:20ms", "write:/s/made", "read:/s/made"}
	wantPlain := []string{"/s/opened 0", "/s/plain 10000", "/s/private 10000"}
	for _, tt := range []struct {
		name, mkfs string
		options    []string
		layout     func(t *testing.T, b *box) *box
		args, want []string
	}{
		{name: "btrfs overlay", mkfs: "mkfs.btrfs", layout: asOverlay, args: overlay, want: identityWant},
		{name: "btrfs directory", mkfs: "mkfs.btrfs", options: []string{"compress-force=zstd"}, layout: asDirectory, args: plain, want: wantPlain},
		{name: "btrfs subvolume", mkfs: "mkfs.btrfs", layout: asSubvolume, args: plain, want: wantPlain},
		{name: "xfs overlay", mkfs: "mkfs.xfs", layout: asOverlay, args: overlay, want: identityWant},
		{name: "xfs directory", mkfs: "mkfs.xfs", layout: asDirectory, args: plain, want: wantPlain},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDiskBoxOn(t, testenv.Tool(t, tt.mkfs), setup, tt.options...)
			b := tt.layout(t, d)
			warm(t, d.lower+"/s", d.lower+"/k")
			time.Sleep(20 * time.Millisecond) // older than the run by more than a clock tick
			r := b.record(t, pivot, append([]string{"/program", "ranges"}, args...)...)
			judgeCalls(t, r, truth, size)
			if r.Grade != trace.GradeFaultAround {
				t.Errorf("grade %q by %q", r.Grade, r.Engine)
			}
			// What is copied by sharing blocks counts: elsewhere it has to be read.
			r = b.record(t, pivot, "/program", "ranges", "copy:/k/cloned:0:200000")
			if a, ok := find(r, "/k/cloned"); !ok || a.Ranges != nil && bytesOf(a) != a.Size {
				t.Errorf("a file that was copied: %+v, listed %v; want all of it", a, ok)
			}
			r = b.record(t, pivot, tt.args...)
			if diff := cmp.Diff(tt.want, identityOf(r)); diff != "" {
				t.Errorf("files and bytes (-want +got):\n%s", diff)
			}
			if r.Trace.Skipped < 1 {
				t.Errorf("skipped %d files, want those that the run made", r.Trace.Skipped)
			}
		})
	}
}

// bytesOf returns how many bytes an access has ranges of.
func bytesOf(a trace.Access) (n int64) {
	for _, g := range a.Ranges {
		n += g.Length
	}
	return n
}

// warm reads the files of directories: what is mapped of them is then mapped whole.
func warm(t *testing.T, dirs ...string) {
	t.Helper()
	for _, dir := range dirs {
		files, err := filepath.Glob(dir + "/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if _, err := os.ReadFile(f); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func asOverlay(_ *testing.T, b *box) *box { return b }

// asDirectory is what the native snapshotter makes: a copy of the image in a directory.
func asDirectory(_ *testing.T, b *box) *box { return &box{merged: b.lower} }

// asSubvolume is what the btrfs snapshotter makes: a snapshot of the image's subvolume, mounted by its name.
func asSubvolume(t *testing.T, b *box) *box {
	t.Helper()
	btrfs := testenv.Tool(t, "btrfs")
	top := filepath.Dir(b.lower)
	script := `cd "$1"; "$0" -q subvolume create image; cp -a lower/. image; "$0" -q subvolume snapshot image active`
	if out, err := exec.Command("bash", "-euc", script, btrfs, top).CombinedOutput(); err != nil {
		t.Fatalf("subvolumes: %v\n%s", err, out)
	}
	device, err := exec.Command("findmnt", "-n", "-o", "SOURCE", top).Output()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	name, _, _ := strings.Cut(strings.TrimSpace(string(device)), "[")
	mount(t, name, dir, "btrfs", "subvol=/active")
	warm(t, dir+"/s", dir+"/k")
	return &box{merged: dir}
}

// TestBtrfsNumbers has a file mounted over one of the root, as resolv.conf is, that has the inode number of a file of the
// image: subvolumes number their files each for itself, and the events do not name them.
func TestBtrfsNumbers(t *testing.T) {
	d := newDiskBoxOn(t, testenv.Tool(t, "mkfs.btrfs"), identitySetup+"; echo over > etc")
	b := asSubvolume(t, d)
	host := filepath.Dir(d.lower) + "/resolv"
	if err := os.WriteFile(host, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	want, err := stat(host, "")
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		if err := os.WriteFile(b.merged+"/s/clash", make([]byte, 10000), 0o644); err != nil {
			t.Fatal(err)
		}
		st, err := stat(b.merged, "/s/clash")
		if err != nil {
			t.Fatal(err)
		}
		if st.Ino == want.Ino {
			break
		}
		if st.Ino > want.Ino || i > 10000 {
			t.Fatalf("the subvolume numbers its next file %d, want %d at some time", st.Ino, want.Ino)
		}
		if err := os.Rename(b.merged+"/s/clash", fmt.Sprintf("%s/dev/%d", b.merged, i)); err != nil {
			t.Fatal(err)
		}
	}
	mountBind(t, host, b.merged+"/etc")
	time.Sleep(20 * time.Millisecond) // older than the run by more than a clock tick
	r := b.record(t, pivot, "/program", "files", "read:/etc", "read:/s/clash")
	if got, want := identityOf(r), []string{"/s/clash 10000"}; !slices.Equal(got, want) || len(r.Trace.Accesses) != 2 {
		t.Errorf("files %q of %+v, want %q and the program", got, r.Trace.Accesses, want)
	}
}

// mountBind mounts a file over another one for the rest of the test.
func mountBind(t *testing.T, source, target string) {
	t.Helper()
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, 0); err != nil {
			t.Error(err)
		}
	})
}

// TestErofsLayers has an overlay of EROFS filesystems, one for each layer of the image, whose files have the
// same inode numbers in all of them.
func TestErofsLayers(t *testing.T) {
	needKernel(t)
	mkfs := testenv.Tool(t, "mkfs.erofs")
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "tmpfs", "mode=755")
	page := int64(os.Getpagesize())
	const like = "; mkdir lay; head -c 65536 /dev/urandom > lay/"
	layers := []struct{ name, setup string }{ // the topmost first
		{"top", "mkdir t; mknod t/gone c 0 0" + like + "top"},
		{"mid", "mkdir t o; echo shown > t/under; head -c 10000 /dev/urandom > o/new" + like + "mid"},
		{"low", "mkdir t o; echo hidden and longer > t/under; echo gone > t/gone; echo old > o/old" + like + "low"},
		{"all", "mkdir dev; mknod -m 666 dev/null c 1 3; cp " + workload(t) + " program" + like + "all"},
	}
	var lower []string
	numbers := map[uint64][]string{}
	for i, l := range layers {
		tree, at, image := dir+"/tree-"+l.name, dir+"/"+l.name, filepath.Join(t.TempDir(), l.name)
		if out, err := exec.Command("bash", "-euc", `mkdir "$0" "$1"; cd "$0"; `+l.setup, tree, at).CombinedOutput(); err != nil {
			t.Fatalf("layer %s: %v\n%s", l.name, err, out)
		}
		if l.name == "mid" {
			if err := unix.Setxattr(tree+"/o", "trusted.overlay.opaque", []byte("y"), 0); err != nil {
				t.Fatal(err)
			}
		}
		args, devices := []string{image, tree}, []string(nil)
		if l.name == "all" { // its data are on a device, as where metadata of layers are merged
			devices = []string{image + ".data"}
			args = append([]string{"--chunksize=4096", "--blobdev=" + devices[0]}, args...)
		}
		if out, err := exec.Command(mkfs, args...).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.erofs: %v\n%s", err, out)
		}
		if i == 0 { // a block device
			if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", image, at).CombinedOutput(); err != nil {
				testenv.Kernel(t, "loop mounts of EROFS", fmt.Errorf("%w: %s", err, out))
			}
		} else if err := testenv.MountEROFSAt(at, image, devices...); err != nil {
			testenv.Kernel(t, "EROFS mounts of plain files (Linux 6.12, CONFIG_EROFS_FS_BACKED_BY_FILE)", err)
		}
		t.Cleanup(func() {
			if err := testenv.Unmount(at); err != nil {
				t.Error(err)
			}
		})
		lower = append(lower, at)
		if st, err := stat(at, "/lay/"+l.name); err == nil {
			numbers[st.Ino] = append(numbers[st.Ino], l.name)
		}
	}
	if len(numbers) == len(layers) {
		t.Errorf("no two layers have files of one inode number: %v", numbers)
	}
	b := &box{merged: dir + "/merged", upper: dir + "/upper"}
	for _, d := range []string{b.merged, b.upper, dir + "/work"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mount(t, "overlay", b.merged, "overlay", fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s/work", strings.Join(lower, ":"), b.upper, dir))
	for _, state := range []string{"cold", "warm"} {
		r := b.record(t, pivot, "/program", "ranges", "pread:/lay/top:0:1", fmt.Sprintf("pread:/lay/mid:%d:2", 5*page-1),
			fmt.Sprintf("mmap:/lay/low:%d:1", 9*page), "read:/t/under:0:6", "pread:/o/new:9999:1", "pread:/lay/all:8192:1")
		judgeLayers(t, state, r, map[string][]int64{"/lay/top": {0}, "/lay/mid": {4, 5}, "/lay/low": {9}, "/t/under": {0}, "/o/new": {2}, "/lay/all": {8192 / page}})
		for _, l := range layers {
			warm(t, dir+"/"+l.name+"/lay")
		}
	}
}

// judgeLayers holds that a trace has the program and these files, with these pages.
func judgeLayers(t *testing.T, state string, r tracer.Result, want map[string][]int64) {
	t.Helper()
	if len(r.Trace.Accesses) != len(want)+1 || r.Grade != trace.GradeFaultAround && r.Grade != trace.GradeExact {
		t.Errorf("%s: grade %q by %q, accesses %+v; want %d and the program", state, r.Grade, r.Engine, r.Trace.Accesses, len(want))
	}
	for path, pages := range want {
		a, ok := find(r, path)
		if !ok {
			t.Errorf("%s: %s is not listed", state, path)
			continue
		}
		truth := make(pageSet)
		for _, p := range pages {
			truth[p] = true
		}
		lower, upper := bounds(t, r, path, a.Size)
		judge(t, state+": "+path, lower, truth, upper)
		if path != "/lay/low" && (len(lower) != len(truth) || len(upper) != len(truth)) {
			t.Errorf("%s: %s: ranges %+v, want pages %v", state, path, a.Ranges, pages)
		}
	}
}
