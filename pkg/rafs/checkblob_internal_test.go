package rafs

import (
	"bytes"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// TestSectionsOnce checks a table of contents that names one section again and again: it is hashed once.
func TestSectionsOnce(t *testing.T) {
	t.Parallel()
	content := bytes.Repeat([]byte("x"), 3*disk.SizeDigestRecord)
	e := disk.TOCEntry{Flags: disk.TOCNone, CompressedSize: uint64(len(content)), UncompressedSize: uint64(len(content))}
	copy(e.Name[:], disk.SectionDigest)
	toc := appendRecord(nil, &e)
	for range 7 {
		toc = append(toc, toc[:disk.SizeTOCEntry]...)
	}
	p := append(bytes.Clone(content), toc...)
	p = append(p, sectionHeader(disk.SectionTOC, uint64(len(toc)))...)
	c := &checker{options: CheckOptions{Data: true}, faults: faultList{limit: 100}}
	b := Blob{ID: "x", Features: disk.FeatureTOC, ChunkCount: 3}
	if err := c.sections(t.Context(), b, bytes.NewReader(p)); err != nil {
		t.Fatal(err)
	}
	var wrong, again int
	for _, err := range c.faults.faults {
		switch {
		case strings.Contains(err.Error(), "number of entries of the name"):
			again++
		case strings.Contains(err.Error(), "sha256"):
			wrong++
		}
	}
	if again != 7 || wrong != 1 {
		t.Errorf("%d entries are called superfluous and %d hashed, want 7 and 1: %v", again, wrong, c.faults.err())
	}
}
