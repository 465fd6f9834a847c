package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// plugin returns the process of the node's plugin.
func (n *node) plugin() int {
	n.t.Helper()
	want, err := os.Stat(filepath.Join(n.PluginDir(), "02-optimizer-nri-plugin"))
	must(n.t, err)
	pid := 0
	eventually(n.t, "the plugin", func() bool {
		names, err := filepath.Glob("/proc/[0-9]*/exe")
		if err != nil {
			return false
		}
		for _, name := range names {
			if info, err := os.Stat(name); err == nil && os.SameFile(info, want) {
				pid, err = strconv.Atoi(strings.Split(name, "/")[2])
				return err == nil
			}
		}
		return false
	})
	return pid
}

// holds is what a plugin has: descriptors, threads, children.
type holds struct{ files, threads, children int }

func held(t testing.TB, pid int) holds {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	must(t, err)
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	must(t, err)
	h := holds{threads: len(tasks)}
	for _, f := range files {
		// Instances of the pool, which keeps more of them for a while after a rush, are looked at by name.
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, f.Name()))
		if err == nil && !strings.Contains(to, tracefs.Prefix) {
			h.files++
		}
	}
	for _, task := range tasks {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, task.Name()))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		h.children += len(strings.Fields(string(children)))
	}
	return h
}

// instances returns the names of the trace instances that this project made and that are there now.
func instances(t testing.TB) []string {
	t.Helper()
	var names []string
	testenv.MountNamespace(t, func() error {
		dir, err := os.MkdirTemp("", "hs-tracefs-")
		if err != nil {
			return err
		}
		defer os.Remove(dir) //nolint:errcheck // empty
		if err := unix.Mount("tracefs", dir, "tracefs", 0, ""); err != nil {
			return err
		}
		found, err := filepath.Glob(filepath.Join(dir, "instances", tracefs.Prefix+"*"))
		for _, f := range found {
			names = append(names, filepath.Base(f))
		}
		return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
	})
	slices.Sort(names)
	return names
}

// TestManyAtOnce starts 50 containers at once, 20 of them of one image: every list is complete.
func TestManyAtOnce(t *testing.T) {
	perImage := []int{20, 15, 15}
	if testing.Short() {
		perImage = []int{5, 2, 2}
	}
	n := newNode(t, noRebuild)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var all []*testcri.Container
	p := n.pod(ctx, testcri.PodOptions{})
	for i, count := range perImage {
		ref := fmt.Sprintf("docker.io/library/many:v%d", i)
		n.importHello(ref, map[string][]byte{"/etc/one": []byte("1"), fmt.Sprintf("/etc/of%d", i): []byte("x")}, nil)
		for c := range count {
			ctr, err := p.Create(ctx, testcri.ContainerOptions{
				Image: ref, Name: fmt.Sprintf("c%d-%d", i, c), Args: []string{"/etc/one", fmt.Sprintf("/etc/of%d", i)},
			})
			must(t, err)
			all = append(all, ctr)
		}
	}
	var group sync.WaitGroup
	errs := make([]error, len(all))
	for i, c := range all {
		group.Go(func() {
			_, err := c.Start(ctx)
			if err == nil {
				_, err = c.Wait(ctx)
			}
			errs[i] = err
		})
	}
	group.Wait()
	must(t, errors.Join(errs...))
	grades := map[string]int{}
	at := 0
	for i, count := range perImage {
		for range count {
			l := n.list(all[at].ID)
			at++
			if want := []string{"/hello", "/etc/one", fmt.Sprintf("/etc/of%d", i)}; !l.Complete() || !slices.Equal(listed(l, nil), want) {
				t.Errorf("list of %s: %q, losses %v", l.Name, listed(l, nil), l.Losses)
			}
			grades[l.Grade]++
		}
	}
	t.Logf("%d lists, by grade %v", len(all), grades)
	// The pool has some instances ready, and makes more while the containers start.
	if len(all)-grades[trace.GradeFile] < min(tracefs.DefaultReady, len(all)) {
		t.Errorf("%d of %d lists are of whole files", grades[trace.GradeFile], len(all))
	}
}

// TestShortLived has containers that end at once, one after the other, and some that are killed: the
// plugin holds afterwards what it held before.
func TestShortLived(t *testing.T) {
	count := 60
	if testing.Short() {
		count = 12
	}
	shortLived(t, func(i int) bool { return i < count })
}

// TestSoakShortLived goes on for the duration in SOAK, and for 500 containers at least.
func TestSoakShortLived(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Skip("SOAK says no duration")
	}
	end := time.Now().Add(length)
	shortLived(t, func(i int) bool { return i < 500 || time.Now().Before(end) })
}

