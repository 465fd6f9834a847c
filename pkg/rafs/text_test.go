package rafs_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// A blob's description reads back from JSON as it was.
func TestBlobJSON(t *testing.T) {
	want := rafs.Blob{
		ID: strings.Repeat("a", 64), ChunkSize: 1 << 20, ChunkCount: 3, Compressor: rafs.CompressorLZ4, Digester: rafs.DigesterSHA256,
		CompressedSize: 1 << 40, TOCDigest: rafs.Digest{1, 2}, MetaCompressor: rafs.CompressorZstd, MetaBlobDigest: rafs.Digest{0xff},
	}
	text, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got rafs.Blob
	if err := json.Unmarshal(text, &got); err != nil || got != want {
		t.Errorf("%s reads as %+v, %v", text, got, err)
	}
	for _, bad := range []string{`{"compressor":"brotli"}`, `{"digester":"md5"}`, `{"toc_digest":"00"}`, `{"toc_digest":"` + strings.Repeat("z", 64) + `"}`} {
		if err := json.Unmarshal([]byte(bad), &got); err == nil {
			t.Errorf("%s was read", bad)
		}
	}
}
