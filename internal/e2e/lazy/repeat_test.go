package lazy_test

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// TestRepeat records a start, builds the image around it, and repeats the start on a cold mount of that image: nothing is fetched on
// demand once the prefetch blob is here.
func TestRepeat(t *testing.T) {
	img := newImages(t)
	list := filepath.Join(t.TempDir(), "list")
	run(t, testenv.Binary(t, "optimizer"), "record", "--quiet", "--server-path", testenv.Binary(t, "optimizer-server"), "--timeout", "2m", "-o", list, "oci:"+img.source.Dir)
	ref := img.ours(t, "repeat", "--chunk-size", "64KiB", "--profile", list)
	r := newRig(t)
	dir := r.mount(t, "--background", "none", ref)
	s := r.waitStatus(t, "prefetch blob", func(s status) bool { return len(s.Mounts) == 1 && s.Mounts[0].Prefetched })
	if s.Mounts[0].Stats.Prefetch.Bytes == 0 {
		t.Fatalf("nothing was prefetched: %+v", s.Mounts[0])
	}
	t.Run("start", func(t *testing.T) {
		merged, _ := overlay(t, dir)
		command := append([]string{"chroot", merged}, img.source.Command()...)
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Env = img.source.Config.Config.Env
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "ready 499500\n") {
			t.Errorf("the program: got %q, %v; want ready and the sum", out, err)
		}
	})
	s, err := r.status()
	must(t, err)
	for _, m := range s.Mounts[0].Misses {
		t.Errorf("fetched on demand: chunk %d of blob %.12s, %s", m.Chunk, m.Blob, m.Path)
	}
	if got := s.Mounts[0].Stats; got.Misses != 0 || got.Demand.Requests != 0 {
		t.Errorf("repeating the recorded run: %d misses, %d requests on demand; want none", got.Misses, got.Demand.Requests)
	}
	must(t, r.umount(dir))
}
