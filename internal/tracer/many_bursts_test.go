package tracer_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/tracer"
)

// another returns a box of the same image with a root of its own.
func (b *box) another(t *testing.T) *box {
	t.Helper()
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "tmpfs", "mode=755")
	n := &box{lower: b.lower, upper: dir + "/upper", merged: dir + "/merged"}
	for _, d := range []string{n.upper, n.merged, dir + "/work"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mount(t, "overlay", n.merged, "overlay", "lowerdir="+n.lower+":/,upperdir="+n.upper+",workdir="+dir+"/work")
	return n
}

// groups returns how many fanotify groups the processes have.
func groups(pids []int) (n int) {
	for _, pid := range pids {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && to == "anon_inode:[fanotify]" {
				n++
			}
		}
	}
	return n
}

// TestManyBursts holds that many bursts at once are recorded whole, and that they leave other containers the groups that those need.
func TestManyBursts(t *testing.T) {
	if testing.Short() {
		manyBursts(t, 4, 5_000)
		return
	}
	manyBursts(t, 12, 10_000)
}

// TestSoakManyBursts is the same with 40.
func TestSoakManyBursts(t *testing.T) {
	if os.Getenv("SOAK") == "" {
		t.Skip("SOAK is not set: make soak")
	}
	manyBursts(t, 40, 10_000)
}

func manyBursts(t *testing.T, containers, files int) {
	const perDir = 1_000
	text, err := os.ReadFile("/proc/sys/fs/fanotify/max_user_groups")
	if err != nil {
		t.Skipf("the kernel has no limit of groups: %v", err)
	}
	limit, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	b := newBox(t, fmt.Sprintf("cp %s program; mkdir burst; cd burst; for d in $(seq -w 0 99 | head -%d); do mkdir $d; done; "+
		"seq 0 %d | awk '{f=sprintf(\"%%02d/%%05d\", $1/%d, $1); print \"content\" > f; close(f)}'", workload(t), files/perDir, files-1, perDir))
	var all []*container
	var sessions []*tracer.Session
	var servers []int
	known := map[int]bool{}
	for range containers {
		c := b.another(t).create(t, pivot, "/program", "burst", strconv.Itoa(files), strconv.Itoa(perDir))
		all = append(all, c)
		sessions = append(sessions, start(t, c, tracer.Options{}))
	}
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range stats {
		text, _ := os.ReadFile(name) // the thread may be gone
		for field := range strings.FieldsSeq(string(text)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); strings.HasPrefix(string(comm), "optimizer-serve") && !known[pid] {
				known[pid] = true
				servers = append(servers, pid)
			}
		}
	}
	if n := groups(servers); n != containers {
		t.Fatalf("%d groups of %d tracers before they have anything to do, want one each", n, len(servers))
	}
	var group sync.WaitGroup
	over := make(chan struct{})
	most := 0
	group.Go(func() {
		for {
			select {
			case <-over:
				return
			case <-time.After(50 * time.Millisecond):
				most = max(most, groups(servers))
			}
		}
	})
	for _, c := range all {
		c.letGo(t)
	}
	for i, c := range all {
		if err := c.wait(t); err != nil {
			t.Errorf("container %d: %v\n%s", i, err, c.out.String())
		}
	}
	for i, s := range sessions {
		if r := result(t, s); r.Err != nil || !r.Trace.Complete() || len(r.Trace.Accesses) < files {
			t.Errorf("container %d: %d files, losses %q, error %v", i, len(r.Trace.Accesses), lossOf(r), r.Err)
		}
	}
	close(over)
	group.Wait()
	t.Logf("%d bursts of %d files: at most %d groups", containers, files, most)
	// With fewer containers than the long run has this cannot be reached: there it only says that groups are counted.
	if most > containers+limit/4 {
		t.Errorf("%d groups of %d tracers, want at most %d more than tracers", most, containers, limit/4)
	}
}
