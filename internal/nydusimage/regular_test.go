package nydusimage_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// TestNoRegularBlob puts something else where a layout's blob is: it is refused at once, and no file outside of the layout is read.
func TestNoRegularBlob(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]struct {
		make func(path string) error
		want error
		text string
	}{
		"FIFO":      {func(p string) error { return unix.Mkfifo(p, 0o600) }, remote.ErrInvalid, "not a regular file"},
		"directory": {func(p string) error { return os.Mkdir(p, 0o700) }, remote.ErrInvalid, "not a regular file"},
		"missing":   {func(string) error { return nil }, remote.ErrNotFound, "no such file"},
		"link out":  {func(p string) error { return os.Symlink("/etc/passwd", p) }, nil, "escapes"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			z := newZoo(t)
			img, err := nydusimage.Open(t.Context(), "oci:"+z.dir, nydusimage.Options{Platform: "linux/amd64"})
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			blob := img.RAFS.Blobs[0]
			path := filepath.Join(z.dir, "blobs", "sha256", blob.ID)
			if err := errors.Join(os.Remove(path), spoil.make(path)); err != nil {
				t.Fatal(err)
			}
			wantRefused(t, img, blob, spoil.want, spoil.text)
		})
	}
}

func wantRefused(t *testing.T, img *nydusimage.Image, b rafs.Blob, want error, text string) {
	t.Helper()
	f, err := img.OpenBlob(t.Context(), b)
	if f != nil || err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), text) || !strings.Contains(err.Error(), b.ID) {
		t.Errorf("OpenBlob = %v, want %v with %q and the blob's id", err, want, text)
	}
}

// TestNoRegularFiles: loose files are files.
func TestNoRegularFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{fifo: "is a FIFO", dir: "is a directory", "/dev/null": "is a special file"} {
		if img, err := nydusimage.OpenFiles(path, ""); img != nil || !errors.Is(err, nydusimage.ErrInvalid) || !strings.Contains(err.Error(), path+" "+text) {
			t.Errorf("OpenFiles(%s) = %v, want that it %s", path, err, text)
		}
	}

	z := newZoo(t)
	img, err := nydusimage.Open(t.Context(), "oci:"+z.dir, nydusimage.Options{Platform: "linux/amd64"})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	r, size := img.Bootstrap()
	boot := filepath.Join(dir, "image.boot")
	b := make([]byte, size)
	if _, err := r.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(boot, b, 0o600); err != nil {
		t.Fatal(err)
	}
	blob := img.RAFS.Blobs[0]
	if err := os.Rename(fifo, filepath.Join(dir, blob.ID)); err != nil {
		t.Fatal(err)
	}
	loose, err := nydusimage.OpenFiles(boot, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer loose.Close()
	wantRefused(t, loose, blob, nydusimage.ErrInvalid, "is a FIFO")
}
