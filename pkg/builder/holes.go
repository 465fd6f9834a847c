package builder

import (
	"io"
	"sync"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

const (
	// holeStep is how many bytes are read at once to see whether they come from a hole: few enough to stay in the
	// CPU's cache, where the tar reader writes its zeros.
	holeStep = 64 << 10

	// maxPieces bounds a batch in chunks, of which those of holes take no room, and those of small files little.
	maxPieces = 4096
)

// zeroChunk is a chunk of nothing but zeros, of the full size: a hole has many of them, and all are stored alike. Its
// methods are safe for concurrent use; each works once.
type zeroChunk struct {
	raw      []byte // zeros, only read
	digester rafs.Digester

	digestOnce sync.Once
	digest     rafs.Digest

	encodeOnce sync.Once
	data       []byte // as it is stored
	compressed bool
	err        error
}

func newZeroChunk(size int, d rafs.Digester) *zeroChunk {
	return &zeroChunk{raw: make([]byte, size), digester: d}
}

func (z *zeroChunk) sum() rafs.Digest {
	z.digestOnce.Do(func() { z.digest = z.digester.Sum(z.raw) })
	return z.digest
}

// encode is [rafs.Encoder.Encode] of the chunk. Every encoder of a conversion makes the same of it.
func (z *zeroChunk) encode(enc *rafs.Encoder) (data []byte, compressed bool, err error) {
	z.encodeOnce.Do(func() { z.data, z.compressed, z.err = enc.Encode(nil, z.raw) })
	return z.data, z.compressed, z.err
}

// readHoles fills p from r and reports whether all of it came from holes, which are no bytes of the tar: place says how
// many of those were read, and nil that nothing is known of that.
func readHoles(r io.Reader, p []byte, place func() int64) (hole bool, err error) {
	if place == nil {
		_, err := io.ReadFull(r, p)
		return false, err
	}
	from := place()
	for at := 0; at < len(p); {
		step := p[:min(holeStep, len(p)-at)] // the same bytes again, as long as they are zeros
		if _, err := io.ReadFull(r, step); err != nil {
			return false, err
		}
		if place() != from {
			n := at + copy(p[at:], step)
			clear(p[:at])
			_, err := io.ReadFull(r, p[n:])
			return false, err
		}
		at += len(step)
	}
	clear(p)
	return true, nil
}

// countingReader counts the bytes read from r.
type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
