package e2e_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/workload"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// latencyRuns is how many containers each figure of start latency is made from.
const latencyRuns = 25

// TestEndToEnd has one containerd with the plugin dropped in.
func TestEndToEnd(t *testing.T) {
	if testing.Short() {
		t.Skip("runs containerd")
	}
	h := newHost(t)
	static := h.image(t, workload.Static)
	before := h.latency(t, static)
	u := h.newSetup(t, nil)
	u.drop(t)
	u.awaitPages(t)

	t.Run("static", func(t *testing.T) {
		testImage(t, u, static, static.Command(), h.runCommand)
	})
	t.Run("again", func(t *testing.T) { testAgain(t, u, static) })
	t.Run("latency", func(t *testing.T) { testLatency(t, h, static, before) })
	for _, name := range []workload.Name{workload.Python, workload.Node, workload.JDK} {
		t.Run(string(name), func(t *testing.T) {
			img := h.image(t, name)
			testImage(t, u, img, img.Command(), h.runCommand)
		})
	}
	t.Run("nginx", func(t *testing.T) {
		img := h.image(t, workload.Nginx)
		testImage(t, u, img, img.Command(), h.runNginx)
	})
	t.Run("two at once", func(t *testing.T) { testTwoAtOnce(t, u, static) })
	t.Run("milliseconds", func(t *testing.T) { testMilliseconds(t, u, static) })
	t.Run("stop without start", func(t *testing.T) { testStopWithoutStart(t, u, static) })
	t.Run("burst", func(t *testing.T) { testBurst(t, u) })
	t.Run("by hand", func(t *testing.T) { testByHand(t, h, static) })
	t.Run("idle", func(t *testing.T) { testEnds(t, h, static, "idle_timeout", `"1s"`, "idle") })
	t.Run("timeout", func(t *testing.T) { testEnds(t, h, static, "timeout", "1", "timeout") })
	t.Run("bad server", func(t *testing.T) { testBadServer(t, h, static, before) })
	t.Run("registry", func(t *testing.T) { testRegistry(t, h, static) })
	t.Run("containerd target", func(t *testing.T) { testContainerdTarget(t, h, static) })
	t.Run("containerd restarts", func(t *testing.T) { testRestart(t, u, static) })
}

// runCommand runs the image's command to its end and returns the container's id.
func (h *host) runCommand(t *testing.T, img *workload.Image) string {
	t.Helper()
	r := h.run(t, testcri.ContainerOptions{Image: img.Reference})
	if r.exit != 0 {
		t.Fatalf("exit code %d: %s%s", r.exit, r.out, r.errOut)
	}
	return r.id
}

// runNginx starts nginx, asks it for a page, and stops it.
func (h *host) runNginx(t *testing.T, img *workload.Image) string {
	t.Helper()
	pod := h.pod(t)
	c, err := pod.Create(t.Context(), testcri.ContainerOptions{Image: img.Reference})
	must(t, err)
	_, err = c.Start(t.Context())
	must(t, err)
	pid, err := c.PID(t.Context())
	must(t, err)
	eventually(t, "page", func() error { return getPage(fmt.Sprintf("/proc/%d/root", pid)) })
	must(t, c.Stop(t.Context(), 5*time.Second))
	return c.ID
}

// getPage asks the nginx whose root is at root for its first page.
func getPage(root string) (err error) {
	conn, err := net.Dial("unix", filepath.Join(root, "run/nginx.sock"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return err
	}
	data, err := io.ReadAll(conn)
	if err == nil && !strings.Contains(string(data), "200 OK") {
		err = fmt.Errorf("nginx answers %q", data)
	}
	return err
}

// stopNginx asks a traced nginx for a page, stops it and waits for it.
func stopNginx(cmd *exec.Cmd, root string) error {
	deadline := time.Now().Add(patience)
	for {
		err := getPage(root)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			return err
		}
		time.Sleep(poll)
	}
	data, err := os.ReadFile(filepath.Join(root, "run/nginx.pid"))
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return err
	}
	return errors.Join(unix.Kill(pid, unix.SIGQUIT), cmd.Wait())
}

