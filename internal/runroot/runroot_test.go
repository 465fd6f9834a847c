package runroot_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/runroot"
	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) {
	if runroot.IsChild() {
		if err := stays(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(126)
		}
		os.Exit(runroot.Child())
	}
	testenv.Main(m)
}

// stays gives the runtime every reason to go on with this goroutine on another thread, and says whether it did: a program that another thread
// than the first becomes is recorded in part.
func stays() error {
	for range 100 {
		woken := make(chan struct{})
		go func() {
			for began := time.Now(); time.Since(began) < 100*time.Microsecond; {
				runtime.Gosched()
			}
			close(woken)
		}()
		<-woken
		if unix.Gettid() != os.Getpid() {
			return fmt.Errorf("the held process goes on in thread %d of %d", unix.Gettid(), os.Getpid())
		}
	}
	return nil
}

// makeRoot returns a directory with a shell and cat, and the libraries they need.
func makeRoot(t *testing.T) string {
	t.Helper()
	testenv.Root(t)
	root := t.TempDir()
	for _, name := range []string{"sh", "cat"} {
		at, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err) // POSIX has them: no system that runs make is without
		}
		copyProgram(t, root, at)
	}
	for _, d := range []string{"etc", "proc", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// copyProgram copies a program to root/bin and the libraries it names to where they are.
func copyProgram(t *testing.T, root, at string) {
	t.Helper()
	out, err := exec.Command("ldd", at).Output()
	if err != nil {
		t.Fatalf("ldd %s: %v", at, err)
	}
	files := map[string]string{at: "/bin/" + filepath.Base(at)}
	for f := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(f, "/") {
			files[f] = f
		}
	}
	for from, to := range files {
		b, err := os.ReadFile(from)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(filepath.Join(root, to)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(root, to), b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func runAll(t *testing.T, o runroot.Options) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	o.Stdout, o.Stderr = &out, &errs
	p, err := runroot.Start(t.Context(), o)
	if err != nil {
		return "", "", err
	}
	if err := p.Release(); err != nil {
		t.Fatal(err)
	}
	err = p.Wait()
	return out.String(), errs.String(), err
}

func TestRun(t *testing.T) {
	root := makeRoot(t)
	scratch := t.TempDir()
	t.Setenv("TMPDIR", scratch)
	out, errs, err := runAll(t, runroot.Options{
		Root: root, Args: []string{"sh", "-c", `echo $$ $PWD $A; cat; echo x > /new; test -e /proc/1/exe && echo proc; echo y > /dev/null && echo dev; read -r u < /proc/self/loginuid; exit 3`},
		Env: []string{"A=b c"}, Dir: "/tmp", Stdin: strings.NewReader("input\n"),
	})
	exit, ok := errors.AsType[*exec.ExitError](err)
	if want := "1 /tmp b c\ninput\nproc\ndev\n"; out != want || !ok || exit.ExitCode() != 3 {
		t.Errorf("got %q, %q, %v, want %q and status 3", out, errs, err, want)
	}
	if _, err := os.Lstat(filepath.Join(root, "new")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was written stayed: %v", err)
	}
	if left, err := os.ReadDir(scratch); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// The directory that the overlay is made in is gone before the command runs, so nothing of it
// stays when the process that started the command is killed.
func TestNothingToLeaveBehind(t *testing.T) {
	root := makeRoot(t)
	scratch := t.TempDir()
	t.Setenv("TMPDIR", scratch)
	p, err := runroot.Start(t.Context(), runroot.Options{Root: root, Args: []string{"sh", "-c", "echo x > /new; cat /new > /dev/null"}})
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(scratch); err != nil || len(left) != 0 {
		t.Errorf("beside the held process: %v, %v, want nothing", left, err)
	}
	if err := errors.Join(p.Release(), p.Wait()); err != nil {
		t.Error(err)
	}
}

// Without CAP_SYS_ADMIN the error says what is missing.
func TestNoPrivilege(t *testing.T) {
	const inside = "RUNROOT_TEST_NO_PRIVILEGE"
	if os.Getenv(inside) != "" {
		_, err := runroot.Start(t.Context(), runroot.Options{Root: "/", Args: []string{"true"}})
		t.Fatalf("error: %v", err)
	}
	testenv.Root(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(testenv.Tool(t, "setpriv"), "--bounding-set", "-sys_admin", self, "-test.run", "^TestNoPrivilege$")
	cmd.Env = append(os.Environ(), inside+"=1")
	out, err := cmd.CombinedOutput()
	if want := "need root, with CAP_SYS_ADMIN: "; err == nil || !strings.Contains(string(out), want) {
		t.Errorf("got %v, %s, want an error with %q", err, out, want)
	}
}

func TestInPlace(t *testing.T) {
	root := makeRoot(t)
	if _, errs, err := runAll(t, runroot.Options{Root: root, InPlace: true, Args: []string{"/bin/sh", "-c", "echo x > /new"}}); err != nil {
		t.Fatalf("%v: %s", err, errs)
	}
	if b, err := os.ReadFile(filepath.Join(root, "new")); err != nil || string(b) != "x\n" {
		t.Errorf("/new holds %q, %v", b, err)
	}
	// What the root had no place for was not made.
	if _, err := os.Lstat(filepath.Join(root, "dev")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("/dev: %v", err)
	}
}

// A volume has what the image holds there, and nothing of what is mounted for the command.
func TestVolumes(t *testing.T) {
	layer := makeRoot(t)
	for name, text := range map[string]string{"data/seed": "image's", "sys/class/mine": "image's too", "etc/resolv.conf": "nothing"} {
		at := filepath.Join(layer, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.WriteFile(at, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{"link": "/data", "class": "/sys/class", "kernel": "../../sys/kernel", "proc-link": "proc", "net": "/proc/self/net"} {
		if err := os.Symlink(to, filepath.Join(layer, name)); err != nil {
			t.Fatal(err)
		}
	}
	const list = `cd "$0" && echo * && for f in *; do test ! -f "$f" || cat "$f"; done`
	for volume, want := range map[string]string{
		"/data": "seed\nimage's", "/link": "seed\nimage's", "/class": "mine\nimage's too", "/sys/class": "mine\nimage's too",
		"/kernel": "*\n", "/dev/shm": "*\n", "/new/dir": "*\n",
	} {
		o := runroot.Options{Layers: []string{layer}, Scratch: t.TempDir(), Volumes: []string{volume}, Args: []string{"sh", "-c", list, volume}}
		if out, errs, err := runAll(t, o); err != nil || out != want {
			t.Errorf("%s: %v, %q, %s, want %q", volume, err, out, errs, want)
		}
	}
	for volume, want := range map[string]string{"/proc-link": "leads to /proc,", "/net": "leads to /proc/"} {
		o := runroot.Options{Layers: []string{layer}, Scratch: t.TempDir(), Volumes: []string{volume}, Args: []string{"sh", "-c", list, volume}}
		if out, _, err := runAll(t, o); err == nil || !strings.Contains(err.Error(), "volume "+volume+": it "+want) {
			t.Errorf("%s: %v, %q, want an error", volume, err, out)
		}
		if left, err := os.ReadDir(o.VolumeDir(0)); err != nil || len(left) != 0 {
			t.Errorf("%s: copied %d files, %v", volume, len(left), err)
		}
	}
	// The host's name resolution is part of a volume above it.
	o := runroot.Options{Layers: []string{layer}, Scratch: t.TempDir(), Volumes: []string{"/etc"}, Args: []string{"cat", "/etc/resolv.conf"}}
	host, err := os.ReadFile("/etc/resolv.conf")
	if errors.Is(err, os.ErrNotExist) {
		host = []byte("nothing")
	} else if err != nil {
		t.Fatal(err)
	}
	if out, errs, err := runAll(t, o); err != nil || out != string(host) {
		t.Errorf("resolv.conf: %v, %q, %s, want the host's", err, out, errs)
	}
}

func TestUser(t *testing.T) {
	root := makeRoot(t)
	out, errs, err := runAll(t, runroot.Options{Root: root, UID: 1234, GID: 567, Args: []string{"sh", "-c", `while read -r k v; do case $k in Uid:|Gid:|Groups:) echo $k $v;; esac; done < /proc/self/status; echo x > /new`}})
	if want := "Uid: 1234 1234 1234 1234\nGid: 567 567 567 567\nGroups:\n"; out != want || err == nil || !strings.Contains(errs, "/new") {
		t.Errorf("got %q, %q, %v, want %q and a refusal to write", out, errs, err, want)
	}
}

// Odd characters in the path of the root, which overlay's options give a meaning to.
func TestOddPath(t *testing.T) {
	root := makeRoot(t)
	odd := filepath.Join(t.TempDir(), `a:b,c\d e`)
	if err := os.Rename(root, odd); err != nil {
		t.Fatal(err)
	}
	if out, errs, err := runAll(t, runroot.Options{Root: odd, Args: []string{"sh", "-c", "echo ok"}}); out != "ok\n" || err != nil {
		t.Errorf("got %q, %q, %v", out, errs, err)
	}
}

// Links in the root that lead out of it are not followed when it is furnished.
func TestLinksOut(t *testing.T) {
	root := makeRoot(t)
	outside := t.TempDir()
	for _, name := range []string{"proc", "dev", "sys", "etc"} {
		if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(outside, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if out, errs, err := runAll(t, runroot.Options{Root: root, Args: []string{"sh", "-c", "echo ok"}}); out != "ok\n" || err != nil {
		t.Errorf("got %q, %q, %v", out, errs, err)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) != 0 {
		t.Errorf("outside: %v, %v", left, err)
	}
}

// A held process runs nothing until it is released, and nothing at all when it never is.
func TestHeld(t *testing.T) {
	root := makeRoot(t)
	p, err := runroot.Start(t.Context(), runroot.Options{Root: root, InPlace: true, Args: []string{"sh", "-c", "echo x > /ran"}})
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.PID()))
	self, serr := os.Executable()
	if err != nil || serr != nil || filepath.Base(exe) != filepath.Base(self) {
		t.Errorf("the held process is %s, %v, want %s", exe, err, self)
	}
	if r, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", p.PID())); err != nil || r == "" {
		t.Errorf("cwd %q, %v", r, err)
	}
	p.End(5 * time.Second)
	if err := p.Wait(); err == nil {
		t.Error("Wait after End of a held process: no error")
	}
	if _, err := os.Lstat(filepath.Join(root, "ran")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the command ran: %v", err)
	}
}

// A command that does not listen is killed, and what it started with it.
func TestEnd(t *testing.T) {
	root := makeRoot(t)
	var out bytes.Buffer
	p, err := runroot.Start(t.Context(), runroot.Options{Root: root, Args: []string{"sh", "-c", "(while :; do read x < /dev/zero; done) & trap '' TERM; wait; wait"}, Stdout: &out})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Release(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	p.End(100 * time.Millisecond)
	if exit, ok := errors.AsType[*exec.ExitError](p.Wait()); !ok || exit.ExitCode() != -1 {
		t.Errorf("Wait = %v, want killed", p.Wait())
	}
}

func TestErrors(t *testing.T) {
	root := makeRoot(t)
	for want, o := range map[string]runroot.Options{
		"no command":                         {Root: root},
		"no such file or directory":          {Root: root + "/missing", Args: []string{"sh"}},
		"is no directory":                    {Root: root + "/bin/sh", Args: []string{"sh"}},
		"nonsense: not found in the root":    {Root: root, Args: []string{"nonsense"}},
		"/bin/nonsense: no such file":        {Root: root, Args: []string{"/bin/nonsense"}},
		"/etc: not executable":               {Root: root, Args: []string{"/etc"}},
		"working directory /missing: no suc": {Root: root, Args: []string{"sh"}, Dir: "/missing"},
		`"rel" is not absolute`:              {Root: root, Args: []string{"sh"}, Dir: "rel"},
	} {
		if _, _, err := runAll(t, o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %s", err, want)
		}
	}
}
