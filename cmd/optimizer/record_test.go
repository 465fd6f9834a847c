package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tools"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

const helloPackage = "./internal/testcri/internal/hello"

// helloRoot returns a root directory with a static program that prints the files it is told.
func helloRoot(t *testing.T) string {
	t.Helper()
	testenv.Root(t)
	program, err := tools.BuildCommand(t.Context(), helloPackage)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	for name, data := range map[string][]byte{"bin/hello": b, "etc/motd": []byte("hi"), "etc/two\nlines": []byte("odd"), "etc/untouched": nil} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// TestRecordRelativeServer names the tracer by a path that is relative to the directory of the command line, in which
// the tracer itself does not run.
func TestRecordRelativeServer(t *testing.T) {
	root := helloRoot(t)
	server := testenv.Binary(t, "optimizer-server")
	name := filepath.Join(t.TempDir(), "list")
	cmd := exec.CommandContext(t.Context(), testenv.Binary(t, "optimizer"), "record", "--quiet", "--root", root,
		"--server-path", "./"+filepath.Base(server), "-o", name, "--", "hello", "/etc/motd")
	cmd.Dir = filepath.Dir(server)
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "hi\n" {
		t.Fatalf("record: %v, output %q; want %q", err, out, "hi\n")
	}
	if l := readListFile(t, name); !l.Complete() || !slices.Equal(paths(l), []string{"/bin/hello", "/etc/motd"}) {
		t.Errorf("paths %q, losses %v", paths(l), l.Losses)
	}
}

func readListFile(t *testing.T, name string) *persist.List {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	l, err := persist.ReadAny(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func paths(l *persist.List) []string {
	var out []string
	for _, a := range l.Accesses {
		out = append(out, a.Path)
	}
	return out
}

func TestRecordRoot(t *testing.T) {
	root := helloRoot(t)
	server := testenv.Binary(t, "optimizer-server")
	dir := t.TempDir()
	for _, format := range []string{"native", "paths", "csv", "json"} {
		name := filepath.Join(dir, format)
		code, out, errs := invoke(t, "record", "--root", root, "--server-path", server, "-o", name, "--format", format,
			"--reference", "app:v1", "--", "hello", "/etc/motd", "/etc/two\nlines", "word")
		if code != 0 || out != "hi\nodd\nword\n" || !strings.Contains(errs, "3 files in ") {
			t.Fatalf("%s: status %d, stdout %q, stderr %s", format, code, out, errs)
		}
		l := readListFile(t, name)
		want := []string{"/bin/hello", "/etc/motd", "/etc/two\nlines"}
		if format == "paths" {
			want = want[:2]
			if !strings.Contains(errs, "1 paths were left out: the format paths cannot hold them") {
				t.Errorf("no word about the path with a newline: %s", errs)
			}
		}
		if got := paths(l); !slices.Equal(got, want) {
			t.Errorf("%s: recorded %q, want %q", format, got, want)
		}
	}
	l := readListFile(t, filepath.Join(dir, "native"))
	if l.Reference != "app:v1" || l.End != "exit" || l.Grade == "" || !strings.HasPrefix(l.Engine, "fanotify") || !l.Complete() || l.Platform == "" ||
		!slices.Equal(l.Command, []string{"hello", "/etc/motd", "/etc/two\nlines", "word"}) ||
		l.Accesses[0].How&trace.Executed == 0 || l.Accesses[1].How != trace.Opened|trace.Read || l.Accesses[1].Size != 2 {
		t.Errorf("list %+v", l)
	}
}

// A command in a directory has the user and group that were asked for.
func TestRecordRootUser(t *testing.T) {
	root := helloRoot(t)
	server := testenv.Binary(t, "optimizer-server")
	for user, want := range map[string][2]string{
		"":          {"0", "0"},
		"1000":      {"1000", "1000"},
		"1000:1000": {"1000", "1000"},
		"1000:1001": {"1000", "1001"},
		"0:1000":    {"0", "1000"},
		"1000:0":    {"1000", "0"},
	} {
		code, out, errs := invoke(t, "record", "--root", root, "--server-path", server, "-o", filepath.Join(t.TempDir(), "list"),
			"--user", user, "--", "hello", "/proc/self/status")
		if code != 0 {
			t.Fatalf("--user %q: status %d, stderr %s", user, code, errs)
		}
		for i, key := range []string{"Uid:", "Gid:"} {
			_, after, _ := strings.Cut(out, "\n"+key)
			line, _, _ := strings.Cut(after, "\n")
			// Real, effective, saved and filesystem id.
			if got := strings.Fields(line); !slices.Equal(got, slices.Repeat([]string{want[i]}, 4)) {
				t.Errorf("--user %q: %s %q, want all %s", user, key, got, want[i])
			}
		}
	}
	for _, user := range []string{"x", "1000:", ":1000", "-1", "1:2:3", "2147483648", "1 "} {
		code, _, errs := invoke(t, "record", "--root", root, "--server-path", server, "-o", "-", "--user", user, "--", "hello")
		if code != exitUsage || !strings.Contains(errs, "--user: got") {
			t.Errorf("--user %q: status %d, stderr %s, want a usage error", user, code, errs)
		}
	}
}

func TestRecordToStdout(t *testing.T) {
	root := helloRoot(t)
	code, out, errs := invoke(t, "record", "-q", "--in-place", "--root", root, "--server-path", testenv.Binary(t, "optimizer-server"),
		"-o", "-", "--format", "paths", "--", "/bin/hello", "/etc/motd")
	if code != 0 || out != "/bin/hello\n/etc/motd\n" || errs != "hi\n" {
		t.Errorf("status %d, stdout %q, stderr %q, want the list there and the command's output here", code, out, errs)
	}
}

func TestRecordFailingCommand(t *testing.T) {
	root := helloRoot(t)
	name := filepath.Join(t.TempDir(), "list")
	code, _, errs := invoke(t, "record", "--root", root, "--server-path", testenv.Binary(t, "optimizer-server"), "-o", name, "--", "hello", "/missing")
	if code != exitFailed || !strings.Contains(errs, "optimizer: the command ended with exit status 1; the list was written") {
		t.Errorf("status %d, stderr %s", code, errs)
	}
	if got := paths(readListFile(t, name)); !slices.Equal(got, []string{"/bin/hello"}) {
		t.Errorf("recorded %q", got)
	}
}

// The recording ends the command when its time is over, and that is no failure.
func TestRecordLimits(t *testing.T) {
	root := helloRoot(t)
	server := testenv.Binary(t, "optimizer-server")
	for limit, end := range map[string]string{"--timeout": "timeout", "--idle": "idle"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			name := filepath.Join(t.TempDir(), "list")
			code, _, errs := invoke(t, "record", "--root", root, "--server-path", server, "-o", name, limit, "400ms", "--", "hello", "sleep")
			if code != 0 {
				t.Fatalf("status %d, stderr %s", code, errs)
			}
			if l := readListFile(t, name); l.End != end || !slices.Equal(paths(l), []string{"/bin/hello"}) {
				t.Errorf("ended by %s, recorded %q", l.End, paths(l))
			}
		})
	}
}

// Ctrl-C ends the recording; the list is written all the same.
func TestRecordInterrupt(t *testing.T) {
	root := helloRoot(t)
	server := testenv.Binary(t, "optimizer-server")
	name := filepath.Join(t.TempDir(), "list")
	ctx, cancel := context.WithCancel(t.Context())
	out := &watched{want: "ready", seen: cancel}
	var errs bytes.Buffer
	err := run(ctx, []string{"record", "--root", root, "--server-path", server, "-o", name, "--", "hello", "sleep"}, nil, out, &errs)
	if err != nil {
		t.Fatalf("%v: %s", err, errs.String())
	}
	if l := readListFile(t, name); l.End != "stop" || !slices.Equal(paths(l), []string{"/bin/hello"}) {
		t.Errorf("ended by %s, recorded %q", l.End, paths(l))
	}
}

// A tracer that dies while the command runs leaves an incomplete list, which is a failure.
func TestRecordTracerDies(t *testing.T) {
	root := helloRoot(t)
	dir := t.TempDir()
	name, pidFile, server := filepath.Join(dir, "list"), filepath.Join(dir, "pid"), filepath.Join(dir, "server")
	script := fmt.Sprintf("#!/bin/sh\necho $$ > '%s'\nexec '%s' \"$@\"\n", pidFile, testenv.Binary(t, "optimizer-server"))
	if err := os.WriteFile(server, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	out := &watched{want: "ready", seen: func() {
		var pid int
		b, err := os.ReadFile(pidFile)
		if err == nil {
			_, err = fmt.Sscan(string(b), &pid)
		}
		if err == nil {
			err = syscall.Kill(pid, syscall.SIGKILL)
		}
		if err != nil {
			t.Errorf("kill the tracer: %v", err)
		}
	}}
	errs := &watched{want: "\x00"} // the program's words come beside ours
	err := run(t.Context(), []string{"record", "--root", root, "--server-path", server, "-o", name, "--", "hello", "sleep"}, nil, out, errs)
	if want := "the tracer died before the recording ended; the list was written and is incomplete"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s; stderr %s", err, want, errs.all.String())
	}
	if l := readListFile(t, name); l.End != "killed" || l.Complete() {
		t.Errorf("ended by %s, complete %v", l.End, l.Complete())
	}
}

// watched calls seen when it was written to with want in it.
type watched struct {
	want string
	seen func()
	mu   sync.Mutex
	all  bytes.Buffer // guarded by mu
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := bytes.Contains(w.all.Bytes(), []byte(w.want))
	w.all.Write(p)
	if !before && bytes.Contains(w.all.Bytes(), []byte(w.want)) {
		w.seen()
	}
	return len(p), nil
}

// Without a tracer the command never runs and an old list stays.
func TestRecordWithoutTracer(t *testing.T) {
	root := helloRoot(t)
	dir := t.TempDir()
	name := filepath.Join(dir, "list")
	if err := os.WriteFile(name, []byte("/old\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(dir, "dead")
	if err := os.WriteFile(dead, []byte("#!/bin/sh\nexit 3\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for server, want := range map[string]string{
		dead:                          "optimizer: the tracer was never armed: ",
		filepath.Join(dir, "missing"): "no such file or directory",
	} {
		code, out, errs := invoke(t, "record", "--root", root, "--server-path", server, "-o", name, "--", "hello", "word")
		if code != exitFailed || out != "" || !strings.Contains(errs, want) {
			t.Errorf("%s: status %d, stdout %q, stderr %s, want 1 and %s", server, code, out, errs, want)
		}
	}
	if got := paths(readListFile(t, name)); !slices.Equal(got, []string{"/old"}) {
		t.Errorf("the old list was changed: %q", got)
	}
}

func TestRecordErrors(t *testing.T) {
	root := helloRoot(t)
	server := testenv.Binary(t, "optimizer-server")
	name := filepath.Join(t.TempDir(), "list")
	for want, args := range map[string][]string{
		"command nonsense: not found in the root's PATH": {"--root", root, "--", "nonsense"},
		"no such file or directory":                      {"--root", root + "/missing", "--", "hello"},
		"the tracer was never armed":                     {"--pid", "2147483646"},
		"containerd at /nonexistent/socket":              {"--container", "abc", "--containerd-address", "/nonexistent/socket"},
	} {
		code, _, errs := invoke(t, append([]string{"record", "--server-path", server, "-o", name}, args...)...)
		if code != exitFailed || !strings.Contains(errs, want) {
			t.Errorf("%v: status %d, stderr %s, want 1 and %s", args, code, errs, want)
		}
	}
	if _, err := os.Lstat(name); err == nil {
		t.Error("a list was written")
	}
}

// Attached to a container of a real containerd, by the beginning of its id.
func TestRecordContainer(t *testing.T) {
	const ref = "docker.io/library/hello:v1"
	e := critest.Start(t, testcri.Options{})
	critest.ImportStatic(t, e, ref, helloPackage, map[string][]byte{"/etc/greeting": []byte("from the image")})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	pod, err := e.RunPod(ctx, testcri.PodOptions{Name: "web-1", Namespace: "shop"})
	if err != nil {
		t.Fatal(err)
	}
	c, err := pod.Create(ctx, testcri.ContainerOptions{Image: ref, Name: "web", Args: []string{"sleep"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	server := testenv.Binary(t, "optimizer-server")
	name := filepath.Join(t.TempDir(), "list")
	attached := make(chan struct{})
	errs := &watched{want: "recording process", seen: func() { close(attached) }}
	stop, end := context.WithCancel(ctx)
	defer end()
	done := make(chan error, 1)
	go func() {
		done <- run(stop, []string{"record", "--container", c.ID[:20], "--containerd-address", e.Address(), "--server-path", server, "-o", name}, nil, &bytes.Buffer{}, errs)
	}()
	select {
	case <-attached:
	case err := <-done:
		t.Fatal(err)
	}
	if _, _, exit, err := c.Exec(ctx, "/hello", "/etc/greeting"); err != nil || exit != 0 {
		t.Fatalf("exec: %d, %v", exit, err)
	}
	end()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	l := readListFile(t, name)
	got := fmt.Sprintln(l.Container == c.ID, l.Reference, l.Name, l.Pod, l.Namespace, l.Command, strings.HasPrefix(l.Digest, "sha256:"), l.End)
	if want := "true " + ref + " web web-1 shop [/hello sleep] true stop\n"; got != want {
		t.Errorf("list says %s, want %s", got, want)
	}
	if len(l.Losses) != 1 || l.Losses[0].Reason != "late" {
		t.Errorf("losses %+v, want one that says that the start is missing", l.Losses)
	}
	if !slices.Contains(paths(l), "/etc/greeting") {
		t.Errorf("recorded %q, want /etc/greeting among them", paths(l))
	}
	// The list and the image in containerd make an optimized image.
	out := "oci:" + t.TempDir() + "/out:v6"
	code, _, text := invoke(t, "convert", "containerd:k8s.io/"+ref, out, "--containerd-address", e.Address(), "--profile", name)
	if code != 0 || !strings.Contains(text, "prefetch blob: ") || strings.Contains(text, "warning: the list was recorded of image") {
		t.Errorf("convert: %d, %s", code, text)
	}
	if code, _, errs := invoke(t, "check", out); code != 0 {
		t.Errorf("check: %s", errs)
	}
	// The tag is another image's by now: the container's list does not name that one.
	critest.ImportStatic(t, e, ref, helloPackage, map[string][]byte{"/etc/greeting": []byte("from another image")})
	code, _, text = invoke(t, "record", "--container", c.ID, "--containerd-address", e.Address(), "--server-path", server, "-o", name, "--timeout", "200ms")
	if l := readListFile(t, name); code != 0 || l.Reference != ref || l.Digest != "" || !strings.Contains(text, ref+" has other layers today than the container") {
		t.Errorf("another image: %d, list of %s %s, %s", code, l.Reference, l.Digest, text)
	}
	if code, _, errs := invoke(t, "record", "--container", "zzz", "--containerd-address", e.Address(), "--server-path", server, "-o", name); code != exitFailed || !strings.Contains(errs, "container zzz in namespace k8s.io: there is none") {
		t.Errorf("unknown container: %d, %s", code, errs)
	}
}
