package e2e_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/workload"
)

// TestKill ends each of our processes, and containerd, by SIGKILL at several moments.
// The workload must not notice, and nobody may ever see half a list or half an image.
// TestSoakKill does the same at random moments.
func TestKill(t *testing.T) {
	if testing.Short() {
		t.Skip("runs containerd")
	}
	d := newDrill(t)
	moments := []time.Duration{0, 30 * time.Millisecond, 400 * time.Millisecond}
	for _, after := range moments {
		t.Run(fmt.Sprintf("tracer after %v", after), func(t *testing.T) { d.tracer(t, after) })
		t.Run(fmt.Sprintf("plugin after %v", after), func(t *testing.T) { d.plugin(t, after) })
	}
	for _, after := range []time.Duration{10 * time.Millisecond, 500 * time.Millisecond} {
		t.Run(fmt.Sprintf("plugin inside a hook after %v", after), func(t *testing.T) { d.pluginInHook(t, after) })
		t.Run(fmt.Sprintf("rebuild after %v", after), func(t *testing.T) { d.rebuild(t, after) })
	}
	t.Run("plugin while its rebuild runs", func(t *testing.T) { d.pluginKeepsRebuild(t, 300*time.Millisecond) })
	t.Run("containerd", func(t *testing.T) { d.containerd(t, 300*time.Millisecond) })
}

// TestSoakKill repeats the drills at random moments for the duration in SOAK.
func TestSoakKill(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Skip("SOAK says no duration")
	}
	d := newDrill(t)
	drills := map[string]func(*testing.T, time.Duration){
		"tracer": d.tracer, "plugin": d.plugin, "hook": d.pluginInHook, "rebuild": d.rebuild,
		"orphan": d.pluginKeepsRebuild, "containerd": d.containerd,
	}
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); {
		for name, run := range drills {
			after := time.Duration(rand.IntN(1200)) * time.Millisecond
			t.Run(fmt.Sprintf("soak %s after %v", name, after), func(t *testing.T) { run(t, after) })
		}
	}
}

func newDrill(t *testing.T) *drill {
	t.Helper()
	h := newHost(t)
	return &drill{host: h, static: h.image(t, workload.Static), large: h.image(t, workload.GoTool)}
}

// drill has what the drills share.
type drill struct {
	host   *host
	static *workload.Image
	large  *workload.Image // its rebuild takes seconds
}

// script is what the workload of a drill does: it is at work when the blow falls.
func script() []string {
	return []string{"read", "/data/a", "pause", "700", "read", "/data/b", "pause", "100", "map", "/data/mapped"}
}

// running is a workload under way.
type running struct {
	container *testcri.Container
	started   chan error
	took      time.Duration
}

// launch starts the workload in the background.
func (d *drill) launch(t *testing.T, img *workload.Image, args []string) *running {
	t.Helper()
	c, err := d.host.pod(t).Create(t.Context(), testcri.ContainerOptions{Image: img.Reference, Args: args})
	must(t, err)
	r := &running{container: c, started: make(chan error, 1)}
	go func() {
		took, err := c.Start(t.Context())
		r.took = took
		r.started <- err
	}()
	return r
}

// unharmed waits for the workload and holds it to success.
func (r *running) unharmed(t *testing.T) {
	t.Helper()
	must(t, <-r.started)
	if r.took > 10*time.Second { // containerd fails a start that a plugin holds up for 2 s; a loaded machine takes its time
		t.Errorf("StartContainer took %v", r.took)
	}
	if got := finish(t, r.container, r.took); got.exit != 0 {
		t.Errorf("the workload's exit code is %d: %s", got.exit, got.errOut)
	}
}

// tracer kills the tracer so long after it began to record.
func (d *drill) tracer(t *testing.T, after time.Duration) {
	u := d.host.newSetup(t, nil)
	defer u.watch(t)()
	p := u.start(t)
	r := d.launch(t, d.static, script())
	pids := d.waitTracer(t)
	time.Sleep(min(after, 600*time.Millisecond)) // the workload still pauses then
	killAll(pids)
	status, err := r.container.Status(t.Context())
	must(t, err)
	r.unharmed(t)
	d.nextRun(t, u)
	paths, err := filepath.Glob(filepath.Join(u.persist, "lists", "*", "*", r.container.ID+".list"))
	must(t, err)
	if len(paths) == 0 {
		u.expectLog(t, "not recorded")
		t.Log("no list: the tracer was not ready yet")
		p.quit(t)
		return
	}
	l, err := readList(paths[0])
	must(t, err)
	t.Logf("list of %d files, end %s, losses %+v", len(l.Accesses), l.End, l.Losses)
	if l.Complete() && status.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED {
		t.Errorf("the list of a tracer that was killed while the container was %v says that it is complete", status.GetState())
	}
	p.quit(t)
}

