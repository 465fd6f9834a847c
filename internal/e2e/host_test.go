package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/workload"
	"github.com/headstart-oci/headstart/pkg/persist"
)

const (
	pluginFile = "02-optimizer-nri-plugin"
	// patience bounds every wait for something that normally takes a moment.
	patience = 90 * time.Second
	// buildPatience bounds the wait for a rebuild, which leaves the CPUs and disks to all others.
	buildPatience = 5 * time.Minute
	poll          = 20 * time.Millisecond
)

// host is a containerd with our programs beside it.
type host struct {
	*testcri.Env
	base   string // everything that is not containerd's
	plugin string // optimizer-nri-plugin; a copy of our own, so that its processes can be told
	server string // optimizer-server
}

// newHost starts a private containerd without plugins.
func newHost(t *testing.T) *host {
	t.Helper()
	return newHostWith(t, testcri.Options{})
}

func newHostWith(t *testing.T, o testcri.Options) *host {
	t.Helper()
	base := t.TempDir() // first, so that it goes last: the plugin may write there till containerd ends
	env := critest.Start(t, o)
	h := &host{Env: env, base: base, plugin: filepath.Join(base, "optimizer-nri-plugin"), server: filepath.Join(base, "optimizer-server")}
	for to, name := range map[string]string{h.plugin: "optimizer-nri-plugin", h.server: "optimizer-server"} {
		copyProgram(t, testenv.Binary(t, name), to)
	}
	return h
}

func copyProgram(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	must(t, err)
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	must(t, err)
	_, err = io.Copy(out, in)
	must(t, errors.Join(err, out.Close()))
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	lines = lines[max(0, len(lines)-n):]
	for i, l := range lines {
		lines[i] = l[:min(len(l), 300)]
	}
	return strings.Join(lines, "\n")
}

// image makes the image called name and imports it.
func (h *host) image(t *testing.T, name workload.Name) *workload.Image {
	t.Helper()
	img, err := workload.Build(t.Context(), name, workload.Options{Log: os.Stderr})
	if errors.Is(err, workload.ErrUnavailable) {
		if os.Getenv("REQUIRE_TOOLS") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	must(t, err)
	must(t, h.ImportOCI(t.Context(), img.Dir, img.Reference))
	return img
}

// setup is one installation of the plugin: its state and its configuration.
type setup struct {
	host    *host
	persist string
	config  string // text of the configuration
	log     string // file
}

// settings are what a test changes of the configuration; a value is TOML.
type settings map[string]string

// newSetup makes a configuration with a state directory of its own. Keys with a dot go
// to the table before it.
func (h *host) newSetup(t *testing.T, s settings) *setup {
	t.Helper()
	dir := t.TempDir()
	u := &setup{host: h, persist: filepath.Join(dir, "results"), log: filepath.Join(dir, "plugin.log")}
	top := map[string]string{
		"persist_dir": strconv.Quote(u.persist), "server_path": strconv.Quote(h.server),
		"containerd_address": strconv.Quote(h.Address()), "hosts_dir": strconv.Quote(h.HostsDir()),
		"log_file": strconv.Quote(u.log), "log_level": `"debug"`, "idle_timeout": `"20s"`,
	}
	tables := map[string][]string{}
	for key, value := range s {
		if table, name, ok := strings.Cut(key, "."); ok {
			tables[table] = append(tables[table], name+" = "+value)
			continue
		}
		top[key] = value
	}
	var b strings.Builder
	for key, value := range top {
		fmt.Fprintf(&b, "%s = %s\n", key, value)
	}
	for table, lines := range tables {
		fmt.Fprintf(&b, "[%s]\n%s\n", table, strings.Join(lines, "\n"))
	}
	u.config = b.String()
	t.Cleanup(func() {
		if data, err := os.ReadFile(u.log + ".stderr"); err == nil && t.Failed() {
			t.Logf("the end of its stderr:\n%s", lastLines(string(data), 5))
		}
		if data, err := os.ReadFile(u.log); err == nil && t.Failed() {
			t.Logf("the end of the plugin's log:\n%s", lastLines(string(data), 25))
		}
	})
	return u
}

// drop installs the plugin as a user does, into the directory that containerd launches
// plugins from, and restarts containerd.
func (u *setup) drop(t *testing.T) {
	t.Helper()
	must(t, u.host.InstallPlugin(pluginFile, u.host.plugin))
	must(t, os.WriteFile(filepath.Join(u.host.PluginConfigDir(), pluginFile+".conf"), []byte(u.config), 0o644))
	must(t, u.host.Restart(t.Context()))
}

// byHand is a plugin process that the test started.
type byHand struct {
	cmd  *exec.Cmd
	wait func() error
}

// start runs the plugin by hand and returns once containerd has registered it; it is
// killed when the test ends. It is run by a command, if there is one.
func (u *setup) start(t *testing.T, by ...string) *byHand {
	t.Helper()
	conf := filepath.Join(filepath.Dir(u.persist), "plugin.toml")
	must(t, os.WriteFile(conf, []byte(u.config), 0o644))
	name := "hand-" + strings.ToLower(filepath.Base(filepath.Dir(filepath.Dir(u.persist)))[:4])
	registered := strings.Count(u.host.Log(), name)
	stderr, err := os.OpenFile(u.log+".stderr", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	must(t, err)
	args := append(by, u.host.plugin, "--config", conf, "--name", name, "--idx", "07", "--nri-socket", u.host.NRISocket())
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = stderr, stderr
	p := &byHand{cmd: cmd, wait: testenv.Start(t, cmd)}
	must(t, stderr.Close())
	eventually(t, "the plugin is registered", func() error {
		if !alive(cmd.Process.Pid) {
			data, err := os.ReadFile(u.log + ".stderr")
			return stop{fmt.Errorf("the plugin ended: %w: %s", err, data)}
		}
		if n := strings.Count(u.host.Log(), name); n <= registered {
			return fmt.Errorf("containerd's log names %s %d times", name, n)
		}
		return nil
	})
	return p
}

// quit ends the plugin by SIGTERM and waits for it.
func (p *byHand) quit(t *testing.T) {
	t.Helper()
	must(t, p.cmd.Process.Signal(unix.SIGTERM))
	if err := p.wait(); err != nil {
		t.Errorf("the plugin ended with %v, want success", err)
	}
}

// kill9 ends the plugin by SIGKILL and waits for it.
func (p *byHand) kill9(t *testing.T) {
	t.Helper()
	must(t, p.cmd.Process.Kill())
	_ = p.wait()
}

// stop ends eventually's waiting at once.
type stop struct{ error }

// eventually waits until try returns nil.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	within(t, patience, what, try)
}

// within waits for so long at most until try returns nil.
func within(t *testing.T, limit time.Duration, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := try()
		if err == nil {
			return
		}
		var s stop
		if errors.As(err, &s) || time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(poll)
	}
}

