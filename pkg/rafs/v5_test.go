package rafs_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestOCIFixtureV5 reads a v5 image as nydusify 2.4.4 pushes it: the bootstrap of each layer follows its chunks.
func TestOCIFixtureV5(t *testing.T) {
	t.Parallel()
	s := loadOCIFixture(t, "nydus-v5")
	report, err := s.check(rafs.CheckOptions{Data: true})
	if err != nil {
		t.Error(err)
	}
	if report.Chunks != 541 || report.CheckedBytes == 0 {
		t.Errorf("Check = %+v, want the 541 chunks of its v6 twin", report)
	}
	img := s.open(t)
	twin := loadFixture(t, "v5-zstd")
	other := twin.open(t)
	got, want := flatten(t, img, img.FS(s.reader)), flatten(t, other, other.FS(twin.reader))
	got[0].Mtime, want[0].Mtime = 0, 0
	diff(t, "tree", got, want)
	for id, good := range s.blobs {
		for _, at := range []int{0, len(good) / 2, len(good) - 1} {
			p := bytes.Clone(good)
			p[at] ^= 0x10
			s.blobs[id] = p
			if _, err := s.check(rafs.CheckOptions{Data: true}); !errors.Is(err, rafs.ErrDigest) && !errors.Is(err, rafs.ErrInvalid) {
				t.Errorf("byte %d of %d of blob %s changed: Check = %v", at, len(good), id, err)
			}
		}
		s.blobs[id] = good
	}
}