// plugin kills the plugin so long after a container began to start, and starts it again.
func (d *drill) plugin(t *testing.T, after time.Duration) {
	u := d.host.newSetup(t, nil)
	defer u.watch(t)()
	p := u.start(t)
	r := d.launch(t, d.static, script())
	time.Sleep(after)
	p.kill9(t)
	r.unharmed(t)
	d.noneLeft(t, d.host.server, "")
	again := u.start(t)
	d.nextRun(t, u)
	again.quit(t)
	u.noTemporaries(t)
}

// pluginInHook kills the plugin while its hook waits for a tracer that hangs.
func (d *drill) pluginInHook(t *testing.T, after time.Duration) {
	hangs := filepath.Join(t.TempDir(), "hangs")
	must(t, os.WriteFile(hangs, []byte("#!/bin/sh\nexec sleep 60\n"), 0o755))
	u := d.host.newSetup(t, settings{"server_path": fmt.Sprintf("%q", hangs), "start_deadline": `"900ms"`})
	defer u.watch(t)()
	p := u.start(t)
	r := d.launch(t, d.static, script())
	eventually(t, "the hook runs", func() error {
		if len(childrenOf(t, p.cmd.Process.Pid)) == 0 {
			return errors.New("no tracer")
		}
		return nil
	})
	time.Sleep(min(after, 700*time.Millisecond))
	p.kill9(t)
	r.unharmed(t)
}

// rebuild kills the rebuild so long after it began, with the plugin; the next plugin
// builds the image all the same.
func (d *drill) rebuild(t *testing.T, after time.Duration) {
	u := d.host.newSetup(t, nil)
	stopWatching := u.watch(t)
	defer stopWatching()
	p := u.start(t)
	d.host.run(t, testcri.ContainerOptions{Image: d.large.Reference, Command: []string{"/usr/local/go/bin/go", "version"}})
	children := d.waitProcess(t, d.host.plugin, "rebuild")
	time.Sleep(after)
	p.kill9(t)
	killAll(children)
	d.noneLeft(t, d.host.plugin, "rebuild")
	again := u.start(t)
	d.verifyBuilt(t, u)
	again.quit(t)
	u.noTemporaries(t)
}

// pluginKeepsRebuild kills the plugin alone: the rebuild goes on, or the next plugin does it.
func (d *drill) pluginKeepsRebuild(t *testing.T, after time.Duration) {
	u := d.host.newSetup(t, nil)
	defer u.watch(t)()
	p := u.start(t)
	d.host.run(t, testcri.ContainerOptions{Image: d.large.Reference, Command: []string{"/usr/local/go/bin/go", "version"}})
	d.waitProcess(t, d.host.plugin, "rebuild")
	time.Sleep(after)
	p.kill9(t)
	again := u.start(t)
	d.verifyBuilt(t, u)
	again.quit(t)
	u.noTemporaries(t)
}

func (d *drill) verifyBuilt(t *testing.T, u *setup) {
	t.Helper()
	res := u.built(t, d.large.Target.Digest)
	dir, tag := layoutOf(t, res.Target)
	checkTag(t, dir, tag, res.Manifest)
	r := openRebuilt(t, dir, digest.Digest(res.Manifest))
	r.fsck(t)
	if all := u.results(t)[d.large.Target.Digest.String()]; len(all) != 1 {
		t.Errorf("%d results, want one", len(all))
	}
}

// containerd kills containerd while a workload runs.
func (d *drill) containerd(t *testing.T, after time.Duration) {
	u := d.host.newSetup(t, nil)
	defer u.watch(t)()
	p := u.start(t)
	r := d.launch(t, d.static, script())
	must(t, <-r.started)
	r.started <- nil
	// A container that ends in the very moment of the blow has exit code 255 afterwards:
	// containerd has noted that it ended and not how.
	time.Sleep(min(after, 600*time.Millisecond))
	must(t, d.host.Kill9())
	must(t, d.host.Up(t.Context()))
	r.unharmed(t)
	eventually(t, "a container is traced after containerd was killed", func() error {
		got := d.host.run(t, testcri.ContainerOptions{Image: d.static.Reference, Args: []string{"read", "/data/b"}})
		time.Sleep(300 * time.Millisecond)
		if paths, _ := filepath.Glob(filepath.Join(u.persist, "lists", "*", "*", got.id+".list")); len(paths) == 0 {
			return errors.New("no list")
		}
		return nil
	})
	p.quit(t)
}

// nextRun holds the plugin to tracing another container.
func (d *drill) nextRun(t *testing.T, u *setup) {
	t.Helper()
	r := d.host.run(t, testcri.ContainerOptions{Image: d.static.Reference, Args: []string{"read", "/data/b"}})
	expectPaths(t, u.list(t, r.id), "/bin/touch", "/data/b")
}