// testImage is the main job for one image: run, list against strace, rebuilt image
// against the container's root.
func testImage(t *testing.T, u *setup, img *workload.Image, argv []string, run func(*testing.T, *workload.Image) string) {
	id := run(t, img)
	list := u.list(t, id)
	if !list.Complete() {
		t.Errorf("losses = %+v, want none", list.Losses)
	}
	if list.Digest != img.Target.Digest.String() || list.Container != id {
		t.Errorf("list of image %s, container %s; want %s, %s", list.Digest, list.Container, img.Target.Digest, id)
	}
	t.Run("ranges", func(t *testing.T) { testRanges(t, list) })
	t.Run("strace", func(t *testing.T) {
		wait := func(cmd *exec.Cmd, _ string) error { return cmd.Wait() }
		if strings.Contains(img.Reference, "nginx") {
			wait = stopNginx
		}
		compareWithStrace(t, list, straceRun(t, u.host.Client(), img, argv, wait))
	})
	t.Run("upstream's files", func(t *testing.T) { testUpstreamFiles(t, u, img, list) })
	t.Run("rebuilt", func(t *testing.T) {
		res := u.built(t, img.Target.Digest)
		dir, tag := layoutOf(t, res.Target)
		checkTag(t, dir, tag, res.Manifest)
		r := openRebuilt(t, dir, digest.Digest(res.Manifest))
		r.verify(t, mergedRoot(t, u.host.Client(), img), list)
		t.Logf("%s: %d files, image %.1f MB, blobs %.1f MB, built in %v", img.Reference, len(list.Accesses),
			float64(img.Size())/1e6, float64(res.BlobBytes)/1e6, res.Duration.Round(time.Millisecond))
	})
}

