package converter

import (
	"bytes"
	"testing"
)

// readerAt is content of a store.
type readerAt struct{ *bytes.Reader }

func (readerAt) Close() error { return nil }

func (r readerAt) Size() int64 { return r.Reader.Size() }

// FuzzIsBlob looks at any content. A blob ends with the header of a section, whatever is before it.
func FuzzIsBlob(f *testing.F) {
	header := make([]byte, 512)
	copy(header, "rafs.blob.toc")
	copy(header[257:], "ustar")
	f.Add(header)
	f.Add(header[1:])
	f.Add(append(bytes.Clone(header), 0))
	f.Add(append(make([]byte, 4096), header...))
	f.Fuzz(func(t *testing.T, p []byte) {
		got := isBlob(readerAt{bytes.NewReader(p)})
		if got && len(p) < 512 {
			t.Errorf("%d bytes are a blob", len(p))
		}
		if longer := isBlob(readerAt{bytes.NewReader(append(make([]byte, 7), p...))}); len(p) >= 512 && longer != got {
			t.Errorf("a blob: %v, with bytes before it: %v", got, longer)
		}
	})
}