func shortLived(t *testing.T, more func(i int) bool) {
	n := newNode(t, "overwrite = true\n"+noRebuild)
	ctx := t.Context()
	const ref = "docker.io/library/short:v1"
	n.importHello(ref, map[string][]byte{"/etc/one": []byte("1")}, nil)
	p := n.pod(ctx, testcri.PodOptions{})
	run := func(i int) {
		args := []string{"/etc/one"}
		if i%4 == 3 {
			args = []string{"sleep"}
		}
		c := n.start(ctx, p, testcri.ContainerOptions{Image: ref, Name: fmt.Sprint("c", i), Args: args})
		if i%4 == 3 {
			must(t, c.Stop(ctx, 0)) // SIGKILL, at once
		}
		if _, err := c.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		if l := n.list(c.ID); !l.Complete() {
			t.Errorf("run %d is incomplete: %v", i, l.Losses)
		}
		must(t, c.Remove(ctx))
		must(t, os.Remove(n.listFile(c.ID)))
	}
	for i := range 8 {
		run(i) // what is made once is there afterwards
	}
	pid := n.plugin()
	// The pool may be making or removing an instance.
	settled := func() holds {
		var h holds
		eventually(t, "a plugin at rest", func() bool {
			before := held(t, pid)
			time.Sleep(tracefs.DefaultQuiet + 500*time.Millisecond)
			h = held(t, pid)
			return h == before && h.children == 0
		})
		return h
	}
	before := settled()
	i := 8
	for ; more(i); i++ {
		run(i)
	}
	after := settled()
	t.Logf("after %d runs the plugin has %+v, before %+v", i, after, before)
	if after.files > before.files+2 || after.children != 0 || after.threads > before.threads+16 {
		t.Errorf("after %d runs the plugin has %+v, before %+v", i, after, before)
	}
	own := slices.DeleteFunc(instances(t), func(name string) bool { return !strings.HasPrefix(name, fmt.Sprintf("%s%d-", tracefs.Prefix, pid)) })
	if len(own) > tracefs.DefaultMax/4+2 { // what the pool keeps after a rush, at most, and the two that prepare the kernel
		t.Errorf("there are %d trace instances of the plugin", len(own))
	}
}

// listFile is the path of the list of a container.
func (n *node) listFile(container string) string {
	n.t.Helper()
	names, err := filepath.Glob(filepath.Join(n.dir, "lists/*/*", container+".list"))
	if err != nil || len(names) != 1 {
		n.t.Fatalf("lists of %s: %q, %v", container, names, err)
	}
	return names[0]
}

// TestKilledPluginLeavesNoInstance kills the plugin while it records, and starts the next one.
func TestKilledPluginLeavesNoInstance(t *testing.T) {
	n := newNode(t, noRebuild)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const ref = "docker.io/library/hello:v1"
	n.importHello(ref, nil, nil)
	pid := n.plugin()
	mine := func() (names []string) {
		for _, name := range instances(t) {
			if strings.Contains(name, fmt.Sprintf("%s%d-", tracefs.Prefix, pid)) {
				names = append(names, name)
			}
		}
		return names
	}
	if fs, err := tracefs.Open(); err != nil {
		testenv.Kernel(t, "tracefs", err)
	} else {
		_, err := fs.Probe(0)
		must(t, fs.Close())
		testenv.Kernel(t, "page events", err)
	}
	c := n.start(ctx, n.pod(ctx, testcri.PodOptions{}), testcri.ContainerOptions{Image: ref, Args: []string{"sleep"}})
	eventually(t, "the plugin's trace instances", func() bool { return len(mine()) > 0 })
	must(t, unix.Kill(pid, unix.SIGKILL))
	must(t, n.Restart(ctx))
	if next := n.plugin(); next == pid {
		t.Fatal("the plugin was not killed")
	}
	eventually(t, "no trace instance of the killed plugin", func() bool { return len(mine()) == 0 })
	must(t, c.Stop(ctx, 5*time.Second))
}

// TestDiskFull has no room for a list: the container is served, the log says so, nothing half is left, and
// with room again the next run is kept.
func TestDiskFull(t *testing.T) {
	testenv.Root(t)
	h := newHost(t, "ready", fmt.Sprintf("log_file = %q\n", filepath.Join(t.TempDir(), "log"))+noRebuild)
	dir := h.path("persist")
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() {
		h.killPlugins()
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	h.launch()
	r := h.runtime()
	r.start("c0")
	r.stop("c0")
	eventually(t, "c0's list", func() bool { return h.list("c0") != "" })
	fill := filepath.Join(dir, "fill")
	f, err := os.Create(fill)
	must(t, err)
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	must(t, f.Close())
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	r.start("c1")
	r.stop("c1")
	log := func() string {
		names, err := filepath.Glob(filepath.Dir(h.configValue("log_file")) + "/log")
		must(t, err)
		text, err := os.ReadFile(names[0])
		must(t, err)
		return string(text)
	}
	eventually(t, "a line about c1", func() bool {
		return strings.Contains(log(), `"container":"c1"`) && strings.Contains(log(), "no space left on device")
	})
	r.wantNoErrors()
	if text := h.list("c1"); text != "" {
		if _, err := persist.Read(strings.NewReader(text)); err != nil {
			t.Errorf("half a list: %v", err)
		}
	}
	must(t, os.Remove(fill))
	r.start("c2")
	r.stop("c2")
	eventually(t, "c2's list", func() bool { return h.list("c2") != "" })
	if left, err := filepath.Glob(filepath.Join(dir, ".tmp*", "*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

// configValue returns the string that the host's configuration has for a key.
func (h *host) configValue(key string) string {
	h.t.Helper()
	text, err := os.ReadFile(h.path("conf/02-optimizer-nri-plugin.conf"))
	must(h.t, err)
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, key+" = "); ok {
			s, err := strconv.Unquote(strings.TrimSpace(v))
			must(h.t, err)
			return s
		}
	}
	h.t.Fatalf("the configuration has no %s", key)
	return ""
}
