package atomicfile_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/headstart-oci/headstart/internal/atomicfile"
	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func openRoot(t *testing.T) (*os.Root, string) {
	t.Helper()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := root.Close(); err != nil {
			t.Error(err)
		}
	})
	return root, dir
}

func put(text string) func(io.Writer) error {
	return func(w io.Writer) error { _, err := io.WriteString(w, text); return err }
}

func TestWrite(t *testing.T) {
	t.Parallel()
	root, dir := openRoot(t)
	for _, text := range []string{"one", "two"} {
		if err := atomicfile.Write(root, ".", "f", 0o640, put(text)); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, "f"))
		if err != nil || string(b) != text {
			t.Errorf("holds %q, %v, want %q", b, err, text)
		}
	}
	broken := errors.New("broken")
	err := atomicfile.Write(root, ".", "f", 0o640, func(w io.Writer) error { return errors.Join(put("half")(w), broken) })
	if !errors.Is(err, broken) {
		t.Errorf("Write = %v, want %v", err, broken)
	}
	if err := atomicfile.Write(root, ".", "missing/f", 0o640, put("x")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Write below a missing directory = %v", err)
	}
	if err := atomicfile.Write(root, ".", "../f", 0o640, put("x")); err == nil {
		t.Error("Write outside the root: no error")
	}
	left, err := os.ReadDir(dir)
	if b, rerr := os.ReadFile(filepath.Join(dir, "f")); err != nil || rerr != nil || len(left) != 1 || string(b) != "two" {
		t.Errorf("left: %v, %q, %v, %v, want the old file alone", left, b, err, rerr)
	}
}

// What a living writer has is not a leftover.
func TestClean(t *testing.T) {
	t.Parallel()
	root, dir := openRoot(t)
	for _, name := range []string{atomicfile.TempPrefix + "DEAD", "other"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, atomicfile.TempPrefix+"LINK")); err != nil {
		t.Fatal(err)
	}
	err := atomicfile.Write(root, ".", "f", 0o600, func(w io.Writer) error {
		if err := atomicfile.Clean(root, "."); err != nil {
			return err
		}
		left, err := os.ReadDir(dir)
		if err != nil || len(left) != 2 {
			t.Errorf("while a writer lives: %v, %v, want its file and the other", left, err)
		}
		return put("x")(w)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.Clean(root, "missing"); err != nil {
		t.Errorf("Clean of a missing directory = %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
		t.Errorf("left: %v, %v, want f and other", left, err)
	}
}

func TestSymlink(t *testing.T) {
	t.Parallel()
	root, dir := openRoot(t)
	for _, to := range []string{"a", "b"} {
		if err := atomicfile.Symlink(root, ".", to, "link"); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(filepath.Join(dir, "link")); err != nil || got != to {
			t.Errorf("link to %q, %v, want %q", got, err, to)
		}
	}
	if err := atomicfile.Symlink(root, ".", "a", "missing/link"); err == nil {
		t.Error("Symlink below a missing directory: no error")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// What is written behind is what was written, whatever the sizes, and nothing runs on when it is closed.
func TestBehind(t *testing.T) {
	t.Parallel()
	root, dir := openRoot(t)
	want := make([]byte, 0, 40<<20)
	err := atomicfile.Write(root, ".", "f", 0o600, func(w io.Writer) error {
		f, ok := w.(*os.File)
		if !ok {
			t.Fatalf("Write gives a %T, want an *os.File", w)
		}
		b := atomicfile.NewBehind(f)
		for i := range 30 {
			p := bytes.Repeat([]byte{byte(i)}, i*100_000)
			want = append(want, p...)
			if n, err := b.Write(p); n != len(p) || err != nil {
				t.Fatalf("Write(%d bytes) = %d, %v", len(p), n, err)
			}
		}
		return errors.Join(b.Close(), b.Close())
	})
	got, rerr := os.ReadFile(filepath.Join(dir, "f"))
	if err != nil || rerr != nil || !bytes.Equal(got, want) {
		t.Errorf("holds %d bytes, want %d: %v, %v", len(got), len(want), err, rerr)
	}
}
