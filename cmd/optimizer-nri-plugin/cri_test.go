package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// node is a containerd that launched the plugin.
type node struct {
	*testcri.Env
	t   testing.TB
	dir string // the plugin's files
}

// newNode starts one; config is appended to the plugin's configuration. A start may wait as long as can be
// until its tracer gets a CPU: tests ask for complete lists, beside other tests and 50 runtimes.
func newNode(t testing.TB, config string) *node {
	t.Helper()
	return newNodeWith(t, testenv.Binary(t, "optimizer-server"), config)
}

// newNodeWith is newNode with a tracer's program.
func newNodeWith(t testing.TB, server, config string) *node {
	t.Helper()
	n := &node{t: t, dir: t.TempDir()}
	n.Env = critest.Start(t, testcri.Options{})
	text := fmt.Sprintf("persist_dir = %q\nserver_path = %q\nlog_level = \"debug\"\nstart_deadline = \"900ms\"\ncontainerd_address = %q\n%s",
		n.dir, server, n.Address(), config)
	program, err := os.ReadFile(testenv.Binary(t, "optimizer-nri-plugin"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(n.PluginConfigDir(), "02-optimizer-nri-plugin.conf"), []byte(text), 0o600))
	must(t, os.WriteFile(filepath.Join(n.PluginDir(), "02-optimizer-nri-plugin"), program, 0o755))
	must(t, n.Restart(t.Context()))
	t.Cleanup(func() {
		if t.Failed() {
			log := n.log()
			t.Logf("the end of the plugin's log:\n%s", log[max(0, len(log)-8192):])
		}
	})
	return n
}

