package tracefs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fake returns a tree that looks like a tracefs with these events.
func fake(t *testing.T, events Set) (*FS, string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "instances"), 0o700); err != nil {
		t.Fatal(err)
	}
	for k := range Kind(kinds) {
		if events.Has(k) {
			addEvent(t, dir, k)
		}
	}
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	fs, err := newFS(root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fs.Close(); err != nil {
			t.Error(err)
		}
	})
	return fs, dir
}

func addEvent(t *testing.T, dir string, k Kind) {
	t.Helper()
	event := filepath.Join(dir, "events", tracepoints[k].dir)
	if err := os.MkdirAll(event, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(event, "format"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A kernel without the page events gets the insertions, one without any a clear error.
func TestProbeOfOlderKernels(t *testing.T) {
	for name, tt := range map[string]struct {
		has, want Set
		missing   string
	}{
		"Linux 6.18":  {has: all, want: all},
		"Linux 6.10":  {has: Inserts | Processes, want: Inserts | Processes},
		"no events":   {has: Processes, missing: "filemap:mm_filemap_get_pages, filemap:mm_filemap_fault, filemap:mm_filemap_map_pages"},
		"pages alone": {has: Pages, want: Pages},
	} {
		fs, _ := fake(t, tt.has)
		for range 2 {
			got, err := fs.Probe(0)
			if got != tt.want || errors.Is(err, ErrUnsupported) != (tt.missing != "") {
				t.Errorf("%s: Probe() = %s, %v, want %s", name, got, err, tt.want)
			}
			if err != nil && !strings.Contains(err.Error(), tt.missing) {
				t.Errorf("%s: error %q does not name %s", name, err, tt.missing)
			}
		}
	}
}

// What is missing is conclusive; that it may not be seen is not.
func TestProbeRemembersWhatIsConclusive(t *testing.T) {
	fs, dir := fake(t, Inserts)
	if _, err := fs.Probe(Pages); !errors.Is(err, ErrUnsupported) {
		t.Fatalf("Probe() = %v, want ErrUnsupported", err)
	}
	for _, k := range []Kind{Read, Fault, Around} {
		addEvent(t, dir, k)
	}
	if got, err := fs.Probe(0); err != nil || got != Inserts {
		t.Errorf("Probe() = %s, %v, want what was found first", got, err)
	}

	fs, dir = fake(t, all)
	events := filepath.Join(dir, "events")
	if err := os.Rename(events, events+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("events", events); err != nil { // ELOOP, which says nothing of the kernel
		t.Fatal(err)
	}
	if _, err := fs.Probe(0); err == nil || errors.Is(err, ErrUnsupported) {
		t.Fatalf("Probe() = %v, want another error", err)
	}
	if err := errors.Join(os.Remove(events), os.Rename(events+".away", events)); err != nil {
		t.Fatal(err)
	}
	if got, err := fs.Probe(0); err != nil || got != all {
		t.Errorf("Probe() = %s, %v, want everything", got, err)
	}
}

// An instance that cannot be set up is not left behind, and the error says which file.
func TestCreateCleansUp(t *testing.T) {
	fs, dir := fake(t, Pages)
	if in, err := fs.Create(Options{}); err == nil || !strings.Contains(err.Error(), "create trace instance") {
		t.Errorf("Create() = %v, %v, want an error", in, err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "instances")); err != nil || len(left) != 0 {
		t.Errorf("instances left: %v, %v", left, err)
	}
	if err := os.Remove(filepath.Join(dir, "instances")); err != nil {
		t.Fatal(err)
	}
	if in, err := fs.Create(Options{}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("Create() without instances/ = %v, %v, want ErrUnsupported", in, err)
	}
	if in, err := fs.Create(Options{Ring: -1}); err == nil {
		t.Errorf("Create() with a negative ring = %v", in)
	}
	if in, err := fs.Create(Options{Events: Inserts}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "mm_filemap_add_to_page_cache") {
		t.Errorf("Create() with a missing event = %v, %v", in, err)
	}
}

func TestPoolSharesItsBudget(t *testing.T) {
	for name, tt := range map[string]struct {
		budget, ring int64
		max          int
		want         []int64 // MiB of the instances in order, in halves
	}{
		"enough": {64 << 20, 4 << 20, 4, []int64{8, 8, 8, 8}},
		"tight":  {6 << 20, 4 << 20, 4, []int64{8, 2, 1, 1}},
		"none":   {1, 4 << 20, 3, []int64{1, 1, 1}},
		"small":  {64 << 20, 256 << 10, 2, []int64{0, 0}},
	} {
		p := &Pool{o: PoolOptions{Budget: tt.budget, Max: tt.max, Instance: Options{Ring: tt.ring}}}
		for i, want := range tt.want {
			got := p.share()
			if got>>19 != want {
				t.Errorf("%s: instance %d gets %d bytes, want %d times 512 KiB", name, i, got, want)
			}
			p.spent += got
			p.count++
		}
		if sum := p.spent; sum > max(tt.budget, int64(tt.max)*leastRing) {
			t.Errorf("%s: %d bytes spent of %d", name, sum, tt.budget)
		}
	}
}

// A process that nobody has waited for holds no instance: what it made is to be removed.
func TestZombieIsDead(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	start, err := startTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	rest := fmt.Sprintf("%d-%d-1", cmd.Process.Pid, start)
	if !makerLives(rest) {
		t.Errorf("makerLives(%s) = false of a process that runs", rest)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// WNOWAIT leaves the zombie.
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if makerLives(rest) {
		t.Errorf("makerLives(%s) = true of a zombie", rest)
	}
	_ = cmd.Wait() // it was killed
}