// testUpstreamFiles reads the path list and the CSV at the names that upstream gives them.
func testUpstreamFiles(t *testing.T, u *setup, img *workload.Image, list *persist.List) {
	name := strings.TrimPrefix(img.Reference, "docker.io/")
	if rest, ok := strings.CutPrefix(name, "library/"); ok {
		name = rest
	}
	path := filepath.Join(u.persist, name)
	eventually(t, path, func() error { _, err := os.Stat(path + ".csv"); return err })
	data, err := os.ReadFile(path)
	must(t, err)
	var want []string
	for _, a := range list.Accesses {
		want = append(want, a.Path)
	}
	if got := strings.Split(strings.TrimSpace(string(data)), "\n"); !slices.Equal(got, want) && !strings.Contains(string(data), `\`) {
		t.Errorf("%s has %d lines, want the %d paths of the list", path, len(got), len(want))
	}
	csv, err := os.ReadFile(path + ".csv")
	must(t, err)
	if !strings.HasPrefix(string(csv), "path,size,elapsed\n") {
		t.Errorf("%s.csv starts with %.40q", path, csv)
	}
}

// checkTag holds the layout's index against the manifest that the plugin says it built.
func checkTag(t *testing.T, dir, tag, manifest string) {
	t.Helper()
	index, err := os.ReadFile(filepath.Join(dir, "index.json"))
	must(t, err)
	if !strings.Contains(string(index), manifest) || !strings.Contains(string(index), tag) {
		t.Errorf("index.json names neither tag %s nor manifest %s:\n%s", tag, manifest, index)
	}
}

// testAgain runs an image that was rebuilt already.
func testAgain(t *testing.T, u *setup, img *workload.Image) {
	first := u.built(t, img.Target.Digest)
	id := u.host.runCommand(t, img)
	u.list(t, id)
	u.expectLog(t, "not queued")
	if all := u.results(t)[img.Target.Digest.String()]; len(all) != 1 || !all[0].Finished.Equal(first.Finished) {
		t.Errorf("results = %+v, want the first one only", all)
	}
}

// expectLog waits for a word in the plugin's log.
func (u *setup) expectLog(t *testing.T, word string) {
	t.Helper()
	eventually(t, "log line", func() error {
		data, err := os.ReadFile(u.log)
		if err == nil && !strings.Contains(string(data), word) {
			err = fmt.Errorf("no %q in the log", word)
		}
		return err
	})
}

// testTwoAtOnce runs two containers of one image at once that touch different files.
func testTwoAtOnce(t *testing.T, u *setup, img *workload.Image) {
	pod := u.host.pod(t)
	var started []*testcri.Container
	args := [][]string{{"read", "/data/a", "pause", "300"}, {"read", "/data/b", "pause", "300"}}
	for i, a := range args {
		c, err := pod.Create(t.Context(), testcri.ContainerOptions{Image: img.Reference, Name: fmt.Sprint("c", i), Args: a})
		must(t, err)
		started = append(started, c)
	}
	errs := make(chan error, len(started))
	for _, c := range started {
		go func() {
			_, err := c.Start(t.Context())
			errs <- err
		}()
	}
	for range started {
		must(t, <-errs)
	}
	for i, c := range started {
		if r := finish(t, c, 0); r.exit != 0 {
			t.Errorf("container %d: exit code %d", i, r.exit)
		}
		expectPaths(t, u.list(t, c.ID), "/bin/touch", args[i][1])
	}
}

// expectPaths checks that a complete list has exactly these paths of the run, in this order.
func expectPaths(t *testing.T, list *persist.List, want ...string) {
	t.Helper()
	var got []string
	for _, a := range list.Accesses {
		if a.How != trace.Runtime { // what the runtime read is not the run's
			got = append(got, a.Path)
		}
	}
	if !slices.Equal(got, want) || !list.Complete() {
		t.Errorf("list of %.12s: %q, losses %v; want %q and none", list.Container, got, list.Losses, want)
	}
}

// testMilliseconds runs containers that end at once.
func testMilliseconds(t *testing.T, u *setup, img *workload.Image) {
	pod := u.host.pod(t)
	for i := range 10 {
		r := u.host.runIn(t, pod, testcri.ContainerOptions{Image: img.Reference, Name: fmt.Sprint("short", i), Args: []string{"read", "/data/b", "fail", "3"}})
		if r.exit != 3 {
			t.Errorf("run %d: exit code %d, want 3", i, r.exit)
		}
		expectPaths(t, u.list(t, r.id), "/bin/touch", "/data/b")
	}
}

// testStopWithoutStart removes a container that was created and never started.
func testStopWithoutStart(t *testing.T, u *setup, img *workload.Image) {
	pod := u.host.pod(t)
	c, err := pod.Create(t.Context(), testcri.ContainerOptions{Image: img.Reference, Name: "never"})
	must(t, err)
	must(t, c.Stop(t.Context(), 0))
	must(t, c.Remove(t.Context()))
	r := u.host.runIn(t, pod, testcri.ContainerOptions{Image: img.Reference, Name: "next", Args: []string{"read", "/data/b"}})
	expectPaths(t, u.list(t, r.id), "/bin/touch", "/data/b")
	if paths, _ := filepath.Glob(filepath.Join(u.persist, "lists", "*", "*", c.ID+".list")); len(paths) > 0 {
		t.Errorf("a container that never ran has lists %q", paths)
	}
}

// testBurst reads 60,000 small files as fast as a static program can.
func testBurst(t *testing.T, u *setup) {
	img := u.host.image(t, workload.Burst)
	r := u.host.run(t, testcri.ContainerOptions{Image: img.Reference})
	if r.exit != 0 {
		t.Fatalf("exit code %d: %s%s", r.exit, r.out, r.errOut)
	}
	list := u.list(t, r.id)
	t.Logf("%s; list of %d files, events %d, losses %+v", strings.TrimSpace(r.out), len(list.Accesses), list.Events, list.Losses)
	if n := len(list.Accesses); n != workload.BurstFiles+1 && list.Complete() {
		t.Errorf("list has %d files and no loss, want %d or a loss", n, workload.BurstFiles+1)
	}
	if !list.Complete() {
		t.Errorf("losses = %+v on a machine that keeps up elsewhere", list.Losses)
	}
	res := u.built(t, img.Target.Digest)
	dir, _ := layoutOf(t, res.Target)
	openRebuilt(t, dir, digest.Digest(res.Manifest)).verify(t, mergedRoot(t, u.host.Client(), img), list)
}

// testEnds has a recording end by the configuration's key while the container goes on;
// the image is rebuilt then.
func testEnds(t *testing.T, h *host, img *workload.Image, key, value, end string) {
	u := h.newSetup(t, settings{key: value})
	p := u.start(t)
	c, err := h.pod(t).Create(t.Context(), testcri.ContainerOptions{Image: img.Reference, Args: []string{"read", "/data/b", "wait"}})
	must(t, err)
	_, err = c.Start(t.Context())
	must(t, err)
	list := u.list(t, c.ID)
	expectPaths(t, list, "/bin/touch", "/data/b")
	if list.End != end {
		t.Errorf("end = %q, want %q", list.End, end)
	}
	u.built(t, img.Target.Digest)
	if end == "timeout" {
		if _, err := os.Stat(filepath.Join(u.persist, "headstart", "static:1.timeout1s")); err != nil {
			t.Errorf("upstream's name of a list with a timeout: %v", err)
		}
	}
	must(t, c.Stop(t.Context(), 5*time.Second))
	if exit, err := c.Wait(t.Context()); err != nil || exit != 0 {
		t.Errorf("exit code %d, %v", exit, err)
	}
	p.quit(t)
}

// testRestart restarts containerd while a container runs.
func testRestart(t *testing.T, u *setup, img *workload.Image) {
	pod := u.host.pod(t)
	c, err := pod.Create(t.Context(), testcri.ContainerOptions{Image: img.Reference, Args: []string{"read", "/data/a", "wait"}})
	must(t, err)
	_, err = c.Start(t.Context())
	must(t, err)
	must(t, u.host.Restart(t.Context()))
	r := u.host.runIn(t, pod, testcri.ContainerOptions{Image: img.Reference, Name: "after", Args: []string{"read", "/data/b"}})
	expectPaths(t, u.list(t, r.id), "/bin/touch", "/data/b")
	must(t, c.Stop(t.Context(), 5*time.Second))
	if exit, err := c.Wait(t.Context()); err != nil || exit != 0 {
		t.Errorf("the container that lived through the restart: exit code %d, %v", exit, err)
	}
	// Its list is whole and says what it misses, or was left out.
	if paths, _ := filepath.Glob(filepath.Join(u.persist, "lists", "*", "*", c.ID+".list")); len(paths) > 0 {
		l, err := readList(paths[0])
		must(t, err)
		t.Logf("container across the restart: %d files, end %s, losses %+v", len(l.Accesses), l.End, l.Losses)
	}
}
