package lazy_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// walkerVariable tells this program, started again, to read a tree: its value is a walk as JSON.
const walkerVariable = "HEADSTART_LAZY_WALK"

// walk is what a walker does.
type walk struct {
	Root string
	Seed uint64 // of the order of files and of the ways to read them
	Part int    // 1 of so many files is read
	Ways []string
}

// ways are all ways to read a file.
var ways = []string{"read", "backwards", "mmap", "sendfile", "splice"}

// walker is the main function of a walker: it writes the digests of files by path as JSON.
func walker() int {
	var w walk
	err := json.Unmarshal([]byte(os.Getenv(walkerVariable)), &w)
	if err == nil {
		var sums map[string]string
		if sums, err = w.do(); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(sums)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (w walk) do() (map[string]string, error) {
	var names []string
	err := filepath.WalkDir(w.Root, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			names = append(names, p)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	order := rand.New(rand.NewPCG(w.Seed, 1))
	order.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	names = names[:(len(names)+w.Part-1)/w.Part]
	sums := make(map[string]string, len(names))
	for _, name := range names {
		way := w.Ways[order.IntN(len(w.Ways))]
		h := sha256.New()
		if err := readBy(way, name, h); err != nil {
			return nil, fmt.Errorf("%s by %s: %w", name, way, err)
		}
		sums[strings.TrimPrefix(name, w.Root)] = hex.EncodeToString(h.Sum(nil))
	}
	return sums, nil
}

// readBy feeds the content of a file to h.
func readBy(way, name string, h hash.Hash) (err error) {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	size := int(info.Size())
	switch way {
	case "mmap":
		if size == 0 {
			return nil
		}
		b, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_PRIVATE)
		if err != nil {
			return err
		}
		if err := touch(b); err != nil {
			return errors.Join(err, unix.Munmap(b))
		}
		h.Write(b)
		return unix.Munmap(b)
	case "backwards":
		b := make([]byte, size)
		const piece = 100_000
		for at := size / piece * piece; at >= 0; at -= piece {
			if _, err := f.ReadAt(b[at:min(at+piece, size)], int64(at)); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
		}
		h.Write(b)
		return nil
	case "sendfile", "splice":
		return throughPipe(way, f, size, h)
	}
	_, err = io.Copy(h, f)
	return err
}

// touch faults all pages in, in one call that returns an error where a fault would be a signal.
func touch(b []byte) error {
	err := unix.Madvise(b, unix.MADV_POPULATE_READ)
	if errors.Is(err, unix.EINVAL) {
		return nil // before Linux 5.14
	}
	return err
}

// throughPipe moves a file into a pipe with a system call and reads the pipe.
func throughPipe(way string, f *os.File, size int, h hash.Hash) (err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close(), w.Close()) }()
	b := make([]byte, 64<<10) // what a pipe takes
	for left := size; left > 0; {
		var n int
		if way == "sendfile" {
			n, err = unix.Sendfile(int(w.Fd()), int(f.Fd()), nil, min(left, len(b)))
		} else {
			var m int64
			m, err = unix.Splice(int(f.Fd()), nil, int(w.Fd()), nil, min(left, len(b)), 0)
			n = int(m)
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("%s ended with %d of %d bytes missing", way, left, size)
		}
		if _, err := io.ReadFull(r, b[:n]); err != nil {
			return err
		}
		h.Write(b[:n])
		left -= n
	}
	return nil
}

// startWalker starts a process that does w; the returned function waits for it and returns what it found.
func startWalker(t *testing.T, w walk) func() (map[string]string, error) {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	return startWalkerOf(t, self, w)
}

// startWalkerOf is startWalker for a copy of this program.
func startWalkerOf(t *testing.T, program string, w walk) func() (map[string]string, error) {
	t.Helper()
	text, err := json.Marshal(w)
	must(t, err)
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), walkerVariable+"="+string(text))
	var out, said strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &said
	wait := testenv.Start(t, cmd)
	return func() (sums map[string]string, err error) {
		if err := wait(); err != nil {
			return nil, fmt.Errorf("%w: %s", err, said.String())
		}
		return sums, json.Unmarshal([]byte(out.String()), &sums)
	}
}

// readAll has n processes read the tree at once in all ways, each one of part files, and compares what they found with want.
func readAll(t *testing.T, root string, want map[string]string, n, part int) {
	t.Helper()
	readAllBy(t, root, want, n, part, ways)
}

// readAllBy is readAll by some ways.
func readAllBy(t *testing.T, root string, want map[string]string, n, part int, ways []string) {
	t.Helper()
	waits := make([]func() (map[string]string, error), n)
	for i := range waits {
		waits[i] = startWalker(t, walk{Root: root, Seed: uint64(i + 1), Part: part, Ways: ways})
	}
	for i, wait := range waits {
		got, err := wait()
		if err != nil {
			t.Errorf("reader %d of %d: %v", i, n, err)
			continue
		}
		compareSums(t, got, want, part)
	}
}

func compareSums(t *testing.T, got, want map[string]string, part int) {
	t.Helper()
	if least := len(want) / part; len(got) < least {
		t.Errorf("read %d files, want at least %d", len(got), least)
	}
	wrong := 0
	for name, sum := range got {
		if sum != want[name] {
			wrong++
			if wrong <= 5 {
				t.Errorf("%s has the digest %.12s, want %.12s", name, sum, want[name])
			}
		}
	}
	if wrong > 5 {
		t.Errorf("%d files are wrong", wrong)
	}
}

// sums returns the digests of the regular files of a directory that is no lazy mount.
func sums(t *testing.T, root string) map[string]string {
	t.Helper()
	got, err := walk{Root: root, Seed: 1, Part: 1, Ways: []string{"read"}}.do()
	must(t, err)
	if len(got) == 0 {
		t.Fatalf("%s has no files", root)
	}
	return got
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sorted returns the names of m in order.
func sorted(m map[string]string) []string {
	var names []string
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
