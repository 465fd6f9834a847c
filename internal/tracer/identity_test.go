package tracer_test

import (
	"fmt"
	"os"
	"os/exec"
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

// newDiskBox returns a box whose layer and writable layer are on one filesystem, as they are
// where containerd keeps them, that page events cover: an ext4 in a file of its own.
func newDiskBox(t *testing.T, setup string) *box {
	t.Helper()
	return newDiskBoxOn(t, "mkfs.ext4", setup)
}

// newDiskBoxOn is newDiskBox on the filesystem that the program mkfs makes, mounted with options.
func newDiskBoxOn(t *testing.T, mkfs, setup string, options ...string) *box {
	t.Helper()
	needKernel(t)
	dir := newDisk(t, mkfs, options...)
	b := &box{lower: dir + "/lower", upper: dir + "/upper", merged: dir + "/merged"}
	for _, d := range []string{b.lower, b.upper, b.merged, dir + "/work"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("bash", "-euc", "mkdir -p dev s; mknod -m 666 dev/null c 1 3; cp "+workload(t)+" program; "+setup)
	cmd.Dir = b.lower
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("setup: %v\n%s", err, out)
	}
	mount(t, "overlay", b.merged, "overlay", fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s/work", b.lower, b.upper, dir))
	return b
}

// newDisk mounts a filesystem of its own, in a file, for the rest of the test.
func newDisk(t *testing.T, mkfs string, options ...string) string {
	t.Helper()
	top := t.TempDir()
	image, dir := top+"/image", top+"/disk"
	script := fmt.Sprintf("mkdir %[2]s; truncate -s 1G %[1]s; %[3]s -q %[1]s", image, dir, mkfs)
	if out, err := exec.Command("bash", "-euc", script).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", mkfs, err, out)
	}
	if out, err := exec.Command("mount", "-o", strings.Join(append(options, "loop"), ","), image, dir).CombinedOutput(); err != nil {
		testenv.Kernel(t, "loop mounts of what "+mkfs+" makes", fmt.Errorf("%w: %s", err, out))
	}
	t.Cleanup(func() {
		if err := testenv.Unmount(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// identitySetup makes files of 10,000 bytes that TestIdentity does things to.
const identitySetup = "for f in plain renamed linked hard1 removed changed mapped opened private owned untouched twice; do head -c 10000 /dev/urandom > s/$f; done; ln s/hard1 s/hard2; : > s/empty"

// identityArgs is what it does to them.
var identityArgs = []string{
	"/program", "files", "read:/s/plain", "rename:/s/renamed:/s/newname", "read:/s/newname", "link:/s/linked:/s/mylink", "read:/s/mylink",
	"read:/s/hard2", "read:/s/removed", "remove:/s/removed", "append:/s/changed", "read:/s/changed", "map:/s/mapped", "open:/s/opened",
	"write:/s/made", "read:/s/made", "read:/s/empty", "unshared:/s/private", "read:/s/twice", "read:/s/twice", "own:/s/owned",
}

// identityWant is what identityOf then says.
var identityWant = []string{
	"/s/changed 10000", "/s/empty 0", "/s/hard2 10000", "/s/linked 10000", "/s/mapped 10000", "/s/opened 0", "/s/owned 10000", "/s/plain 10000",
	"/s/private 10000", "/s/removed 10000", "/s/renamed 10000", "/s/twice 10000",
}

// identityOf returns the paths below /s with the bytes that were touched of each.
func identityOf(r tracer.Result) []string {
	var got []string
	for _, a := range r.Trace.Accesses {
		if !strings.HasPrefix(a.Path, "/s/") {
			continue
		}
		var n int64
		for _, g := range a.Ranges {
			n += g.Length
		}
		if a.Ranges == nil {
			n = -1
		}
		got = append(got, fmt.Sprint(a.Path, " ", n))
	}
	slices.Sort(got)
	return got
}

// TestIdentity holds that files are listed by the path they have in the image, whatever a run does
// to their names, that files which the run makes are not, and that a copy of a file into the
// writable layer counts as a read of the one in the image.
func TestIdentity(t *testing.T) {
	boxes := map[string]func(t *testing.T) *box{
		"one filesystem": func(t *testing.T) *box { return newDiskBox(t, identitySetup) },
		"writable layer out of sight": func(t *testing.T) *box { // as where it is in a mount of the container's own
			b := newDiskBox(t, identitySetup)
			if err := os.Rename(b.upper, b.upper+".away"); err != nil {
				t.Fatal(err)
			}
			return b
		},
		"layer and writable layer apart": func(t *testing.T) *box {
			return &newColdBox(t, "cp "+workload(t)+" program; mkdir s; "+identitySetup).box
		},
	}
	for name, newBox := range boxes {
		t.Run(name, func(t *testing.T) {
			b := newBox(t)
			for p := range strings.SplitSeq("plain renamed linked hard1 removed changed mapped private owned twice", " ") {
				if _, err := os.ReadFile(b.lower + "/s/" + p); err != nil { // warm: what is mapped is mapped whole
					t.Fatal(err)
				}
			}
			r := b.record(t, pivot, identityArgs...)
			if diff := cmp.Diff(identityWant, identityOf(r)); diff != "" {
				t.Errorf("files and bytes (-want +got):\n%s", diff)
			}
			if r.Trace.Skipped < 1 {
				t.Errorf("skipped %d files, want those that the run made", r.Trace.Skipped)
			}
			for _, a := range r.Trace.Accesses {
				known := a.Command == "program" || a.Path == "/program" || a.Path == "/s/private" // the child is soon gone
				if a.PID == 0 || !known || !slices.ContainsFunc(r.Trace.Processes, func(p trace.Process) bool { return p.PID == a.PID }) {
					t.Errorf("%s was touched by %d %q of %+v", a.Path, a.PID, a.Command, r.Trace.Processes)
				}
			}
			if n := len(r.Trace.Processes); n != 2 || r.Trace.Processes[0].Parent != 0 || r.Trace.Processes[1].Parent != r.Trace.Processes[0].PID {
				t.Errorf("processes %+v, want the first and its child", r.Trace.Processes)
			}
		})
	}
}

// TestPlainRootPages holds that page events find what a mount mark misses, and leave out what is made.
func TestPlainRootPages(t *testing.T) {
	d := newDiskBox(t, identitySetup)
	time.Sleep(20 * time.Millisecond) // older than the run by more than a clock tick
	b := &box{merged: d.lower}
	r := b.record(t, chroot, "/program", "files", "read:/s/plain", "open:/s/opened", "unshared:/s/private", "pause:20ms", "write:/s/made", "read:/s/made")
	want := []string{"/s/opened 0", "/s/plain 10000", "/s/private 10000"}
	if diff := cmp.Diff(want, identityOf(r)); diff != "" {
		t.Errorf("files and bytes (-want +got):\n%s", diff)
	}
}

// TestVolume holds that what is mounted into the container is left out, and is no loss.
func TestVolume(t *testing.T) {
	d := newDiskBox(t, identitySetup+"; mkdir volume; echo x > etc")
	host := strings.TrimSuffix(d.lower, "/lower")
	if out, err := exec.Command("bash", "-euc", "cd $0; mkdir vol; head -c 5000 /dev/zero > vol/f; echo y > resolv", host).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, m := range [][2]string{{host + "/vol", d.merged + "/volume"}, {host + "/resolv", d.merged + "/etc"}} {
		if err := unix.Mount(m[0], m[1], "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(m[1], 0); err != nil {
				t.Error(err)
			}
		})
	}
	r := d.record(t, chroot, "/program", "files", "read:/volume/f", "read:/etc", "read:/s/plain")
	if got, want := identityOf(r), []string{"/s/plain 10000"}; !slices.Equal(got, want) {
		t.Errorf("files %q, want %q", got, want)
	}
	if len(r.Trace.Accesses) != 2 || r.Trace.Skipped < 2 {
		t.Errorf("accesses %+v, skipped %d; want the program and a file, and two skipped", r.Trace.Accesses, r.Trace.Skipped)
	}
}

// TestQuietNames holds that files are named while nothing happens, so that a tracer that dies later has
// told of them.
func TestQuietNames(t *testing.T) {
	b := newDiskBox(t, identitySetup)
	c := b.create(t, pivot, "/program", "files", "read:/s/plain", "pause:60s")
	s := start(t, c, tracer.Options{})
	server := childOf(t, os.Getpid(), "optimizer-server")
	c.letGo(t)
	time.Sleep(5 * time.Second)
	signal(t, server, unix.SIGKILL)
	r := result(t, s)
	if _, ok := find(r, "/s/plain"); !ok || lossOf(r) != "killed -1" || r.Grade != trace.GradeFile {
		t.Errorf("listed %v, losses %q, grade %q", ok, lossOf(r), r.Grade)
	}
}
