package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/testenv"
)

// TestRecordContainerEnds attaches to containers that go on when their recording ends, by what --until-log, --idle and
// --timeout say.
func TestRecordContainerEnds(t *testing.T) {
	e := critest.Start(t, testcri.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	const ref = "docker.io/library/ends:v1"
	layout := shellLayout(t, map[string]string{"bin/sleep": hostFile(t, "sleep"), "etc/early": "early\n", "etc/late": "late\n"})
	if err := e.ImportOCI(ctx, layout, ref); err != nil {
		t.Fatal(err)
	}
	pod, err := e.RunPod(ctx, testcri.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const script = `cat /etc/early; echo starting; until [ -e /go ]; do sleep 0.1; done; cat /etc/late; echo now serving; sleep 600`
	for name, tc := range map[string]struct {
		args []string
		end  string
		took time.Duration // at least
	}{
		"ready":   {[]string{"--until-log", "^now serving$"}, "ready", 0},
		"idle":    {[]string{"--idle", "2s"}, "idle", 2 * time.Second},
		"timeout": {[]string{"--timeout", "3s"}, "timeout", 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := pod.Create(ctx, testcri.ContainerOptions{Image: ref, Name: name, Args: []string{"-c", script}})
			if err == nil {
				_, err = c.Start(ctx)
			}
			if err != nil {
				t.Fatal(err)
			}
			awaitLog(t, c, "starting\n")
			list := filepath.Join(t.TempDir(), "list")
			recording := attachTo(ctx, t, e, c.ID, append([]string{"-o", list}, tc.args...)...)
			pid, err := c.PID(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(fmt.Sprintf("/proc/%d/root/go", pid), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := <-recording; err != nil {
				t.Fatal(err)
			}
			l := readListFile(t, list)
			if l.End != tc.end || l.Container != c.ID || l.Duration < tc.took || !slices.Contains(paths(l), "/etc/late") || slices.Contains(paths(l), "/etc/early") {
				t.Errorf("list of %s, ended by %s after %v, has %q; want %s, %s, at least %v, what was read meanwhile", l.Container, l.End, l.Duration, paths(l), c.ID, tc.end, tc.took)
			}
			if s, err := c.Status(ctx); err != nil || s.GetFinishedAt() != 0 {
				t.Errorf("the container does not run on: %v, %v", s, err)
			}
			awaitLog(t, c, "now serving\n")
		})
	}
	t.Run("a line that was there before", func(t *testing.T) {
		c, err := pod.Create(ctx, testcri.ContainerOptions{Image: ref, Name: "before", Args: []string{"-c", script}})
		if err == nil {
			_, err = c.Start(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		awaitLog(t, c, "starting\n")
		list := filepath.Join(t.TempDir(), "list")
		if err := <-attachTo(ctx, t, e, c.ID, "--until-log", "^start", "-o", list); err != nil {
			t.Fatal(err)
		}
		if l := readListFile(t, list); l.End != "ready" {
			t.Errorf("ended by %s, want ready", l.End)
		}
	})
	t.Run("no log", func(t *testing.T) {
		startElsewhere(namespaces.WithNamespace(ctx, "elsewhere"), t, e.Client())
		err := run(ctx, attaching(t, e, "lone-container", "--until-log", "x", "-o", filepath.Join(t.TempDir(), "list")), nil, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), "--until-log takes a container with a log of the CRI") {
			t.Errorf("error %v, want one about the log", err)
		}
	})
}

// hostFile returns the program of this machine that has a name.
func hostFile(t *testing.T, name string) string {
	t.Helper()
	at, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err) // POSIX has it
	}
	b, err := os.ReadFile(at)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func attaching(t *testing.T, e *testcri.Env, id string, args ...string) []string {
	t.Helper()
	return append([]string{"record", "--container", id, "--containerd-address", e.Address(), "--server-path", testenv.Binary(t, "optimizer-server")}, args...)
}

// attachTo records a container and returns once the tracer is there; the channel gets how it ended.
func attachTo(ctx context.Context, t *testing.T, e *testcri.Env, id string, args ...string) <-chan error {
	t.Helper()
	attached, done := make(chan struct{}), make(chan error, 1)
	errs := &watched{want: "recording process", seen: func() { close(attached) }}
	go func() { done <- run(ctx, attaching(t, e, id, args...), nil, io.Discard, errs) }()
	select {
	case <-attached:
	case err := <-done:
		t.Fatalf("%v: %s", err, errs.all.String())
	}
	return done
}

// awaitLog waits until a container has said something.
func awaitLog(t *testing.T, c *testcri.Container, want string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		out, errs, err := c.Logs()
		if err == nil && strings.Contains(string(out), want) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("it says %q and %q, %v; want %q", out, errs, err, want)
		}
	}
}
