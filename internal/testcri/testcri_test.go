package testcri_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/testenv/procfs"
)

const (
	helloRef     = "docker.io/library/hello:latest"
	helloPackage = "./internal/testcri/internal/hello"
	abandonEnv   = "TESTCRI_ABANDON" // makes this program the one that a test kills
)

func TestMain(m *testing.M) {
	if os.Getenv(abandonEnv) != "" {
		fmt.Fprintln(os.Stderr, "abandon:", abandon(context.Background()))
		os.Exit(1)
	}
	testenv.Main(m)
}

func importHello(t *testing.T, e *testcri.Env) {
	t.Helper()
	critest.ImportStatic(t, e, helloRef, helloPackage, map[string][]byte{"/etc/greeting": []byte("from the image")})
}

func TestRunThroughTheCRI(t *testing.T) {
	testenv.Root(t)
	notes := filepath.Join(t.TempDir(), "notes")
	e := critest.Start(t, testcri.Options{
		Plugins:       map[string]string{"10-probe": testenv.Command(t, "./internal/testcri/internal/nriprobe")},
		PluginConfigs: map[string]string{"10-probe.conf": notes},
	})
	importHello(t, e)

	r := critest.Run(t.Context(), t, e, testcri.ContainerOptions{Image: helloRef, Args: []string{"one", "/etc/greeting"}})
	if want := "one\nfrom the image\n"; string(r.Stdout) != want || len(r.Stderr) > 0 || r.ExitCode != 0 {
		t.Errorf("Run = exit %d, stdout %q, stderr %q, want exit 0, stdout %q", r.ExitCode, r.Stdout, r.Stderr, want)
	}
	r = critest.Run(t.Context(), t, e, testcri.ContainerOptions{Image: helloRef, Args: []string{"/no/such/file"}})
	if r.ExitCode != 1 || !strings.Contains(string(r.Stderr), "/no/such/file") {
		t.Errorf("Run(no such file) = exit %d, stderr %q, want exit 1 and the file's name", r.ExitCode, r.Stderr)
	}

	text, err := os.ReadFile(notes)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Configure containerd\n", "StartContainer main\n", "RemoveContainer main\n"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the plugin noted %q, want %q in it", text, want)
		}
	}
}

