package rafs

import (
	"bytes"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Scratch is room for what would take memory in proportion to a layer, such as a temporary file of the caller's, who closes and
// removes it. What is written goes behind what was written before, from the first byte on; ReadAt finds it there.
type Scratch interface {
	io.Writer
	io.ReaderAt
}

// memoryScratch is the Scratch of those who give none. The zero value is ready.
type memoryScratch struct{ p []byte }

func (s *memoryScratch) Write(p []byte) (int, error) {
	s.p = append(s.p, p...)
	return len(p), nil
}

func (s *memoryScratch) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(s.p).ReadAt(p, off)
}

// bigTable is from which size on, in bytes, a table is compressed and decompressed piece by piece.
const bigTable = 4 << 20

// tableWindow is how far back matches of such a table may reach: what reading one takes in memory.
const tableWindow = 1 << 20

// bigMeta is a table that is not in memory as a whole.
type bigMeta struct {
	head    []byte  // records and contexts
	scratch Scratch // dictionaries from its beginning on; then the compressed table
	dicts   int64   // bytes of dictionaries
}

func (m *bigMeta) reader() io.Reader {
	return io.MultiReader(bytes.NewReader(m.head), io.NewSectionReader(m.scratch, 0, m.dicts))
}

func (m *bigMeta) size() int64 { return int64(len(m.head)) + m.dicts }

// compress returns the table as it is to be stored: compressed into the scratch, or as it is where that is not smaller. sum is
// given the table.
func (m *bigMeta) compress(sum hash.Hash) (stored io.Reader, size int64, compressed bool, err error) {
	out := &countingWriter{w: m.scratch}
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(tableWindow))
	if err != nil {
		return nil, 0, false, err
	}
	z.ResetContentSize(out, m.size())
	if _, err = io.Copy(io.MultiWriter(z, sum), m.reader()); err != nil {
		_ = z.Close() // the first error counts
		return nil, 0, false, fmt.Errorf("compress blob.meta: %w", err)
	}
	if err := z.Close(); err != nil {
		return nil, 0, false, fmt.Errorf("compress blob.meta: %w", err)
	}
	if out.n >= m.size() {
		return m.reader(), m.size(), false, nil
	}
	return io.NewSectionReader(m.scratch, m.dicts, out.n), out.n, true, nil
}

// countingWriter counts what it passes on.
type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
