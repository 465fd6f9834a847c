package e2e_test

import (
	"bufio"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// straceCalls are the system calls that decide what was touched and how, and which bytes.
const straceCalls = "trace=open,openat,openat2,creat,execve,execveat,chroot,read,pread64,readv,preadv,preadv2,sendfile,copy_file_range,splice," +
	"mmap,lseek,close,dup,dup2,dup3,fcntl,fork,vfork,clone,clone3"

// touched is what strace says of each path that was opened below a root, with the
// root's path removed; whatever the command did before it changed its root is left out.
type touched map[string]trace.How

// straceLog turns the output of `strace -f -y -s 0` into what was touched below root.
// Paths behind descriptors come from the kernel, so symbolic links are resolved; exec
// arguments are resolved in root, and the interpreters that the kernel opens are added.
func straceLog(r io.Reader, root string) (*straced, error) {
	calls, err := straceCallsOf(r)
	if err != nil {
		return nil, err
	}
	got := newStraced()
	for _, c := range calls {
		got.born(c.pid, c.name, c.args, c.result)
	}
	inside := false
	for _, c := range calls {
		if c.name == "chroot" {
			inside = inside || strings.HasPrefix(c.result, "0")
			continue
		}
		if !inside {
			continue
		}
		if err := errors.Join(got.call(c.name, c.args, c.result, root), got.position(c.pid, c.name, c.args, c.result, root)); err != nil {
			return nil, fmt.Errorf("strace of %s: %s(%s) = %s: %w", c.pid, c.name, c.args, c.result, err)
		}
	}
	return got, nil
}

// straceCall is one call that ended.
type straceCall struct{ pid, name, args, result string }

// straceCallsOf returns the calls of a log in the order in which they ended.
func straceCallsOf(r io.Reader) (calls []straceCall, err error) {
	pending := map[string]string{} // call of a process that was cut by another's
	scan := bufio.NewScanner(r)
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		pid, call, ok := strings.Cut(scan.Text(), " ")
		if !ok {
			continue
		}
		call = strings.TrimLeft(call, " ")
		if cut, ok := strings.CutSuffix(call, "<unfinished ...>"); ok {
			pending[pid] = cut
			continue
		}
		if m := resumed.FindStringSubmatch(call); m != nil {
			call = pending[pid] + m[1]
			delete(pending, pid)
		}
		m := finished.FindStringSubmatch(call)
		if m == nil {
			continue
		}
		calls = append(calls, straceCall{pid: pid, name: m[1], args: m[2], result: m[3]})
	}
	return calls, scan.Err()
}

var (
	resumed  = regexp.MustCompile(`^<\.\.\. \w+ resumed>(.*)$`)
	finished = regexp.MustCompile(`^(\w+)\((.*)\)\s+= (.*)$`)
	fdPath   = regexp.MustCompile(`^-?\w+<((?:[^<>\\]|\\.)*)>`)
	quoted   = regexp.MustCompile(`"((?:[^"\\]|\\.)*)"`)
)

// call adds what one finished call did.
func (g touched) call(name, args, result, root string) error {
	switch name {
	case "open", "openat", "openat2", "creat":
		if strings.Contains(args, "O_PATH") || strings.HasPrefix(result, "-1") {
			return nil // a path descriptor raises no open
		}
		if path, ok := below(root, fdPath.FindStringSubmatch(result)); ok {
			g[path] |= trace.Opened
		}
	case "execve", "execveat":
		if !strings.HasPrefix(result, "0") {
			return nil
		}
		m := quoted.FindStringSubmatch(args)
		if m == nil {
			return errors.New("no path")
		}
		return g.exec(root, unescape(m[1]), 0)
	case "read", "pread64", "readv", "preadv", "preadv2", "sendfile", "copy_file_range", "splice":
		// The source is the first descriptor but for sendfile.
		if result == "" || result[0] < '1' || result[0] > '9' {
			return nil // an error, "?" of a process that was killed, or the end of the file
		}
		if name == "sendfile" {
			_, args, _ = strings.Cut(args, ", ")
		}
		if path, ok := below(root, fdPath.FindStringSubmatch(args)); ok {
			g[path] |= trace.Read
		}
	}
	return nil
}

