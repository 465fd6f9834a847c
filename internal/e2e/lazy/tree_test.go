package lazy_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// v6Fixtures returns what mounts each of the v6 fixtures.
func v6Fixtures(t *testing.T) map[string][]string {
	t.Helper()
	fixtures := testenv.Fixtures(t)
	mounts := map[string][]string{"oci-nydus-v6": {"oci:" + filepath.Join(fixtures, "oci", "nydus-v6")}}
	dirs, err := filepath.Glob(filepath.Join(fixtures, "nydus", "v6-*"))
	must(t, err)
	if len(dirs) == 0 {
		t.Fatalf("%s has no v6 images", fixtures)
	}
	for _, d := range dirs {
		mounts[filepath.Base(d)] = []string{"--bootstrap", filepath.Join(d, "image.boot"), "--blob-dir", filepath.Join(d, "blobs")}
	}
	return mounts
}

// TestFixtures compares every v6 fixture, mounted lazily, with the tree that it means, by the fixtures' own comparer.
func TestFixtures(t *testing.T) {
	fixtures := testenv.Fixtures(t)
	python, err := exec.LookPath("python3")
	if err != nil {
		testenv.Missing(t, "python3: %v", err)
	}
	for name, args := range v6Fixtures(t) {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			for _, background := range []string{"none", "full"} {
				dir := r.mount(t, append([]string{"--background", background}, args...)...)
				out, err := exec.Command(python, filepath.Join(fixtures, "cmp_tree.py"), dir, filepath.Join(fixtures, "expected.json")).CombinedOutput()
				if err != nil {
					t.Errorf("background %s: %v\n%s", background, err, out)
				}
				must(t, r.umount(dir))
			}
		})
	}
}

// TestV5 asks for mounts of a v5 image, which the kernel does not know: the one behind FUSE has its tree, the one
// that has to be the kernel's is refused.
func TestV5(t *testing.T) {
	fixtures := testenv.Fixtures(t)
	r := newRig(t)
	d := filepath.Join(fixtures, "nydus", "v5-zstd")
	image := []string{"--bootstrap", filepath.Join(d, "image.boot"), "--blob-dir", filepath.Join(d, "blobs")}
	dir := t.TempDir()
	_, err := r.command("mount", append(image, "--driver", "erofs", dir)...)
	if err == nil || !strings.Contains(err.Error(), "5") {
		t.Errorf("mount of a v5 image by the kernel: got %v, want an error that says what it is", err)
	}
	var st, parent unix.Stat_t
	must(t, errors.Join(unix.Stat(dir, &st), unix.Stat(filepath.Dir(dir), &parent)))
	if st.Dev != parent.Dev {
		t.Errorf("something is mounted at %s", dir)
	}

	if _, err := r.command("mount", append(image, dir)...); err != nil {
		t.Fatal(err)
	}
	status, err := r.command("status", "-o", "json")
	if err != nil || !strings.Contains(string(status), `"driver": "fuse"`) {
		t.Errorf("status: %v, %s, want a mount by FUSE", err, status)
	}
	out, err := exec.Command(testenv.Tool(t, "python3"), filepath.Join(fixtures, "cmp_tree.py"), dir, filepath.Join(fixtures, "expected.json")).CombinedOutput()
	if err != nil {
		t.Errorf("compare: %v: %s", err, out)
	}
	if _, err := r.command("umount", dir); err != nil {
		t.Error(err)
	}
}

// TestWholeTree reads the whole of a real image through cold mounts, by 1, 8 and 64 processes at once and in every way, and compares
// the content of all files with what tar unpacks: our images, plain and optimized, and the real nydus-image's.
func TestWholeTree(t *testing.T) {
	img := newImages(t)
	list := filepath.Join(t.TempDir(), "list")
	must(t, os.WriteFile(list, []byte(strings.Join(sorted(img.want)[:2000], "\n")+"\n"), 0o600))
	for _, c := range []struct {
		name   string
		args   []string
		driver string
	}{
		{"ours", []string{img.ours(t, "plain")}, ""},
		{"ours, FUSE", []string{img.ours(t, "plain")}, "fuse"},
		{"ours, v5, FUSE", []string{img.ours(t, "old", "--fs-version", "5")}, "fuse"},
		{"optimized", []string{img.ours(t, "fast", "--chunk-size", "64KiB", "--profile", list)}, ""},
		{"nydus-image", img.theirs(t), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, n := range []struct{ readers, part int }{{1, 1}, {8, 2}, {64, 16}} {
				if testing.Short() && (n.readers != 8 || c.name == "ours, v5, FUSE") {
					continue
				}
				t.Run(fmt.Sprint(n.readers), func(t *testing.T) {
					r := newRigOf(t, c.driver)
					dir := r.mount(t, append([]string{"--background", "none"}, c.args...)...)
					readAll(t, dir, img.want, n.readers, n.part)
					s, err := r.status()
					must(t, err)
					if len(s.Mounts) != 1 || s.Mounts[0].Stats.Failed != 0 || s.Mounts[0].Stats.Corrupt != 0 {
						t.Errorf("status after reading: %+v, want one mount without failures", s.Mounts)
					}
					must(t, r.umount(dir))
				})
			}
		})
	}
}

// TestDirectIO asserts what is documented: the kernel refuses O_DIRECT on EROFS mounts of plain files.
func TestDirectIO(t *testing.T) {
	fixtures := testenv.Fixtures(t)
	r := newRig(t)
	d := filepath.Join(fixtures, "nydus", "v6-zstd")
	dir := r.mount(t, "--bootstrap", filepath.Join(d, "image.boot"), "--blob-dir", filepath.Join(d, "blobs"))
	for name := range sums(t, dir) {
		fd, err := unix.Open(filepath.Join(dir, name), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err == nil {
			_ = unix.Close(fd)
		}
		if !errors.Is(err, unix.EINVAL) {
			t.Errorf("open %s with O_DIRECT: got %v, want EINVAL", name, err)
		}
		return
	}
}