// TestContainerdComesAndGoes restarts and kills containerd under a running container.
func TestContainerdComesAndGoes(t *testing.T) {
	e := critest.Start(t, testcri.Options{})
	importHello(t, e)
	ctx := t.Context()
	p, err := e.RunPod(ctx, testcri.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.Create(ctx, testcri.ContainerOptions{Image: helloRef, Args: []string{"sleep"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	pid, err := c.PID(ctx)
	if err != nil || unix.Kill(pid, 0) != nil {
		t.Fatalf("PID = %d, %v, want a live process", pid, err)
	}
	out, _, exit, err := c.Exec(ctx, "/hello", "inside")
	if err != nil || string(out) != "inside\n" || exit != 0 {
		t.Errorf("Exec = %q, exit %d, %v, want inside", out, exit, err)
	}

	if err := e.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if err := e.Kill9(); err != nil {
		t.Fatal(err)
	}
	if e.PID() != 0 {
		t.Errorf("PID after Kill9 = %d, want 0", e.PID())
	}
	if _, err := c.Status(ctx); err == nil {
		t.Error("Status while containerd is down succeeded")
	}
	if err := e.Up(ctx); err != nil {
		t.Fatal(err)
	}
	if again, err := c.PID(ctx); err != nil || again != pid {
		t.Errorf("PID after two restarts = %d, %v, want %d", again, err, pid)
	}
	if err := c.Stop(ctx, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if code, err := c.Wait(ctx); err != nil || code != 7 {
		t.Errorf("Wait = %d, %v, want the exit code 7", code, err)
	}
	if out, _, err := c.Logs(); err != nil || string(out) != "ready\n" {
		t.Errorf("Logs = %q, %v, want ready", out, err)
	}
	if err := errors.Join(c.Remove(ctx), p.Remove(ctx)); err != nil {
		t.Error(err)
	}
}

// TestCloseRemovesEverything closes an Env whose containerd was killed while a
// container runs that does not end by itself.
func TestCloseRemovesEverything(t *testing.T) {
	e := critest.Start(t, testcri.Options{})
	importHello(t, e)
	p, err := e.RunPod(t.Context(), testcri.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.Create(t.Context(), testcri.ContainerOptions{Image: helloRef, Args: []string{"sleep"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	pid, err := c.PID(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Kill9(); err != nil {
		t.Fatal(err)
	}
	if mounts, err := procfs.MountsBelow(e.Dir()); err != nil || len(mounts) == 0 {
		t.Fatalf("MountsBelow = %q, %v, want the container's mounts", mounts, err)
	}
	if err := e.Close(); err != nil {
		t.Errorf("Close = %v", err)
	}
	if err := e.Close(); err != nil {
		t.Errorf("second Close = %v", err)
	}
	if _, err := os.Stat(e.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stat of the directory after Close = %v, want ErrNotExist", err)
	}
	if stat, err := os.ReadFile(filepath.Join("/proc", "self", "mountinfo")); err != nil || strings.Contains(string(stat), e.Dir()) {
		t.Errorf("mounts are left below %s (%v)", e.Dir(), err)
	}
	if all, err := procfs.Processes(); err != nil {
		t.Error(err)
	} else {
		for _, p := range all {
			if p.PID == pid && !p.Zombie {
				t.Errorf("the container's process %d is left: %s", pid, p.CommandLine())
			}
		}
	}
	if left, err := filepath.Glob("/sys/fs/cgroup/*/headstart-" + strings.TrimPrefix(filepath.Base(e.Dir()), "cri-")); err != nil || len(left) > 0 {
		t.Errorf("cgroups are left: %q, %v", left, err)
	}
}

func TestPullFromRegistry(t *testing.T) {
	testenv.Root(t)
	reg := critest.StartRegistry(t, testcri.RegistryOptions{})
	e := critest.Start(t, testcri.Options{Hosts: map[string]string{reg.Host: reg.HostsTOML()}})
	img, err := testcri.StaticImage(testenv.Command(t, helloPackage), nil)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := reg.Push(t.Context(), "library/hello", "v1", img)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Pull(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	r := critest.Run(t.Context(), t, e, testcri.ContainerOptions{Image: ref, Args: []string{"pulled"}})
	if string(r.Stdout) != "pulled\n" {
		t.Errorf("Run = %q (stderr %q, exit %d), want pulled", r.Stdout, r.Stderr, r.ExitCode)
	}
	if _, err := e.Pull(t.Context(), reg.Host+"/library/hello:v2"); err == nil {
		t.Error("Pull of a tag that is not there succeeded")
	}
}

// TestFailedStart gives containerd a configuration that it refuses.
func TestFailedStart(t *testing.T) {
	testenv.Root(t)
	testenv.Tool(t, "containerd")
	testenv.Tool(t, "runc")
	dir := t.TempDir()
	_, err := testcri.Start(t.Context(), testcri.Options{Dir: dir, Config: "root = [this is no TOML"})
	if err == nil || !strings.Contains(err.Error(), "ended before it was ready") || !strings.Contains(err.Error(), "toml") {
		t.Errorf("Start = %v, want that containerd ended, and its log", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("Start left %v, %v, want nothing", left, err)
	}
}

func TestStartRegistryFails(t *testing.T) {
	testenv.Tool(t, "registry")
	dir := t.TempDir()
	_, err := testcri.StartRegistry(t.Context(), testcri.RegistryOptions{Dir: dir, Auth: "  nosuch: {}"})
	if err == nil || !strings.Contains(err.Error(), "nosuch") {
		t.Errorf("StartRegistry with an unknown auth = %v, want its log", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("StartRegistry left %v, %v, want nothing", left, err)
	}
}
