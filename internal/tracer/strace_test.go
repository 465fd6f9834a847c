package tracer_test

import (
	"debug/elf"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// TestAgainstStrace runs commands twice, under the tracer and under strace, each in a
// fresh box, and compares: every regular file of the image that was opened is listed,
// none that was not, and those that were read say so.
func TestAgainstStrace(t *testing.T) {
	needKernel(t)
	strace := testenv.Tool(t, "strace")
	commands := map[string][]string{
		"python": {"python3", "-c", "import json, email.message, http.client, sqlite3, ctypes; print('done')"},
		"shell":  {"bash", "-c", "ls -laR /etc/apt; grep -r x /etc/apt; sort /etc/passwd | uniq -c; find /usr/share/doc -maxdepth 1 | head; awk '{print $1}' /etc/group"},
		"static": {"/program", "read", "/etc/fstab"},
		"perl":   {"perl", "-e", "use strict; use POSIX; use File::Find; find(sub {}, '/etc/default'); system('cat', '/etc/fstab');"},
	}
	setup := "mkdir -p etc; cp " + workload(t) + " program; echo none > etc/fstab"
	for name, argv := range commands {
		for _, mode := range []string{pivotProc, chroot} {
			t.Run(name+" "+mode, func(t *testing.T) {
				got := make(map[string]trace.How)
				r := newBox(t, setup).record(t, mode, argv...)
				for _, a := range r.Trace.Accesses {
					got[a.Path] = a.How
				}
				want := newBox(t, setup).strace(t, strace, mode, argv...)
				compare(t, got, want)
			})
		}
	}
}

func compare(t *testing.T, got, want map[string]trace.How) {
	t.Helper()
	if len(want) < 2 && len(got) < 1 {
		t.Fatalf("strace saw %d files, the tracer %d", len(want), len(got))
	}
	for p, how := range want {
		switch have := got[p]; {
		case have&how != how:
			t.Errorf("%s: tracer says %s, strace %s", p, howString(have), howString(how))
		case have&trace.Executed != 0:
			// The kernel reads the start of what it executes; strace does not see it.
		case have != how:
			t.Errorf("%s: tracer says %s, strace only %s", p, howString(have), howString(how))
		}
	}
	if diff := cmp.Diff(keys(want), keys(got)); diff != "" {
		t.Errorf("files (-strace +tracer):\n%s", diff)
	}
	t.Logf("%d files", len(got))
}

func keys(m map[string]trace.How) map[string]bool {
	k := make(map[string]bool, len(m))
	for p := range m {
		k[p] = true
	}
	return k
}

var (
	// openat(AT_FDCWD</>, "/lib/x", O_RDONLY) = 3</usr/lib/x>
	straceOpen = regexp.MustCompile(`^(?:open|openat|openat2|creat)\(.* = \d+<(/[^<>]*)>$`)
	// read(3</usr/lib/x>, ..., 832) = 832; copies name the source first, or second for sendfile
	straceRead = regexp.MustCompile(`^(?:read|pread64|readv|preadv|preadv2|copy_file_range|splice)\(\d+<(/[^<>]*)>.* = ([1-9]\d*)$`)
	straceSend = regexp.MustCompile(`^sendfile\(\d+<[^<>]*>, \d+<(/[^<>]*)>.* = ([1-9]\d*)$`)
	// execve("/usr/bin/ls", ...) = 0
	straceExec = regexp.MustCompile(`^execve(?:at)?\("([^"]*)", .* = 0$`)
)

// strace runs a command in the box under strace and returns the regular files of the
// image that it touched.
func (b *box) strace(t *testing.T, strace, mode string, argv ...string) map[string]trace.How {
	t.Helper()
	dir := t.TempDir()
	// The test binary changes the root, then executes the command; what comes before
	// that is not looked at. It leaves the mount namespace alone: strace needs its files.
	args := append([]string{
		"-ff", "-y", "-qq", "-s0", "-o", dir + "/log", "-e", "signal=none", "-e",
		"trace=execve,execveat,open,openat,openat2,creat,read,pread64,readv,preadv,preadv2,sendfile,copy_file_range,splice", self(t),
	}, argv...)
	cmd := exec.Command(strace, args...)
	cmd.Env = append(os.Environ(), envRole+"=unshare+"+mode, envRoot+"="+b.merged)
	// Descriptors 3 and 4: may go at once, and where to say that it stands by.
	goR, goW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(goW, "x"); err != nil {
		t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{goR, goW}
	out, err := cmd.CombinedOutput()
	if err := goW.Close(); err != nil {
		t.Error(err)
	}
	_ = goR.Close()
	if err != nil {
		t.Fatalf("strace: %v\n%s", err, out)
	}
	logs, err := filepath.Glob(dir + "/log.*")
	if err != nil {
		t.Fatal(err)
	}
	touched := make(map[string]trace.How)
	for _, log := range logs {
		text, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		b.straceLog(t, string(text), touched)
	}
	return touched
}

func (b *box) straceLog(t *testing.T, log string, touched map[string]trace.How) {
	t.Helper()
	if _, rest, ok := strings.Cut(log, "execve(\""+self(t)+"\""); ok {
		// The log of the first process starts before the command does.
		at := strings.Index(rest, "execve(\"")
		if at < 0 {
			return // a thread of the test binary
		}
		log = rest[at:]
	}
	add := func(p string, how trace.How) {
		if p, ok := strings.CutPrefix(p, b.merged); ok {
			b.touch(touched, p, how)
			return
		}
		b.touch(touched, p, how)
	}
	for line := range strings.Lines(log) {
		line = strings.TrimSuffix(line, "\n")
		if m := straceExec.FindStringSubmatch(line); m != nil {
			b.executed(t, m[1], add)
		} else if m := straceOpen.FindStringSubmatch(line); m != nil {
			if !strings.Contains(line, "O_PATH") {
				add(m[1], trace.Opened)
			}
		} else if m := straceRead.FindStringSubmatch(line); m != nil {
			add(m[1], trace.Read)
		} else if m := straceSend.FindStringSubmatch(line); m != nil {
			add(m[1], trace.Read)
		}
	}
}

// touch notes a path if it is a regular file of the image.
func (b *box) touch(touched map[string]trace.How, p string, how trace.How) {
	for _, layer := range []string{b.lower, "/"} {
		if st, err := stat(layer, p); err == nil {
			merged, err := stat(b.merged, p)
			if err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && merged.Mode&unix.S_IFMT == unix.S_IFREG {
				touched[p] |= how
			}
			return
		}
	}
}

// executed notes an executed file and its interpreters.
func (b *box) executed(t *testing.T, p string, add func(string, trace.How)) {
	t.Helper()
	for range 4 {
		real := b.resolve(t, p)
		add(real, trace.Opened|trace.Executed)
		f, err := os.Open(b.merged + real)
		if err != nil {
			t.Fatal(err)
		}
		p = interpreter(f)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if p == "" {
			return
		}
	}
}

// interpreter returns what has to be executed to execute f.
func interpreter(f *os.File) string {
	head := make([]byte, 256)
	n, _ := f.ReadAt(head, 0)
	if line, ok := strings.CutPrefix(string(head[:n]), "#!"); ok {
		return strings.Fields(line)[0]
	}
	e, err := elf.NewFile(f)
	if err != nil {
		return ""
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP {
			b, err := io.ReadAll(p.Open())
			if err == nil {
				return strings.TrimRight(string(b), "\x00")
			}
		}
	}
	return ""
}

// resolve follows the symbolic links of p inside the box.
func (b *box) resolve(t *testing.T, p string) string {
	t.Helper()
	dir, err := unix.Open(b.merged, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Openat2(dir, p, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		t.Fatalf("resolve %s: %v", p, err)
	}
	real, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		t.Fatal(err)
	}
	_, _ = unix.Close(fd), unix.Close(dir)
	return strings.TrimPrefix(real, b.merged)
}
