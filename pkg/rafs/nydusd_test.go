package rafs_test

import (
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestNydusd lets the real nydusd 2.2.0 serve our images by FUSE: it reads blob.meta and chunk data
// with its own code. POSIX ACLs are left out, see combo.acl.
func TestNydusd(t *testing.T) {
	for i, o := range nydusdCombos {
		if raceEnabled && i > 0 {
			break // what nydusd does is none of the race detector's
		}
		t.Run(o.String(), func(t *testing.T) {
			randomImage(t, uint64(200+i), o).build().compareNydusd(t)
		})
	}
}

// TestNydusdV5 does the same with v5 images, whose chunks nydusd finds through the bootstrap alone.
func TestNydusdV5(t *testing.T) {
	for i, o := range nydusdCombos {
		if o.v2 || raceEnabled && i > 0 {
			continue // v2 is for v6 only
		}
		t.Run(o.String(), func(t *testing.T) {
			b := randomImage(t, uint64(300+i), o)
			b.img.Version = rafs.V5
			b.build().compareNydusd(t)
		})
	}
}

var nydusdCombos = []combo{
	{compressor: rafs.CompressorZstd, chunkSize: 1 << 20},
	{compressor: rafs.CompressorZstd, chunkSize: 4096, digester: rafs.DigesterSHA256, level: rafs.LevelBest},
	{compressor: rafs.CompressorLZ4, chunkSize: 64 << 10, toc: true},
	{compressor: rafs.CompressorNone, chunkSize: 64 << 10},
	{compressor: rafs.CompressorGzip, chunkSize: 64 << 10, digester: rafs.DigesterSHA256},
	{compressor: rafs.CompressorZstd, chunkSize: 64 << 10, v2: true},
}

// compareNydusd serves the image by the real nydusd and compares every entry.
func (s *stored) compareNydusd(t *testing.T) {
	t.Helper()
	bootstrap, blobs, _ := s.write(t, t.TempDir())
	img := s.open(t)
	want := flatten(t, img, img.FS(s.reader))
	got := flattenDir(t, testenv.MountNydusd(t, bootstrap, blobs), want)
	for i := range min(len(got), len(want)) {
		if want[i].Mtime == 0 { // nydusd shows the time of the mount then
			got[i].Mtime, got[i].Nsec, want[i].Nsec = 0, 0, 0
		}
	}
	diff(t, "tree through nydusd", got, want)
}
