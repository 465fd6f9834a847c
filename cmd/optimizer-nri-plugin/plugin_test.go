package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

const noRebuild = "[rebuild]\nenabled = false\n"

func TestLaunched(t *testing.T) {
	h := newHost(t, "ready", noRebuild)
	h.launch()
	running := testContainer("old")
	running.State = api.ContainerState_CONTAINER_RUNNING
	r := h.runtime(running)
	r.start("c1")
	r.start("c2") // the same image at the same time
	r.stop("unknown")
	r.stop("c1")
	eventually(t, "c1's list", func() bool { return h.list("c1") != "" })
	if h.list("c2") != "" {
		t.Error("c2 was ended with c1")
	}
	r.stop("c2")
	eventually(t, "c2's list", func() bool { return h.list("c2") != "" })
	r.wantNoErrors()
	if n, _ := r.count("StartContainer"); n != 2 {
		t.Errorf("the plugin was asked %d times, want 2", n)
	}
	// Upstream's files at upstream's names.
	for _, name := range []string{"library/app:latest", "app:latest"} {
		data, err := os.ReadFile(h.path("persist/" + name))
		if err != nil || string(data) != "/bin/app\n/etc/conf\n" {
			t.Errorf("%s has %q, %v", name, data, err)
		}
	}
	eventually(t, "both lines", func() bool { return strings.Count(h.log(), `"msg":"recorded `) == 2 })
	for _, want := range []string{
		`"msg":"recorded docker.io/library/app:latest: read 2 files (1.0 MiB) in 5ms until stop; lost nothing; rebuild off"`,
		`containers run already and are not recorded`, `"container":"c2"`,
	} {
		if !strings.Contains(h.log(), want) {
			t.Errorf("the log lacks %s:\n%s", want, h.log())
		}
	}
}

func TestLaunchedWithABadConfiguration(t *testing.T) {
	h := newHost(t, "ready", "timeuot = 5\n")
	h.launch()
	r := h.runtime()
	r.start("c1")
	if n, _ := r.count("StartContainer"); n != 0 {
		t.Error("the plugin is in use")
	}
	eventually(t, "no plugin", func() bool { return len(h.plugins()) == 0 })
}

func TestLaunchedOutsideOfARuntime(t *testing.T) {
	h := newHost(t, "ready", noRebuild)
	for _, env := range []string{"NRI_PLUGIN_SOCKET=x", "NRI_PLUGIN_SOCKET=99", "NRI_PLUGIN_SOCKET=0"} {
		cmd := exec.Command(h.path("plugin"))
		cmd.Env = append(os.Environ(), env)
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); err == nil || code != 1 || !strings.Contains(string(out), "NRI_PLUGIN_SOCKET") {
			t.Errorf("%s: exit %d, %s", env, code, out)
		}
	}
}

// giveUp is when a runtime gives a hook up, and may fail the start. Hooks take a tenth of it; how much more on a busy
// machine is not for tests.
const giveUp = 2 * time.Second

// TestHookTakesNoLongerThanTheDeadline has tracers that are not ready in time or at all.
func TestHookTakesNoLongerThanTheDeadline(t *testing.T) {
	for name, tc := range map[string]struct {
		script string
		held   time.Duration // at least
	}{
		"hangs":      {"exec sleep 100", 200 * time.Millisecond},
		"deaf":       {"trap '' TERM INT HUP PIPE\nwhile :; do sleep 0.1; done", 200 * time.Millisecond},
		"ends":       {"exit 1", 0},
		"babbles":    {"exec cat /dev/urandom", 0},
		"is missing": {"", 0},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "ready", noRebuild)
			h.launch()
			if err := os.Remove(h.path("server")); err != nil {
				t.Fatal(err)
			}
			if tc.script != "" {
				h.write("server", 0o755, "#!/bin/sh\n"+tc.script+"\n")
			}
			r := h.runtime()
			for _, id := range []string{"c1", "c2", "c3"} {
				if d := r.start(id); d < tc.held || d >= giveUp {
					t.Errorf("the start was held for %v", d)
				}
				r.stop(id)
			}
			r.wantNoErrors()
			if len(h.plugins()) != 1 {
				t.Error("the plugin is gone")
			}
			if _, err := os.Stat(h.path("persist/app:latest")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a list of nothing: %v", err)
			}
			endTracers(h)
		})
	}
}

