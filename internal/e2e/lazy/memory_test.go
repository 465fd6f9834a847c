package lazy_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// maxMemory is what daemon and holder may take, in KiB.
const maxMemory = 64 << 10

// TestSoakMemory has one daemon serve 20 mounts of four images of 1 GB in 20,000 files each, reads one mount of each image whole and a part of the others, and bounds what daemon and
// holder took at most.
func TestSoakMemory(t *testing.T) {
	if os.Getenv("SOAK") == "" {
		t.Skip("SOAK is not set")
	}
	eachDriver(t, func(t *testing.T, driver string) { servesInLittle(t, driver, 1_000_000_000, 4, 20) })
}

// TestMemory is the same with 20 mounts of small images.
func TestMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("reads for a while")
	}
	eachDriver(t, func(t *testing.T, driver string) { servesInLittle(t, driver, 20_000_000, 2, 20) })
}

func servesInLittle(t *testing.T, driver string, size int64, images, mounts int) {
	testenv.Root(t)
	source, root := large(t, size, 100, 5_000, 20_000, 50_000, 175_000)
	want := sums(t, root)
	layout := t.TempDir()
	var refs []string
	for i := range images {
		ref := fmt.Sprintf("oci:%s:%d", layout, i)
		run(t, testenv.Binary(t, "optimizer"), "convert", "--quiet", "--chunk-size", fmt.Sprintf("%dKiB", 64<<i), "oci:"+source, ref)
		refs = append(refs, ref)
	}
	r := newRigOf(t, driver)
	var dirs []string
	for i := range mounts {
		dirs = append(dirs, r.mount(t, "--background", "idle", refs[i%images]))
	}
	for i, dir := range dirs {
		part := 32
		if i < images {
			part = 1
		}
		readAll(t, dir, want, 2, part)
	}
	s, err := r.status()
	must(t, err)
	if len(s.Mounts) != mounts {
		t.Errorf("%d mounts, want %d", len(s.Mounts), mounts)
	}
	for who, pid := range map[string]int{"daemon": s.PID, "holder": s.Holder, "spare": s.Spare} {
		if pid == 0 {
			continue // not there yet
		}
		if got := peak(t, pid); got > maxMemory {
			t.Errorf("%s took %d KiB, want at most %d", who, got, maxMemory)
		} else {
			t.Logf("%d files, %d mounts: %s took %d KiB at most", len(want), mounts, who, got)
		}
	}
	for _, dir := range dirs {
		must(t, r.umount(dir))
	}
}

// peak returns the largest resident set of a process, in KiB.
func peak(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for line := range strings.SplitSeq(string(text), "\n") {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
			must(t, err)
			return kib
		}
	}
	t.Fatalf("process %d has no VmHWM", pid)
	return 0
}