// exec adds a program and the interpreters that the kernel opens for it.
func (g touched) exec(root, name string, depth int) error {
	path, err := resolveIn(root, name)
	if err != nil {
		return err
	}
	g[path] |= trace.Opened | trace.Read | trace.Executed
	if depth > 4 {
		return errors.New("interpreters nest too deep")
	}
	head := make([]byte, 256)
	f, err := os.Open(filepath.Join(root, path))
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	if line, ok := bytes.CutPrefix(head[:n], []byte("#!")); ok {
		line, _, _ = bytes.Cut(line, []byte("\n"))
		return g.exec(root, strings.Fields(string(line))[0], depth+1)
	}
	bin, err := elf.NewFile(f)
	if err != nil {
		return err
	}
	for _, p := range bin.Progs {
		if p.Type == elf.PT_INTERP {
			interp, err := io.ReadAll(p.Open())
			if err != nil {
				return err
			}
			path, err := resolveIn(root, strings.TrimRight(string(interp), "\x00"))
			if err != nil {
				return err
			}
			g[path] |= trace.Opened | trace.Read | trace.Executed
		}
	}
	return nil
}

// below returns the path of a descriptor inside root.
func below(root string, m []string) (string, bool) {
	if m == nil {
		return "", false
	}
	path := unescape(m[1])
	if strings.HasSuffix(path, " (deleted)") || strings.HasSuffix(path, "(deleted)") {
		return "", false
	}
	rest, ok := strings.CutPrefix(path, root+"/")
	return "/" + rest, ok
}

// unescape undoes strace's C escapes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b []byte
	for s != "" {
		if s[0] != '\\' || len(s) < 2 {
			b = append(b, s[0])
			s = s[1:]
			continue
		}
		n := 1
		for n < len(s) && n < 4 && s[n] >= '0' && s[n] <= '7' {
			n++
		}
		if n > 1 {
			v, _ := strconv.ParseUint(s[1:n], 8, 8)
			b = append(b, byte(v))
		} else {
			n = 2
			b = append(b, strings.NewReplacer("n", "\n", "t", "\t", "r", "\r", "v", "\v", "f", "\f").Replace(s[1:2])...)
		}
		s = s[n:]
	}
	return string(b)
}

// resolveIn returns the path that name means for a process whose root is root.
func resolveIn(root, name string) (string, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer func() { _ = unix.Close(dir) }()
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return "", fmt.Errorf("resolve %s in %s: %w", name, root, err)
	}
	defer func() { _ = unix.Close(fd) }()
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", err
	}
	return strings.TrimPrefix(path, root), nil
}

func TestStraceLog(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	for name, data := range map[string]string{"script": "#!/interp -x\n", "interp": "#!/last"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(data), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var exe bytes.Buffer // a static program: no interpreter
	ident := [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)}
	must(t, binary.Write(&exe, binary.LittleEndian, elf.Header64{
		Ident: ident, Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT), Ehsize: 64, Phentsize: 56, Shentsize: 64,
	}))
	must(t, os.WriteFile(filepath.Join(root, "last"), exe.Bytes(), 0o755))
	if err := os.Symlink("/script", filepath.Join(root, "run")); err != nil {
		t.Fatal(err)
	}
	log := strings.ReplaceAll(`1 execve("/usr/sbin/chroot", [""...], 0x1 /* 1 var */) = 0
1 openat(AT_FDCWD</>, "/etc/early", O_RDONLY) = 3<ROOT/early>
1 chroot("ROOT")   = 0
1 execve("/missing", [""...], 0x1 /* 1 var */) = -1 ENOENT (No such file or directory)
1 execve("/run", [""...], 0x1 /* 1 var */) = 0
1 openat(AT_FDCWD</>, "/a", O_RDONLY <unfinished ...>
2 openat(AT_FDCWD</>, "/sp ace\n", O_RDONLY) = 4<ROOT/sp ace\n>
1 <... openat resumed>)             = 3<ROOT/a>
2 read(4<ROOT/sp ace\n>, ""..., 832) = 832
1 read(3<ROOT/a>,  <unfinished ...>
2 openat(AT_FDCWD</>, "/p", O_RDONLY|O_PATH) = 5<ROOT/path>
1 <... read resumed>"", 10) = 0
2 openat(AT_FDCWD</>, "/host", O_RDONLY) = 5</host>
2 openat(AT_FDCWD</>, "/b\303\251", O_RDONLY) = 6<ROOT/b\303\251>
2 sendfile(7<socket:[1]>, 6<ROOT/b\303\251>, [0] => [9], 9) = 9
2 openat(AT_FDCWD</>, "/gone", O_RDONLY) = 8<ROOT/gone (deleted)>
2 +++ exited with 0 +++
`, "ROOT", root)
	got, err := straceLog(strings.NewReader(log), root)
	if err != nil {
		t.Fatal(err)
	}
	const all = trace.Opened | trace.Read | trace.Executed
	want := touched{
		"/script": all, "/interp": all, "/last": all,
		"/a": trace.Opened, "/sp ace\n": trace.Opened | trace.Read, "/bé": trace.Opened | trace.Read,
	}
	if fmt.Sprint(got.touched) != fmt.Sprint(want) {
		t.Errorf("straceLog = %v, want %v", got.touched, want)
	}
}