// endTracers has the plugin end its tracers: they see their input closed, or are children of nobody.
func endTracers(h *host) {
	h.killPlugins()
	entries, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		h.t.Fatal(err)
	}
	for _, e := range entries {
		cmdline, err := os.ReadFile(e)
		if err != nil || !bytes.Contains(cmdline, []byte(h.path("server"))) {
			continue
		}
		h.kill(e)
	}
}

func (h *host) kill(cmdline string) {
	var pid int
	for _, c := range strings.Split(cmdline, "/")[2] {
		pid = pid*10 + int(c-'0')
	}
	if p, err := os.FindProcess(pid); err == nil {
		_ = p.Kill() // it may have ended
		_ = p.Release()
	}
}

// TestKilledInsideAHook kills the plugin while a container's start waits for it.
func TestKilledInsideAHook(t *testing.T) {
	h := newHost(t, "hang", "start_deadline = \"900ms\"\n"+noRebuild)
	h.launch()
	r := h.runtime()
	p := h.plugin()
	time.AfterFunc(200*time.Millisecond, func() { _ = p.Kill() })
	// The timer starts before the hook does.
	if d := r.start("c1"); d < 100*time.Millisecond || d >= 900*time.Millisecond {
		t.Errorf("the start was held for %v, want about 200 ms", d)
	}
	if d := r.start("c2"); d >= 900*time.Millisecond {
		t.Errorf("without a plugin the start was held for %v", d)
	}
}

// TestFrozenInsideAHook stops the plugin (SIGSTOP) while a container's start waits for it: the kernel's timer kills it.
func TestFrozenInsideAHook(t *testing.T) {
	h := newHost(t, "hang", "start_deadline = \"900ms\"\n"+noRebuild)
	h.launch()
	r := h.runtime()
	p := h.plugin()
	time.AfterFunc(200*time.Millisecond, func() { _ = p.Signal(syscall.SIGSTOP) })
	d := r.start("c1")
	if d < 1300*time.Millisecond || d >= giveUp {
		t.Errorf("the start was held for %v, want 1.5 s", d)
	}
	if _, errs := r.count("StartContainer"); len(errs) == 1 && errors.Is(errs[0], context.DeadlineExceeded) {
		t.Errorf("the runtime gave up first: %v", errs)
	}
	if d := r.start("c2"); d >= 900*time.Millisecond {
		t.Errorf("without a plugin the start was held for %v", d)
	}
}

// TestFrozenBeforeAHook shows what remains: this runtime waits its 2 s once and goes on without the plugin.
func TestFrozenBeforeAHook(t *testing.T) {
	h := newHost(t, "ready", noRebuild)
	h.launch()
	r := h.runtime()
	if err := h.plugin().Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	err := r.StartContainer(context.Background(), &api.StartContainerRequest{Pod: testPod(), Container: testContainer("c1")})
	t.Logf("a start with a frozen plugin: %v after %v", err, time.Since(began))
	began = time.Now()
	err = r.StartContainer(context.Background(), &api.StartContainerRequest{Pod: testPod(), Container: testContainer("c2")})
	t.Logf("the next: %v after %v", err, time.Since(began))
}

