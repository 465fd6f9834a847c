package rafs_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

func sectionNames(info *rafs.BlobFileInfo) string {
	var list []string
	for _, s := range info.Sections {
		list = append(list, s.Name)
	}
	return strings.Join(list, " ")
}

// TestInspectBlob compares what blobs say of themselves with what their bootstraps say.
func TestInspectBlob(t *testing.T) {
	t.Parallel()
	for want, o := range map[string]combo{
		"image.blob blob.meta":                           {compressor: rafs.CompressorZstd, chunkSize: 4096},
		"image.blob blob.meta blob.digest rafs.blob.toc": {compressor: rafs.CompressorLZ4, chunkSize: 4096, toc: true, batch: 8192},
	} {
		b, _ := smallImage(t, o)
		s := b.build()
		blob := b.img.Blobs[0]
		p := s.blobs[blob.ID]
		info, err := rafs.InspectBlob(bytes.NewReader(p), int64(len(p)))
		must(t, err)
		if got := sectionNames(info); got != want {
			t.Errorf("sections %s, want %s", got, want)
		}
		if m := info.Meta; m == nil || m.Chunks != blob.ChunkCount || m.TableOffset != blob.MetaOffset || m.UncompressedSize != blob.MetaUncompressed || (m.Contexts > 0) != (o.batch > 0) {
			t.Errorf("blob.meta = %+v, want that of %+v", m, blob)
		}
		if o.toc != (len(info.TOC) == 4) {
			t.Errorf("%d TOC entries, TOC: %v", len(info.TOC), o.toc)
		}
		next := uint64(0)
		for _, s := range info.Sections {
			if s.Offset != next {
				t.Errorf("section %s at %d, want %d", s.Name, s.Offset, next)
			}
			next = s.Offset + s.Size + 512
		}
		if next != uint64(len(p)) {
			t.Errorf("sections end at %d of %d", next, len(p))
		}
	}
	for name, want := range map[string]string{"v6-zstd": "data blob.meta", "v6-zstd-batch": "data blob.meta", "v5-zstd": "data"} {
		s := loadFixture(t, name)
		for id, p := range s.blobs {
			info, err := rafs.InspectBlob(bytes.NewReader(p), int64(len(p)))
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if got := strings.ReplaceAll(sectionNames(info), "image.blob", "data"); !strings.HasPrefix(got, want) {
				t.Errorf("%s, blob %.12s: sections %s, want %s", name, id, got, want)
			}
		}
	}
	for _, p := range [][]byte{nil, []byte("x"), make([]byte, 10000)} {
		if info, err := rafs.InspectBlob(bytes.NewReader(p), int64(len(p))); err != nil || sectionNames(info) != strings.TrimSpace("data "[:min(len(p), 1)*4]) {
			t.Errorf("InspectBlob of %d bytes = %+v, %v", len(p), info, err)
		}
	}
}

// TestInspectBlobDamaged changes bytes of the tables: an error or an answer, and nothing else.
func TestInspectBlobDamaged(t *testing.T) {
	t.Parallel()
	b, _ := smallImage(t, combo{compressor: rafs.CompressorZstd, chunkSize: 4096, toc: true})
	s := b.build()
	good := s.blobs[b.img.Blobs[0].ID]
	r := newRand(8)
	for range 3000 {
		p := bytes.Clone(good)
		for range 1 + r.IntN(3) {
			p[len(p)-1-r.IntN(min(len(p), 7000))] ^= byte(1 + r.UintN(255))
		}
		n := len(p) - r.IntN(2)*r.IntN(len(p))
		info, err := rafs.InspectBlob(bytes.NewReader(p[:n]), int64(n))
		if (info == nil) != (err != nil) || err != nil && !errors.Is(err, rafs.ErrInvalid) {
			t.Fatalf("InspectBlob = %+v, %v", info, err)
		}
	}
}
