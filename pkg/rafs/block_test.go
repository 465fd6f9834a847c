package rafs_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// writeBlock writes s as one raw image and returns its file.
func writeBlock(t *testing.T, s *stored) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image.erofs")
	f, err := os.Create(name)
	must(t, err)
	defer f.Close()
	img := s.open(t)
	size, err := rafs.WriteBlock(t.Context(), f, bytes.NewReader(s.bootstrap), int64(len(s.bootstrap)), func(n int) (*rafs.BlobReader, error) {
		return s.reader(img.Blobs[n])
	})
	must(t, err)
	info, err := f.Stat()
	must(t, err)
	if info.Size() != size || size%4096 != 0 {
		t.Errorf("WriteBlock says %d bytes, the file has %d; want the same, a multiple of 4096", size, info.Size())
	}
	return name
}

// TestWriteBlock has the kernel mount raw images with no device named, and fsck.erofs read them.
func TestWriteBlock(t *testing.T) {
	for _, name := range v6Fixtures {
		t.Run(name, func(t *testing.T) {
			file := writeBlock(t, loadFixture(t, name))
			dir := testenv.MountEROFS(t, file)
			out, err := exec.Command(testenv.Tool(t, "python3"), filepath.Join(testenv.Fixtures(t), "cmp_tree.py"),
				dir, filepath.Join(testenv.Fixtures(t), "expected.json")).CombinedOutput()
			if err != nil {
				t.Errorf("cmp_tree.py: %v\n%s", err, out)
			}
		})
	}
}

func TestWriteBlockRefuses(t *testing.T) {
	t.Parallel()
	s := loadFixture(t, "v5-zstd")
	w := &countingWriterAt{}
	_, err := rafs.WriteBlock(t.Context(), w, bytes.NewReader(s.bootstrap), int64(len(s.bootstrap)), nil)
	if !errors.Is(err, rafs.ErrUnsupported) || w.n > 0 {
		t.Errorf("WriteBlock of v5 = %v after %d bytes, want ErrUnsupported and none", err, w.n)
	}
}

type countingWriterAt struct{ n int }

func (c *countingWriterAt) WriteAt(p []byte, _ int64) (int, error) {
	c.n += len(p)
	return len(p), nil
}