// list returns the access list of a container once it is there.
func (u *setup) list(t *testing.T, container string) *persist.List {
	t.Helper()
	var l *persist.List
	eventually(t, "list of container "+container[:12], func() error {
		paths, err := filepath.Glob(filepath.Join(u.persist, "lists", "*", "*", container+".list"))
		if err != nil || len(paths) != 1 {
			return fmt.Errorf("%d lists: %w", len(paths), errors.Join(err, os.ErrNotExist))
		}
		l, err = readList(paths[0])
		if err != nil {
			return stop{err} // a list is whole from the moment it can be seen
		}
		return nil
	})
	return l
}

func readList(path string) (_ *persist.List, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return persist.Read(f)
}

// results returns what the rebuild queue says it built, by the digest of the image.
func (u *setup) results(t *testing.T) map[string][]rebuild.Result {
	t.Helper()
	all := map[string][]rebuild.Result{}
	paths, err := filepath.Glob(filepath.Join(u.persist, "*", "done", "*.json"))
	must(t, err)
	for _, p := range paths {
		data, err := os.ReadFile(p)
		must(t, err)
		var r rebuild.Result
		if err := json.Unmarshal(data, &r); err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		all[r.Image.Digest] = append(all[r.Image.Digest], r)
	}
	return all
}

// built returns the result of the image's rebuild once there is one.
func (u *setup) built(t *testing.T, manifest digest.Digest) rebuild.Result {
	t.Helper()
	var res rebuild.Result
	within(t, buildPatience, "rebuild of "+manifest.String(), func() error {
		all := u.results(t)
		if r := all[manifest.String()]; len(r) > 0 {
			res = r[0]
			return nil
		}
		if paths, _ := filepath.Glob(filepath.Join(u.persist, "*", "failed", "*.json")); len(paths) > 0 {
			data, err := os.ReadFile(paths[0])
			return stop{fmt.Errorf("given up: %s %w", data, err)}
		}
		return errors.New("no result")
	})
	return res
}

// layoutOf splits "oci:DIR:TAG".
func layoutOf(t *testing.T, target string) (dir, tag string) {
	t.Helper()
	rest, ok := strings.CutPrefix(target, "oci:")
	i := strings.LastIndexByte(rest, ':')
	if !ok || i < 0 {
		t.Fatalf("target = %q, want oci:DIR:TAG", target)
	}
	return rest[:i], rest[i+1:]
}

// pod starts a pod that goes when the test does.
func (h *host) pod(t *testing.T) *testcri.Pod {
	t.Helper()
	pod, err := h.RunPod(t.Context(), testcri.PodOptions{})
	must(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
		defer cancel()
		if err := pod.Remove(ctx); err != nil {
			t.Errorf("remove pod: %v", err)
		}
	})
	return pod
}

// ran is a container that ended.
type ran struct {
	id     string
	exit   int32
	start  time.Duration
	out    string
	errOut string
}

// run runs a container to its end in a pod of its own.
func (h *host) run(t *testing.T, o testcri.ContainerOptions) ran {
	t.Helper()
	return h.runIn(t, h.pod(t), o)
}

func (h *host) runIn(t *testing.T, pod *testcri.Pod, o testcri.ContainerOptions) ran {
	t.Helper()
	c, err := pod.Create(t.Context(), o)
	must(t, err)
	took, err := c.Start(t.Context())
	must(t, err)
	return finish(t, c, took)
}

// finish waits for the end of a started container.
func finish(t *testing.T, c *testcri.Container, took time.Duration) ran {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	exit, err := c.Wait(ctx)
	must(t, err)
	stdout, stderr, err := c.Logs()
	must(t, err)
	return ran{id: c.ID, exit: exit, start: took, out: string(stdout), errOut: string(stderr)}
}

// processesOf returns the live processes that run the program at path, with the given
// argument if it is not empty.
func processesOf(t *testing.T, path, argument string) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	must(t, err)
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		exe, err := os.Readlink(filepath.Join("/proc", e.Name(), "exe"))
		if err != nil || strings.TrimSuffix(exe, " (deleted)") != path || !alive(pid) {
			continue
		}
		args, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if argument == "" || strings.Contains("\x00"+string(args), "\x00"+argument+"\x00") {
			pids = append(pids, pid)
		}
	}
	return pids
}

// alive reports whether the process exists and is no zombie.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	return len(fields) > 0 && fields[0] != "Z"
}