// waitProcess waits for a process that runs the program.
func (d *drill) waitProcess(t *testing.T, program, argument string) []int {
	t.Helper()
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		if pids := processesOf(t, program, argument); len(pids) > 0 {
			return pids
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("no process of %s %s", filepath.Base(program), argument)
	return nil
}

// waitTracer waits for a server that records, or is about to: it has a group of fanotify, in contrast to one that stands by.
func (d *drill) waitTracer(t *testing.T) []int {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		for _, pid := range processesOf(t, d.host.server, "") {
			fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // it may be gone
			for _, fd := range fds {
				if to, err := os.Readlink(fd); err == nil && to == "anon_inode:[fanotify]" {
					return []int{pid}
				}
			}
		}
	}
	t.Fatal("no server records anything")
	return nil
}

// noneLeft waits until no process of the program is left.
func (d *drill) noneLeft(t *testing.T, program, argument string) {
	t.Helper()
	eventually(t, "no "+filepath.Base(program)+" "+argument+" is left", func() error {
		if pids := processesOf(t, program, argument); len(pids) > 0 {
			return fmt.Errorf("processes %v", pids)
		}
		return nil
	})
}

func killAll(pids []int) {
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// childrenOf returns the live children of a process.
func childrenOf(t *testing.T, pid int) []int {
	t.Helper()
	var children []int
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	must(t, err)
	for _, path := range tasks {
		data, _ := os.ReadFile(path)
		for field := range strings.FieldsSeq(string(data)) {
			var child int
			if _, err := fmt.Sscan(field, &child); err == nil && alive(child) {
				children = append(children, child)
			}
		}
	}
	return children
}

// watch looks at the state directory all the time until the returned function is called,
// which reports what was seen and should not have been.
func (u *setup) watch(t *testing.T) func() {
	t.Helper()
	done := make(chan struct{})
	var wg sync.WaitGroup
	faults := map[string]bool{}
	looks := 0
	wg.Go(func() {
		seen := map[string]time.Time{}
		for {
			select {
			case <-done:
				return
			case <-time.After(5 * time.Millisecond):
				looks++
				for _, f := range u.look(seen) {
					faults[f.Error()] = true
				}
			}
		}
	})
	return sync.OnceFunc(func() {
		close(done)
		wg.Wait()
		for f := range faults {
			t.Error(f)
		}
		t.Logf("looked %d times at %s", looks, u.persist)
	})
}

// look reads every list and every image that can be seen and is new.
func (u *setup) look(seen map[string]time.Time) (faults []error) {
	lists, _ := filepath.Glob(filepath.Join(u.persist, "lists", "*", "*", "*.list"))
	for _, path := range lists {
		if !isNew(seen, path) {
			continue
		}
		if _, err := readList(path); err != nil {
			faults = append(faults, fmt.Errorf("half a list: %w", err))
		}
	}
	for _, layout := range []string{filepath.Join(u.persist, "optimized")} {
		path := filepath.Join(layout, "index.json")
		if !isNew(seen, path) {
			continue
		}
		faults = append(faults, wholeLayout(layout))
	}
	var real []error
	for _, f := range faults {
		if f != nil && !errors.Is(f, fs.ErrNotExist) {
			real = append(real, f)
		}
	}
	return real
}

func isNew(seen map[string]time.Time, path string) bool {
	info, err := os.Stat(path)
	if err != nil || seen[path].Equal(info.ModTime()) {
		return false
	}
	seen[path] = info.ModTime()
	return true
}

// wholeLayout returns an error unless everything that the index names is there in full.
func wholeLayout(layout string) error {
	whole := func(d ocispec.Descriptor, v any) error {
		path := filepath.Join(layout, "blobs", d.Digest.Algorithm().String(), d.Digest.Encoded())
		info, err := os.Stat(path)
		if err != nil {
			// Not wrapped: a file that is missing is a fault here.
			return fmt.Errorf("half an image: %s: %v", d.Digest, err) //nolint:errorlint // see above
		}
		if info.Size() != d.Size {
			return fmt.Errorf("half an image: %s has %d bytes, want %d", d.Digest, info.Size(), d.Size)
		}
		if v == nil {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return json.Unmarshal(data, v)
	}
	data, err := os.ReadFile(filepath.Join(layout, "index.json"))
	if err != nil {
		return err
	}
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return fmt.Errorf("half an index: %w", err)
	}
	for _, m := range index.Manifests {
		var manifest ocispec.Manifest
		if err := whole(m, &manifest); err != nil {
			return err
		}
		for _, d := range append(manifest.Layers, manifest.Config) {
			if err := whole(d, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// noTemporaries fails when the state directory holds files that only a writer that died
// can have left.
func (u *setup) noTemporaries(t *testing.T) {
	t.Helper()
	var left []string
	err := filepath.WalkDir(u.persist, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && (strings.Contains(path, "/tmp/") && strings.HasPrefix(path, u.persist) || strings.Contains(filepath.Base(path), ".tmp")) {
			rel, _ := filepath.Rel(u.persist, path)
			if strings.Contains(rel, "tmp") {
				left = append(left, rel)
			}
		}
		return err
	})
	must(t, err)
	if len(left) > 0 {
		t.Errorf("left over: %q", left)
	}
}
