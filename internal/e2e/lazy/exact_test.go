package lazy_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
)

// TestRecordExact records the same start on a stock overlay and with --exact, of the plain image and of a Nydus image, and holds the lists
// against each other: the same files, no byte that is not certain, and not more than the stock run's upper bound.
func TestRecordExact(t *testing.T) {
	img := newImages(t)
	stock := record(t, "oci:"+img.source.Dir)
	upper, lower := bytesOf(stock)
	files := read(stock)
	for name, ref := range map[string]string{"plain": "oci:" + img.source.Dir, "nydus": img.ours(t, "plain")} {
		t.Run(name, func(t *testing.T) {
			l := record(t, ref, "--exact", "--scratch", t.TempDir())
			all, certain := bytesOf(l)
			if l.Grade != persist.GradeExact || all != certain {
				t.Errorf("grade %q with %d of %d bytes certain, want %q and all", l.Grade, certain, all, persist.GradeExact)
			}
			// A page of a large folio or two may differ from run to run.
			if all > upper || all < lower {
				t.Errorf("%d bytes, want between the %d that a stock run is sure of and its upper bound of %d", all, lower, upper)
			}
			if !l.Complete() {
				t.Errorf("the list has losses: %+v", l.Losses)
			}
			if name == "plain" && l.Digest != stock.Digest {
				t.Errorf("the list is of %s, want the plain image's %s", l.Digest, stock.Digest)
			}
			got := read(l)
			for path := range files {
				if !got[path] {
					t.Errorf("%s is not in the exact list", path)
				}
			}
		})
	}
}

// record records a start of an image and returns the list.
func record(t *testing.T, ref string, args ...string) *persist.List {
	t.Helper()
	name := filepath.Join(t.TempDir(), "list")
	run(t, testenv.Binary(t, "optimizer"), append(append([]string{"record", "--quiet", "--server-path", testenv.Binary(t, "optimizer-server"), "--timeout", "2m", "-o", name}, args...), ref)...)
	f, err := os.Open(name)
	must(t, err)
	defer f.Close()
	l, err := persist.Read(f)
	must(t, err)
	return l
}

// bytesOf returns how many bytes the ranges of a list have, and how many of them are certain.
func bytesOf(l *persist.List) (all, certain int64) {
	for _, a := range l.Accesses {
		for _, r := range a.Ranges {
			all += r.Length
			if r.Certain {
				certain += r.Length
			}
		}
	}
	return all, certain
}

// read returns the files of a list of which bytes were touched for certain.
func read(l *persist.List) map[string]bool {
	files := map[string]bool{}
	for _, a := range l.Accesses {
		for _, r := range a.Ranges {
			if r.Certain {
				files[a.Path] = true
			}
		}
	}
	return files
}

// TestRecordExactKilled kills a recorder with its mount: the next recording, exact or not, takes it away.
func TestRecordExactKilled(t *testing.T) {
	img := newImages(t)
	scratch := t.TempDir()
	args := []string{"record", "--quiet", "--server-path", testenv.Binary(t, "optimizer-server"), "--timeout", "2m", "--scratch", scratch, "-o", filepath.Join(t.TempDir(), "list")}
	cmd := exec.Command(testenv.Binary(t, "optimizer"), append(args, "--exact", "--entrypoint", "sleep", img.ours(t, "plain"), "--", "600")...)
	cmd.Stderr = os.Stderr
	must(t, cmd.Start())
	mounts := func() (dirs []string) {
		all, err := os.ReadFile("/proc/self/mountinfo")
		must(t, err)
		for line := range strings.SplitSeq(string(all), "\n") {
			if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], scratch) {
				dirs = append(dirs, f[4])
			}
		}
		return dirs
	}
	deadline := time.Now().Add(patience)
	for len(mounts()) == 0 && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	must(t, cmd.Process.Kill())
	if err := cmd.Wait(); err == nil {
		t.Fatal("it was not killed")
	}
	left, err := filepath.Glob(filepath.Join(scratch, "exact-*"))
	must(t, err)
	if len(left) != 1 || len(mounts()) == 0 {
		t.Fatalf("a killed recorder left %q and the mounts %q, want one of each: nothing is shown", left, mounts())
	}
	run(t, testenv.Binary(t, "optimizer"), append(args, "oci:"+img.source.Dir)...)
	if left, err := filepath.Glob(filepath.Join(scratch, "exact-*")); err != nil || len(left) != 0 || len(mounts()) != 0 {
		t.Errorf("after the next recording there are %q, %v, and the mounts %q", left, err, mounts())
	}
}