// TestByHand starts the plugin before there is a runtime, and takes the runtime away and back.
func TestByHand(t *testing.T) {
	h := newHost(t, "ready", noRebuild)
	through := h.proxy()
	p, wait := h.byHand("--config", h.path("conf/02-optimizer-nri-plugin.conf"), "--name", "by-hand", "--idx", "07", "--nri-socket", h.path("proxy.sock"))
	// This configuration is not for it: its own counts.
	h.write("conf/07-by-hand.conf", 0o644, "nonsense = true\n")
	time.Sleep(300 * time.Millisecond) // there is no runtime yet
	r := h.runtime()
	r.waitPlugin()
	r.start("c1")
	r.wantNoErrors()
	r.Stop()
	// c1 still runs when the runtime is back.
	c1 := testContainer("c1")
	c1.State = api.ContainerState_CONTAINER_RUNNING
	r2 := h.runtime(c1)
	through.cut()
	r2.waitPlugin()
	r2.start("c2")
	r2.stop("c1")
	eventually(t, "c1's list", func() bool { return h.list("c1") != "" })
	if strings.Contains(h.list("c1"), "killed") {
		t.Errorf("c1 has a loss:\n%s", h.list("c1"))
	}
	// And again, c2 being gone when the runtime is back.
	r2.Stop()
	r3 := h.runtime()
	through.cut()
	r3.waitPlugin()
	eventually(t, "c2's list", func() bool { return h.list("c2") != "" })
	r3.start("c3")
	r3.wantNoErrors()
	// c3's recording is cut short.
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	out, err := wait()
	if err != nil {
		t.Errorf("the plugin ended with %v", err)
	}
	if !strings.Contains(h.list("c3"), "the plugin ended before the recording did") {
		t.Errorf("c3's list:\n%s", h.list("c3"))
	}
	for _, want := range []string{"not connected to the runtime", "the connection to the runtime ended", "recorded docker.io/library/app:latest"} {
		if !strings.Contains(out, want) {
			t.Errorf("stderr lacks %q:\n%s", want, out)
		}
	}
	if _, err := os.Stat(h.path("persist/optimizer-nri-plugin.log")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a log file nobody asked for: %v", err)
	}
}

// TestByHandWithFlagsOnly has no configuration file: containerd sends none to a plugin it did not launch.
func TestByHandWithFlagsOnly(t *testing.T) {
	h := newHost(t, "ready", noRebuild)
	r := h.runtime()
	h.byHand("--persist-dir", h.path("elsewhere"), "--server-path", h.path("server"), "--timeout", "60", "--nri-socket", h.path("nri.sock"))
	r.waitPlugin()
	r.start("c1")
	r.stop("c1")
	eventually(t, "the list", func() bool { _, err := os.Stat(h.path("elsewhere/app:latest.timeout60s")); return err == nil })
	r.wantNoErrors()
}

// TestRuntimeKilled kills the runtime: the plugin finishes what it records, and ends.
func TestRuntimeKilled(t *testing.T) {
	h := newHost(t, "ready:700ms", noRebuild)
	h.launch()
	cmd := exec.Command(self(t))
	cmd.Env = append(os.Environ(), envRuntime+"="+h.dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "started\n" {
		t.Fatalf("the runtime said %q, %v", line, err)
	}
	if err := errors.Join(cmd.Process.Kill(), in.Close()); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	if len(h.plugins()) != 1 {
		t.Fatal("the plugin died with the runtime")
	}
	eventually(t, "the plugin's end", func() bool { return len(h.plugins()) == 0 })
	if l := h.list("c1"); !strings.Contains(l, "/etc/conf") || strings.Contains(l, "killed") {
		t.Errorf("c1's list:\n%s", l)
	}
	if !strings.Contains(h.log(), "until exit; lost nothing") {
		t.Errorf("log:\n%s", h.log())
	}
}

func TestUsage(t *testing.T) {
	h := newHost(t, "ready", noRebuild)
	h.write("bad.conf", 0o644, "a = 1")
	h.write("file", 0o644, "")
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--version"}, 0, "optimizer-nri-plugin "},
		{[]string{"--help"}, 0, "usage: optimizer-nri-plugin"},
		{[]string{"--nonsense"}, 2, "flag provided but not defined"},
		{[]string{"word"}, 2, "unexpected argument \"word\""},
		{[]string{"--timeout", "soon"}, 2, "got \"soon\""},
		{[]string{"--persist-dir", "relative"}, 2, "want an absolute path"},
		{[]string{"--config", h.path("missing")}, 2, "no such file"},
		{[]string{"--config", h.path("bad.conf")}, 2, "line 1: unknown key a"},
		{[]string{"--config", h.path("conf/02-optimizer-nri-plugin.conf"), "--persist-dir", h.path("file/x")}, 1, "persist_dir"},
		{[]string{"--idx", "x"}, 1, "index \"x\""},
		{[]string{"rebuild"}, 2, "usage: optimizer-nri-plugin rebuild JOBFILE"},
		{[]string{"rebuild", h.path("missing")}, 1, "no such file"},
		{[]string{"rebuild", h.path("bad.conf")}, 1, "bad file"},
	} {
		cmd := exec.Command(h.path("plugin"), tc.args...)
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != tc.code || !strings.Contains(string(out), tc.want) {
			t.Errorf("%v: exit %d (%v), want %d with %q:\n%s", tc.args, code, err, tc.code, tc.want, out)
		}
	}
}

