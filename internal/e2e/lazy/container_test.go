package lazy_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// overlay mounts an overlay with a writable layer over a lazy mount and returns its root and the writable directory.
func overlay(t *testing.T, lower string) (merged, upper string) {
	t.Helper()
	dir := t.TempDir()
	merged, upper = filepath.Join(dir, "merged"), filepath.Join(dir, "upper")
	for _, d := range []string{merged, upper, filepath.Join(dir, "work")} {
		must(t, os.Mkdir(d, 0o755))
	}
	must(t, unix.Mount("overlay", merged, "overlay", 0, "lowerdir="+lower+",upperdir="+upper+",workdir="+filepath.Join(dir, "work")))
	t.Cleanup(func() { must(t, testenv.Unmount(merged)) })
	return merged, upper
}

// TestOverlay writes to files of a lazy mount through an overlay, which copies them up, and executes a program of it.
func TestOverlay(t *testing.T) {
	img := newImages(t)
	r := newRig(t)
	dir := r.mount(t, "--background", "none", img.ours(t, "plain"))
	t.Run("overlay", func(t *testing.T) {
		merged, upper := overlay(t, dir)
		const name = "/etc/debian_version"
		before, err := os.ReadFile(filepath.Join(img.root, name))
		must(t, err)
		f, err := os.OpenFile(merged+name, os.O_WRONLY|os.O_APPEND, 0)
		must(t, err)
		_, err = f.WriteString("more")
		must(t, err)
		must(t, f.Close())
		for at, want := range map[string]string{merged: string(before) + "more", upper: string(before) + "more", dir: string(before)} {
			if got, err := os.ReadFile(at + name); err != nil || string(got) != want {
				t.Errorf("%s after writing to its end through the overlay: got %q, %v; want %q", at+name, got, err, want)
			}
		}
		// The interpreter, its loader and its libraries are executed and mapped from the mount.
		out, err := exec.Command("chroot", merged, "/usr/bin/python3", "-c", "import numpy; print(int(numpy.arange(10).sum()))").CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != "45" {
			t.Errorf("python3 in the overlay: got %q, %v; want 45", out, err)
		}
	})
	out, err := exec.Command("chroot", dir, "/bin/cat", "/etc/debian_version").CombinedOutput()
	want, rerr := os.ReadFile(filepath.Join(img.root, "etc/debian_version"))
	must(t, rerr)
	if err != nil || string(out) != string(want) {
		t.Errorf("cat, executed from the mount itself: got %q, %v; want %q", out, err, want)
	}
	readAll(t, dir, img.want, 1, 8)
	must(t, r.umount(dir))
}

// TestRunc runs the image's own command in a container of runc whose root is an overlay on a cold lazy mount.
func TestRunc(t *testing.T) {
	for _, driver := range []string{"erofs", "fuse"} {
		t.Run(driver, func(t *testing.T) { testRunc(t, driver) })
	}
}

func testRunc(t *testing.T, driver string) {
	runc := testenv.Tool(t, "runc")
	img := newImages(t)
	r := newRig(t)
	dir := r.mount(t, "--driver", driver, "--background", "none", img.ours(t, "plain"))
	t.Run("container", func(t *testing.T) {
		merged, _ := overlay(t, dir)
		bundle, state := t.TempDir(), t.TempDir()
		run(t, runc, "spec", "--bundle", bundle)
		name := filepath.Join(bundle, "config.json")
		text, err := os.ReadFile(name)
		must(t, err)
		var spec map[string]any
		must(t, json.Unmarshal(text, &spec))
		process := spec["process"].(map[string]any)
		process["terminal"], process["args"], process["cwd"] = false, img.source.Command(), "/"
		process["env"] = img.source.Config.Config.Env
		delete(process, "rlimits")
		spec["root"] = map[string]any{"path": merged}
		linux := spec["linux"].(map[string]any)
		delete(linux, "resources") // and no cgroup of its own: the machine may have any kind
		linux["cgroupsPath"] = ""
		// The program serves itself over the loopback interface, which is the host's here.
		linux["namespaces"] = []map[string]string{{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}}
		text, err = json.Marshal(spec)
		must(t, err)
		must(t, os.WriteFile(name, text, 0o600))
		id := "lazy-" + strconv.Itoa(os.Getpid())
		out, err := exec.Command(runc, "--root", state, "run", "--bundle", bundle, id).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "ready 499500\n") {
			t.Errorf("the container: got %q, %v; want ready and the sum", out, err)
		}
	})
	s, err := r.status()
	must(t, err)
	if len(s.Mounts) != 1 || s.Mounts[0].Local <= 0 || s.Mounts[0].Local > s.Mounts[0].Total/2 {
		t.Errorf("after one start: %+v, want a part of the image to be local, and less than half", s.Mounts)
	}
	must(t, r.umount(dir))
}
