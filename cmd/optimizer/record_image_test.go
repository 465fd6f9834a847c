package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	ggcrlayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// helloLayout writes an OCI layout with an image whose program prints the files it is told.
func helloLayout(t *testing.T, change func(*v1.Config)) string {
	t.Helper()
	testenv.Root(t)
	img, err := testcri.StaticImage(testenv.Command(t, helloPackage), map[string][]byte{
		"/etc/passwd": []byte("root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"),
		"/etc/group":  []byte("root:x:0:\napp:x:1000:\n"),
		"/etc/motd":   []byte("hi"), "/data/seed": []byte("from the image"), "/etc/untouched": []byte("x"),
	})
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	if change != nil {
		change(&config.Config)
	}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	l, err := ggcrlayout.Write(dir, empty.Index)
	if err == nil {
		err = l.AppendImage(img, ggcrlayout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "v1"}))
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// recordImage runs record with an image of helloLayout, and looks that nothing of it stays.
func recordImage(t *testing.T, layout string, args ...string) (code int, out, errs string) {
	t.Helper()
	scratch := t.TempDir()
	code, out, errs = invoke(t, append([]string{"record", "oci:" + layout + ":v1", "--scratch", scratch, "--server-path", testenv.Binary(t, "optimizer-server")}, args...)...)
	if left, err := filepath.Glob(filepath.Join(scratch, "root-*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
	return code, out, errs
}

func TestRecordImage(t *testing.T) {
	dir := helloLayout(t, func(c *v1.Config) {
		c.Entrypoint, c.Cmd = []string{"/hello"}, []string{"/etc/motd", "/data/seed"}
		c.User, c.WorkingDir, c.Volumes = "app", "/var/work", map[string]struct{}{"/data": {}}
	})
	store, name := t.TempDir(), filepath.Join(t.TempDir(), "list")
	code, out, errs := recordImage(t, dir, "-o", name)
	if code != 0 || out != "hi\nfrom the image\n" {
		t.Fatalf("status %d, stdout %q, stderr %s", code, out, errs)
	}
	l := readListFile(t, name)
	if l.Digest == "" || l.Platform != hostPlatform() || l.Reference != "oci:"+dir+":v1" || l.End != "exit" || !l.Complete() ||
		!slices.Equal(l.Command, []string{"/hello", "/etc/motd", "/data/seed"}) {
		t.Errorf("list of %s %s %s, %q, ended by %s, %v", l.Reference, l.Digest, l.Platform, l.Command, l.End, l.Losses)
	}
	t.Logf("engine %s, grade %s", l.Engine, l.Grade)
	if fs, err := tracefs.Open(); err == nil {
		defer fs.Close()
		if _, err := fs.Probe(0); err == nil && l.Grade == trace.GradeFile {
			t.Errorf("grade %s, want ranges: this kernel tells them", l.Grade)
		}
	}
	var run, runtime []string
	for _, a := range l.Accesses {
		if a.How == trace.Runtime {
			runtime = append(runtime, a.Path)
		} else {
			run = append(run, a.Path)
		}
	}
	slices.Sort(runtime)
	// What is read of a volume is read of its copy; the runtime read it when it made that.
	if want := []string{"/hello", "/etc/motd"}; !slices.Equal(run, want) {
		t.Errorf("the run read %q, want %q", run, want)
	}
	if want := []string{"/data/seed", "/etc/group", "/etc/passwd"}; !slices.Equal(runtime, want) {
		t.Errorf("the runtime read %q, want %q", runtime, want)
	}
	// The list and the image make an optimized one.
	target := "oci:" + t.TempDir() + ":fast"
	if code, _, errs := invoke(t, "convert", "oci:"+dir+":v1", target, "--profile", name); code != 0 || strings.Contains(errs, "warning") {
		t.Errorf("convert: status %d, %s", code, errs)
	}
	// Without a file it goes where the plugin keeps lists.
	if code, _, errs := recordImage(t, dir, "--persist-dir", store, "-q"); code != 0 {
		t.Errorf("status %d, %s", code, errs)
	}
	if lists, err := filepath.Glob(filepath.Join(store, "lists/*/*/*.list")); err != nil || len(lists) != 1 {
		t.Errorf("the store has %q, %v", lists, err)
	} else if kept := readListFile(t, lists[0]); kept.Digest != l.Digest || !slices.Equal(paths(kept), paths(l)) {
		t.Errorf("the store has %q of %s, want %q of %s", paths(kept), kept.Digest, paths(l), l.Digest)
	}
}

// TestRecordImageAsItSays looks from inside at what the image and the flags say.
func TestRecordImageAsItSays(t *testing.T) {
	shell := shellLayout(t)
	extra := t.TempDir()
	if err := os.WriteFile(filepath.Join(extra, "file"), []byte("mounted\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	const look = `id -u; id -g; id -G; pwd; echo $A $B $HOME; cat /mnt/file 2>/dev/null; echo x 2>/dev/null > /mnt/new || echo read-only; ` +
		`echo w > /data/new && cat /data/new; grep CapEff /proc/self/status; echo x 2>/dev/null > /proc/sys/kernel/hostname || echo shielded; ls /sys/class/net; stat -c %a:%U /data`
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"the image": {nil, "1000\n1000\n1000 1001\n/srv/app\nimage b /home/app\n"},
		"flags": {
			[]string{"--env", "A=mine", "--env", "HOME=/x", "--user", "0", "--workdir", "/etc", "--net", "none", "--mount", "type=bind,src=" + extra + ",dst=/mnt,ro"},
			"0\n0\n0\n/etc\nmine b /x\nmounted\nread-only\nw\nCapEff:\t00000000a80425fb\nshielded\nlo\n755:app\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errs := recordImage(t, shell, append(append([]string{"-o", filepath.Join(t.TempDir(), "list")}, tc.args...), "--", "-c", look)...)
			if code != 0 || !strings.HasPrefix(out, tc.want) || !strings.Contains(out, "755:app\n") {
				t.Errorf("status %d, stdout:\n%s\nwant:\n%s\nstderr %s", code, out, tc.want, errs)
			}
		})
	}
}

func TestRecordImageEnds(t *testing.T) {
	dir := helloLayout(t, nil)
	for name, tc := range map[string]struct {
		args []string
		code int
		end  string
		said string
	}{
		"line":    {[]string{"--until-log", "^rea.y$", "--", "sleep"}, 0, "ready", ""},
		"timeout": {[]string{"--timeout", "300ms", "--", "sleep"}, 0, "timeout", ""},
		"idle":    {[]string{"--idle", "300ms", "--", "sleep"}, 0, "idle", ""},
		"fails":   {[]string{"--", "/missing"}, 1, "exit", "the command ended with exit status 1; the list was written"},
	} {
		t.Run(name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "list")
			code, _, errs := recordImage(t, dir, append([]string{"-o", name}, tc.args...)...)
			if code != tc.code || !strings.Contains(errs, tc.said) {
				t.Fatalf("status %d, stderr %s", code, errs)
			}
			if l := readListFile(t, name); l.End != tc.end || !l.Complete() || !slices.Contains(paths(l), "/hello") {
				t.Errorf("ended by %s, %v, recorded %q", l.End, l.Losses, paths(l))
			}
		})
	}
}