// TestUpstreamFlags has every flag that upstream's plugin has.
func TestUpstreamFlags(t *testing.T) {
	var errOut bytes.Buffer
	f, err := parseFlags([]string{
		"--name", "optimizer", "--idx", "03", "--events", "StartContainer,StopContainer", "--server-path", "/s",
		"--persist-dir", "/p", "--readable", "--timeout", "30", "--overwrite",
	}, &errOut, &errOut)
	if err != nil {
		t.Fatalf("%v: %s", err, &errOut)
	}
	c := f.base
	if f.serve.Name != "optimizer" || f.serve.Idx != "03" || f.own != nil || c.ServerPath != "/s" || c.PersistDir != "/p" ||
		!c.Readable || !c.Overwrite || c.Timeout != 30*time.Second {
		t.Errorf("got %+v", f)
	}
}

// TestHookLatency measures what the plugin adds to a container's start, tracer process
// included, and that nothing of a run is left in the plugin.
func TestHookLatency(t *testing.T) {
	h := newHost(t, "ready", noRebuild)
	h.launch()
	r := h.runtime()
	pid := strconv.Itoa(h.plugin().Pid)
	held := func(what string) int {
		dir := filepath.Join("/proc", pid, what)
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		// The pool of trace instances keeps more of them for a while after so many starts.
		return len(slices.DeleteFunc(entries, func(e fs.DirEntry) bool {
			to, err := os.Readlink(filepath.Join(dir, e.Name()))
			return err == nil && strings.Contains(to, tracefs.Prefix)
		}))
	}
	r.start("first")
	r.stop("first")
	eventually(t, "the first list", func() bool { return h.list("first") != "" })
	before := held("fd")
	var all []time.Duration
	for i := range 60 {
		id := "c" + string(rune('a'+i%26)) + string(rune('a'+i/26))
		all = append(all, r.start(id))
		r.stop(id)
	}
	slices.Sort(all)
	t.Logf("StartContainer with a tracer that is ready at once: p50 %v, p90 %v, max %v", all[30], all[54], all[59])
	r.wantNoErrors()
	eventually(t, "every list", func() bool { return strings.Count(h.log(), `"msg":"recorded `) == 61 })
	eventually(t, "no descriptor of a run", func() bool { return held("fd") <= before })
	lists, err := filepath.Glob(filepath.Join("/proc", pid, "task", "*", "children"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range lists {
		if children, err := os.ReadFile(name); err == nil && len(bytes.TrimSpace(children)) > 0 {
			t.Errorf("children of the plugin: %s", children)
		}
	}
	if n := held("task"); n > 60 {
		t.Errorf("the plugin has %d threads", n)
	}
}