func (n *node) log() string {
	text, err := os.ReadFile(filepath.Join(n.dir, "optimizer-nri-plugin.log"))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// list waits for the list of a container.
func (n *node) list(container string) *persist.List {
	n.t.Helper()
	var l *persist.List
	eventually(n.t, "the list of "+container, func() bool {
		names, err := filepath.Glob(filepath.Join(n.dir, "lists/*/*", container+".list"))
		if err != nil || len(names) != 1 {
			return false
		}
		l, err = readList(names[0])
		if err != nil {
			n.t.Fatal(err)
		}
		return true
	})
	return l
}

// importHello imports an image with a program that prints files, changed by change.
func (n *node) importHello(ref string, files map[string][]byte, change func(*v1.Config)) {
	n.t.Helper()
	img, err := testcri.StaticImage(testenv.Command(n.t, "./internal/testcri/internal/hello"), files)
	if err != nil {
		n.t.Fatal(err)
	}
	if change != nil {
		config, err := img.ConfigFile()
		if err != nil {
			n.t.Fatal(err)
		}
		config = config.DeepCopy()
		change(&config.Config)
		if img, err = mutate.ConfigFile(img, config); err != nil {
			n.t.Fatal(err)
		}
	}
	if err := n.Import(n.t.Context(), ref, img); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) pod(ctx context.Context, o testcri.PodOptions) *testcri.Pod {
	n.t.Helper()
	p, err := n.RunPod(ctx, o)
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

func (n *node) start(ctx context.Context, p *testcri.Pod, o testcri.ContainerOptions) *testcri.Container {
	n.t.Helper()
	c, err := p.Create(ctx, o)
	if err == nil {
		_, err = c.Start(ctx)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

func wait(ctx context.Context, t testing.TB, c *testcri.Container) {
	t.Helper()
	if code, err := c.Wait(ctx); err != nil || code != 0 {
		t.Fatalf("container ended with %d, %v", code, err)
	}
}

func listed(l *persist.List, keep func(trace.Access) bool) []string {
	var paths []string
	for _, a := range l.Accesses {
		if keep == nil || keep(a) {
			paths = append(paths, a.Path)
		}
	}
	return paths
}

// TestNode has runs in a real containerd: how they end, whose they are, and what is counted.
func TestNode(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "metrics.sock")
	n := newNode(t, fmt.Sprintf("metrics_address = %q\nidle_timeout = \"0s\"\n%s[[override]]\nimages = [\"quiet\"]\nidle_timeout = \"300ms\"\n",
		"unix:"+socket, noRebuild))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	const ref = "docker.io/library/hello:v1"
	n.importHello(ref, map[string][]byte{"/etc/one": []byte("1"), "/etc/two": []byte("2")}, nil)
	n.importHello("docker.io/library/quiet:v1", nil, nil)
	ends := map[string]int{}

	t.Run("ready log", func(t *testing.T) {
		p := n.pod(ctx, testcri.PodOptions{Annotations: map[string]string{"headstart.dev/ready-log.web": "^ready$"}})
		c := n.start(ctx, p, testcri.ContainerOptions{Image: ref, Name: "web", Args: []string{"sleep"}})
		l := n.list(c.ID)
		if l.End != "ready" || !l.Complete() || !slices.Equal(listed(l, nil), []string{"/hello"}) {
			t.Errorf("list ended by %s, losses %v, has %q", l.End, l.Losses, listed(l, nil))
		}
		if s, err := c.Status(ctx); err != nil || s.GetFinishedAt() != 0 {
			t.Errorf("the container does not run on: %v, %v", s, err)
		}
		ends[l.End]++
	})
	t.Run("override", func(t *testing.T) {
		c := n.start(ctx, n.pod(ctx, testcri.PodOptions{}), testcri.ContainerOptions{Image: "docker.io/library/quiet:v1", Args: []string{"sleep"}})
		if l := n.list(c.ID); l.End != "idle" {
			t.Errorf("list ended by %s, want idle", l.End)
		}
		ends["idle"]++
	})
	t.Run("init, sidecar and a restart", func(t *testing.T) {
		p := n.pod(ctx, testcri.PodOptions{Name: "shop-1", Namespace: "shop"})
		first := n.start(ctx, p, testcri.ContainerOptions{Image: ref, Name: "init", Args: []string{"/etc/one"}})
		wait(ctx, t, first)
		sidecar := n.start(ctx, p, testcri.ContainerOptions{Image: ref, Name: "sidecar", Args: []string{"sleep"}})
		app := n.start(ctx, p, testcri.ContainerOptions{Image: ref, Name: "app", Args: []string{"/etc/two"}})
		wait(ctx, t, app)
		again := n.start(ctx, p, testcri.ContainerOptions{Image: ref, Name: "app", Args: []string{"/etc/one", "/etc/two"}, Attempt: 1})
		wait(ctx, t, again)
		if err := sidecar.Stop(ctx, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		for _, tc := range []struct {
			c     *testcri.Container
			name  string
			files []string
		}{
			{first, "init", []string{"/hello", "/etc/one"}},
			{sidecar, "sidecar", []string{"/hello"}},
			{app, "app", []string{"/hello", "/etc/two"}},
			{again, "app", []string{"/hello", "/etc/one", "/etc/two"}},
		} {
			l := n.list(tc.c.ID)
			if l.Name != tc.name || l.Pod != "shop-1" || l.Namespace != "shop" || !l.Complete() || !slices.Equal(listed(l, nil), tc.files) {
				t.Errorf("list of %s: %s of %s/%s, %v, %q", tc.name, l.Name, l.Namespace, l.Pod, l.Losses, listed(l, nil))
			}
			ends[l.End]++
		}
	})
	t.Run("metrics", func(t *testing.T) {
		total := 0
		for _, c := range ends {
			total += c
		}
		want := fmt.Sprintf("headstart_runs_total{verdict=\"complete\"} %d\n", total)
		eventually(t, want, func() bool { return strings.Contains(scrape(t, socket), want) })
		text := scrape(t, socket)
		for _, part := range []string{
			`headstart_hook_duration_seconds_count{hook="StartContainer"} `, `headstart_hook_duration_seconds_bucket{hook="StartContainer",le="0.2"} `,
			`headstart_runs_total{verdict="failed"} 0`, `headstart_recordings 0`, "# TYPE headstart_list_bytes_total counter", "process_open_fds",
		} {
			if !strings.Contains(text, part) {
				t.Errorf("the metrics lack %q:\n%s", part, text)
			}
		}
	})
}

func scrape(t testing.TB, socket string) string {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	r, err := c.Get("http://plugin/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s: %v", r.Status, err)
	}
	return string(text)
}

// TestMetricsAddressTaken has somebody else at the address: one line, and tracing goes on.
func TestMetricsAddressTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h := newHost(t, "ready", fmt.Sprintf("metrics_address = %q\n", l.Addr())+noRebuild)
	h.launch()
	r := h.runtime()
	r.start("c1")
	r.stop("c1")
	eventually(t, "c1's list", func() bool { return h.list("c1") != "" })
	r.wantNoErrors()
	if n := strings.Count(h.log(), "no metrics: serve metrics at "+l.Addr().String()); n != 1 {
		t.Errorf("%d lines about the address, want 1:\n%s", n, h.log())
	}
}

// TestRuntimeFilesAgainstStrace holds what lists say that containerd and runc read to create a
// container against what strace sees them open of the image, for images that name users differently.
func TestRuntimeFilesAgainstStrace(t *testing.T) {
	strace := testenv.Tool(t, "strace")
	n := newNode(t, noRebuild)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	files := map[string][]byte{
		"/etc/passwd": []byte("root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"),
		"/etc/group":  []byte("root:x:0:\napp:x:1000:\nmore:x:1001:app\n"),
		"/etc/shadow": []byte("root:*::0:::::\n"), "/vol/a": []byte("volume"), "/vol/sub/b": []byte("volume too"),
	}
	for i, user := range []string{"", "app", "1000", "1000:1001", "4242"} {
		t.Run("user "+user, func(t *testing.T) {
			ref := fmt.Sprintf("docker.io/library/hello:u%d", i)
			n.importHello(ref, files, func(c *v1.Config) {
				c.User, c.Entrypoint, c.Volumes = user, []string{"hello"}, map[string]struct{}{"/vol": {}}
				c.Env = []string{"PATH=/bin:/"}
			})
			out := filepath.Join(t.TempDir(), "strace")
			end := watchOpens(t, strace, n.PID(), out)
			p := n.pod(ctx, testcri.PodOptions{})
			c := n.start(ctx, p, testcri.ContainerOptions{Image: ref, Args: []string{"word"}})
			wait(ctx, t, c)
			end()
			l := n.list(c.ID)
			got := listed(l, func(a trace.Access) bool { return a.How&trace.Runtime != 0 })
			want := opened(t, out, files)
			t.Logf("strace saw %q opened", want)
			slices.Sort(got)
			for _, path := range want {
				if !slices.Contains(got, path) {
					t.Errorf("%s was read and is not listed", path)
				}
			}
			// Two files of some kilobytes at most are listed for users that need one of them only.
			if want = slices.Compact(slices.Sorted(slices.Values(append(want, "/etc/passwd", "/etc/group")))); !slices.Equal(got, want) {
				t.Errorf("listed %q, want %q", got, want)
			}
			for _, a := range l.Accesses {
				if a.How&trace.Runtime != 0 && (a.Ranges != nil || a.Size != int64(len(files[a.Path])) || a.How != trace.Runtime) {
					t.Errorf("%s: size %d, how %d, ranges %v", a.Path, a.Size, a.How, a.Ranges)
				}
			}
		})
	}
}

// watchOpens has strace log what the process and its children open from now on.
func watchOpens(t *testing.T, strace string, pid int, out string) (end func()) {
	t.Helper()
	cmd := exec.Command(strace, "-f", "-y", "-qq", "-s", "200", "-e", "trace=open,openat,openat2", "-o", out, "-p", strconv.Itoa(pid))
	waited := testenv.Start(t, cmd)
	eventually(t, "strace", func() bool {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		return err == nil && strings.Contains(string(status), fmt.Sprintf("TracerPid:\t%d\n", cmd.Process.Pid))
	})
	time.Sleep(200 * time.Millisecond) // the other threads
	return func() {
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Error(err)
		}
		var exit *exec.ExitError
		if err := waited(); err != nil && !errors.As(err, &exit) {
			t.Error(err)
		}
	}
}

var openLine = regexp.MustCompile(`open(?:at2?)?\(.* = \d+<([^>]*)>`)

// opened returns which of the image's files strace saw opened for reading: in a mount of containerd, in the
// layer that it looks into, or in the container's root. Paths end alike there.
func opened(t *testing.T, out string, files map[string][]byte) []string {
	t.Helper()
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		m := openLine.FindStringSubmatch(line)
		if m == nil || strings.Contains(line, "O_PATH") {
			continue
		}
		for path := range files {
			for _, place := range []string{"/snapshots/", "/ctd-volume", "/rootfs/"} {
				if m[1] == path && !strings.Contains(line, `AT_FDCWD<`) || strings.Contains(m[1], place) && strings.HasSuffix(m[1], path) {
					found[path] = true
				}
			}
			if m[1] == path && strings.Contains(line, "AT_FDCWD</>") && inContainer(string(text), line) {
				found[path] = true
			}
		}
	}
	var paths []string
	for path := range found {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	return paths
}

// inContainer reports whether the process of an strace line has something of the container's root
// open before that line: runc's init reads in the container's root, from which paths begin.
func inContainer(log, line string) bool {
	pid, _, _ := strings.Cut(line, " ")
	before, _, _ := strings.Cut(log, line)
	for l := range strings.Lines(before) {
		if strings.HasPrefix(l, pid+" ") && strings.Contains(l, "/rootfs") {
			return true
		}
	}
	return false
}