func TestRecordImageInterrupt(t *testing.T) {
	dir := helloLayout(t, nil)
	name, scratch := filepath.Join(t.TempDir(), "list"), t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &watched{want: "ready", seen: cancel}
	err := run(ctx, []string{"record", "oci:" + dir, "--scratch", scratch, "--server-path", testenv.Binary(t, "optimizer-server"), "-o", name, "--", "sleep"}, nil, out, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if l := readListFile(t, name); l.End != "stop" || !slices.Contains(paths(l), "/hello") {
		t.Errorf("ended by %s, recorded %q", l.End, paths(l))
	}
	if left, err := filepath.Glob(filepath.Join(scratch, "root-*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

// TestRecordImageKilled kills the recorder: the workload ends with it, and the next recording removes what it
// had unpacked.
func TestRecordImageKilled(t *testing.T) {
	dir := helloLayout(t, nil)
	scratch := t.TempDir()
	args := []string{"record", "oci:" + dir, "--scratch", scratch, "--server-path", testenv.Binary(t, "optimizer-server"), "-o", filepath.Join(t.TempDir(), "list"), "--", "sleep"}
	cmd := exec.Command(testenv.Binary(t, "optimizer"), args...)
	ready := make(chan struct{})
	cmd.Stdout = &watched{want: "ready", seen: func() { close(ready) }}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ready:
	case <-time.After(30 * time.Second):
		t.Error("the workload did not start")
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("it was not killed")
	}
	left, err := filepath.Glob(filepath.Join(scratch, "root-*"))
	if err != nil || len(left) != 1 {
		t.Fatalf("a killed recorder left %q, %v, want one root", left, err)
	}
	// One that runs is left alone.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	second := make(chan error, 1)
	running := make(chan struct{})
	go func() {
		second <- run(ctx, args, nil, &watched{want: "ready", seen: func() { close(running) }}, io.Discard)
	}()
	<-running
	if code, _, errs := invoke(t, append(slices.Clone(args[:len(args)-1]), "word")...); code != 0 {
		t.Errorf("status %d, %s", code, errs)
	}
	now, err := filepath.Glob(filepath.Join(scratch, "root-*"))
	if err != nil || len(now) != 1 || now[0] == left[0] {
		t.Errorf("there is %q, %v, want that of the recording that goes on and not %q", now, err, left)
	}
	cancel()
	if err := <-second; err != nil {
		t.Error(err)
	}
}

func TestRecordImageErrors(t *testing.T) {
	dir := helloLayout(t, func(c *v1.Config) { c.Entrypoint = nil })
	name := filepath.Join(t.TempDir(), "list")
	server := testenv.Binary(t, "optimizer-server")
	for want, tc := range map[string]struct {
		args []string
		code int
	}{
		"it names no command; give one after --":                    {[]string{"oci:" + dir}, 1},
		"command nonsense: not found in the root's PATH":            {[]string{"oci:" + dir, "--", "nonsense"}, 1},
		`user "nobody-here": `:                                      {[]string{"oci:" + dir, "--user", "nobody-here", "--", "/hello"}, 1},
		"take /nonexistent to be mounted":                           {[]string{"oci:" + dir, "--mount", "type=bind,src=/nonexistent,dst=/mnt", "--", "/hello"}, 1},
		"oci:/nonexistent":                                          {[]string{"oci:/nonexistent", "--", "/hello"}, 1},
		"want -- before the command's arguments":                    {[]string{"oci:" + dir, "/hello"}, exitUsage},
		"got type \"tmpfs\", want bind":                             {[]string{"oci:" + dir, "--mount", "type=tmpfs,dst=/x", "--", "/hello"}, exitUsage},
		"--net: got \"bridge\", want host or none":                  {[]string{"oci:" + dir, "--net", "bridge", "--", "/hello"}, exitUsage},
		"--until-log: error parsing regexp":                         {[]string{"oci:" + dir, "--until-log", "(", "--", "/hello"}, exitUsage},
		"--platform goes with an image":                             {[]string{"--root", "/", "--platform", "linux/arm64", "--", "/hello"}, exitUsage},
		"--until-log: nobody knows where a process with --pid logs": {[]string{"--pid", "1", "--until-log", "x"}, exitUsage},
		"linux/s390x": {[]string{"oci:" + dir, "--platform", "linux/s390x", "--", "/hello"}, 1},
	} {
		scratch := t.TempDir()
		args := append([]string{"record", "--server-path", server, "-o", name}, tc.args...)
		if strings.HasPrefix(tc.args[0], "oci:") {
			args = append([]string{"record", "--scratch", scratch}, args[1:]...)
		}
		code, _, errs := invoke(t, args...)
		if code != tc.code || !strings.Contains(errs, want) {
			t.Errorf("%v: status %d, stderr %s, want %d and %s", tc.args, code, errs, tc.code, want)
		}
		if left, err := filepath.Glob(filepath.Join(scratch, "root-*")); err != nil || len(left) != 0 {
			t.Errorf("%v: left behind %q, %v", tc.args, left, err)
		}
	}
	if _, err := os.Lstat(name); err == nil {
		t.Error("a list was written")
	}
}

// TestRecordImageNeedsRoot runs the program as somebody else.
func TestRecordImageNeedsRoot(t *testing.T) {
	dir := helloLayout(t, nil)
	program, server := testenv.Binary(t, "optimizer"), testenv.Binary(t, "optimizer-server")
	copied := filepath.Join(t.TempDir(), "optimizer")
	data, err := os.ReadFile(program)
	if err == nil {
		err = os.WriteFile(copied, data, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(testenv.Tool(t, "setpriv"), "--reuid", "65534", "--clear-groups", "/proc/self/fd/3", "record", "oci:"+dir, "-o", "-", "--server-path", server)
	f, err := os.Open(copied)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd.ExtraFiles = []*os.File{f}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	err = cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(errs.String(), "it takes root, runs as user 65534") {
		t.Errorf("%v: %s", err, errs.String())
	}
}

// shellLayout is an image of the host's shell and some tools, in three layers: the second hides a file and
// replaces a directory of the first, the third has a file of each of three names.
func shellLayout(t *testing.T, more ...map[string]string) string {
	t.Helper()
	testenv.Root(t)
	first := map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n", "etc/group": "root:x:0:\napp:x:1000:\nmore:x:1001:app\n",
		"hidden": "1", "dir/old": "1", "kept": "1", "data/seed": "1",
	}
	for _, tool := range []string{"sh", "id", "cat", "grep", "ls", "stat"} {
		at, err := exec.LookPath(tool)
		if err != nil {
			t.Fatal(err) // POSIX has them
		}
		out, err := exec.Command("ldd", at).Output()
		if err != nil {
			t.Fatalf("ldd %s: %v", at, err)
		}
		files := map[string]string{at: "bin/" + tool}
		for f := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(f, "/") {
				files[f] = f[1:]
			}
		}
		for from, to := range files {
			b, err := os.ReadFile(from)
			if err != nil {
				t.Fatal(err)
			}
			first[to] = string(b)
		}
	}
	layers := []map[string]string{first, {".wh.hidden": "", "dir/.wh..wh..opq": "", "dir/new": "2"}, {"kept": "3"}}
	layers = append(layers, more...)
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, files := range layers {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layerTar(t, files))), nil })
		if err == nil {
			img, err = mutate.AppendLayers(img, l)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", goruntime.GOARCH
	config.Config = v1.Config{
		Entrypoint: []string{"sh"}, User: "app", WorkingDir: "/srv/app", Volumes: map[string]struct{}{"/data": {}},
		Env: []string{"PATH=/bin", "A=image", "B=b"},
	}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	l, err := ggcrlayout.Write(dir, empty.Index)
	if err == nil {
		err = l.AppendImage(img, ggcrlayout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "v1"}))
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func layerTar(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: int64(len(files[name]))}
		if strings.HasPrefix(name, "data/") {
			h.Uid, h.Gid = 1000, 1000
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "data/", Mode: 0o755, Uid: 1000, Gid: 1000}); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestRecordImageManyLayers has more layers than a page of mount options names.
func TestRecordImageManyLayers(t *testing.T) {
	var more []map[string]string
	for i := range 124 { // 127 in all, which is what docker allows
		more = append(more, map[string]string{fmt.Sprintf("many/%d", i): fmt.Sprint(i), "many/last": fmt.Sprint(i)})
	}
	dir := shellLayout(t, more...)
	name := filepath.Join(t.TempDir(), "list")
	code, out, errs := recordImage(t, dir, "-q", "-o", name, "--", "-c", "cat /many/0 /many/last /kept")
	if want := "01233"; code != 0 || out != want {
		t.Errorf("status %d, stdout %q, want %q; stderr %s", code, out, want, errs)
	}
	l := readListFile(t, name)
	for _, path := range []string{"/many/0", "/many/last", "/kept", "/bin/cat"} {
		if !slices.Contains(paths(l), path) {
			t.Errorf("recorded %q, want %s among them", paths(l), path)
		}
	}
	t.Logf("engine %s, grade %s, losses %v", l.Engine, l.Grade, l.Losses)
	if !l.Complete() {
		t.Errorf("losses %v", l.Losses)
	}
}

// TestRecordImageLayers has whiteouts and files of several layers.
func TestRecordImageLayers(t *testing.T) {
	dir := shellLayout(t)
	name := filepath.Join(t.TempDir(), "list")
	code, out, errs := recordImage(t, dir, "-o", name, "--", "-c", "ls /hidden 2>/dev/null; ls /dir; cat /kept; ls /data; echo gone > /kept 2>/dev/null || echo no")
	if want := "new\n3seed\nno\n"; code != 0 || out != want {
		t.Errorf("status %d, stdout %q, want %q; stderr %s", code, out, want, errs)
	}
	if l := readListFile(t, name); !slices.Contains(paths(l), "/kept") || !slices.Contains(paths(l), "/bin/cat") || !l.Complete() {
		t.Errorf("recorded %q, %v", paths(l), l.Losses)
	}
}
