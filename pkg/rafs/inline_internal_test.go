package rafs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// TestReadInlineSizes refuses a bootstrap that is stored as it is and that the TOC gives two sizes.
func TestReadInlineSizes(t *testing.T) {
	t.Parallel()
	boot := make([]byte, 5000)
	for i := range boot {
		boot[i] = byte(rand.Uint32()) // nothing compresses it
	}
	var b bytes.Buffer
	w, err := NewBlobWriter(&b, BlobOptions{Version: V6, Compressor: CompressorZstd, ChunkSize: 1 << 20, TOC: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.CloseInline(func(w io.Writer, _ *Blob) error { _, err := w.Write(boot); return err }); err != nil {
		t.Fatal(err)
	}
	blob := b.Bytes()
	if got, err := ReadInline(bytes.NewReader(blob), int64(len(blob))); err != nil || !bytes.Equal(got, boot) {
		t.Fatalf("ReadInline = %d bytes, %v, want %d", len(got), err, len(boot))
	}
	at := bytes.LastIndex(blob, []byte(disk.SectionBootstrap)) // the name in the TOC
	size := blob[at+16+32+8:]                                  // behind it, the digest and the offset
	if got := binary.LittleEndian.Uint64(size); got != uint64(len(boot)) {
		t.Fatalf("the TOC says %d stored bytes, want %d", got, len(boot))
	}
	for _, n := range []int{len(boot) - 1, len(boot) + 1, len(boot) + 512} {
		binary.LittleEndian.PutUint64(size, uint64(n))
		if got, err := ReadInline(bytes.NewReader(blob), int64(len(blob))); !errors.Is(err, ErrInvalid) || got != nil {
			t.Errorf("ReadInline with %d stored bytes of %d = %d bytes, %v, want ErrInvalid", n, len(boot), len(got), err)
		}
	}
}
