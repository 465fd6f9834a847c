package rafs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/klauspost/compress/zstd"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
	"github.com/headstart-oci/headstart/pkg/rafs/internal/inflate"
)

// Spill has the reader put the dictionaries of a large ZRAN table (32 KiB for every 512 KiB of layer) into s instead of memory. It
// is called before the first read, and s kept until after the last.
func (b *BlobReader) Spill(s Scratch) { b.scratch = s }

// Spills tells whether the table is one of those that Spill is for.
func (b *BlobReader) Spills() bool { return b.piecewise() }

// readMeta reads and checks blob.meta; the dictionaries of a large one only if they are put by.
func (b *BlobReader) readMeta() (*metaTable, error) {
	header, err := b.readMetaHeader()
	if err != nil {
		return nil, err
	}
	if !b.piecewise() {
		table, err := b.readTable()
		if err != nil {
			return nil, err
		}
		return parseMeta(b.blob, table, uint64(len(table)), header)
	}
	h, err := parseMetaHeader(b.blob, header)
	if err != nil {
		return nil, err
	}
	r, err := b.openTable()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	size := uint64(b.blob.ChunkCount)*b.blob.metaRecordSize() + uint64(min(h.ContextCount, b.blob.ChunkCount))*disk.SizeZranContext
	if size > b.blob.MetaUncompressed {
		return nil, invalid("blob.meta of "+short(b.blob.ID), -1, "ci_uncompressed_size", b.blob.MetaUncompressed, fmt.Sprintf("at least %d", size))
	}
	head := make([]byte, size)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, cutOffTable(err)
	}
	rest := io.Discard
	if b.scratch != nil {
		rest = b.scratch
	}
	if _, err := io.Copy(rest, r); err != nil {
		return nil, err
	}
	return parseMeta(b.blob, head, b.blob.MetaUncompressed, header)
}

// piecewise tells whether the table is too large for memory and can be had piece by piece.
func (b *BlobReader) piecewise() bool {
	m := &b.blob
	return m.Features&disk.FeatureZran != 0 && m.MetaUncompressed > bigTable && piecewise(m.MetaCompressor)
}

// readMetaHeader checks the place and sizes of blob.meta and reads its header, which has not been looked at.
func (b *BlobReader) readMetaHeader() ([]byte, error) {
	m := &b.blob
	end := m.CompressedSize
	if m.Features&disk.FeatureSeparate != 0 {
		if end = m.MetaBlobSize; end == 0 {
			end = disk.MaxBlobStored
		}
	}
	// A record has at most 24 bytes, a context 40 and a dictionary 32 KiB; a table compresses to far less than that.
	limit := uint64(m.ChunkCount) * (disk.SizeMetaV2 + disk.SizeBatchContext)
	if m.Features&disk.FeatureZran != 0 {
		limit += min(uint64(m.ChunkCount)*inflate.WindowSize, b.maxDictionaries())
	}
	if m.MetaUncompressed > limit {
		return nil, invalid("blob "+short(m.ID), -1, "ci_uncompressed_size", m.MetaUncompressed, fmt.Sprintf("at most %d", limit))
	}
	if m.MetaUncompressed > 1<<20 && m.MetaUncompressed/maxMetaRatio > m.MetaCompressed {
		return nil, invalid("blob "+short(m.ID), -1, "ci_uncompressed_size", m.MetaUncompressed, fmt.Sprintf("at most %d times ci_compressed_size", maxMetaRatio))
	}
	if m.MetaOffset+m.MetaCompressed+disk.SizeMetaHeader > end {
		return nil, invalid("blob "+short(m.ID), -1, "end of blob.meta", m.MetaOffset+m.MetaCompressed+disk.SizeMetaHeader, fmt.Sprintf("at most %d", end))
	}
	// The header comes first: it proves that the file is there and as long as it says.
	return readExactly(b.metaFile, m.MetaOffset+m.MetaCompressed, disk.SizeMetaHeader)
}

// readTable reads the uncompressed table of blob.meta as a whole.
func (b *BlobReader) readTable() ([]byte, error) {
	m := &b.blob
	stored, err := readExactly(b.metaFile, m.MetaOffset, m.MetaCompressed)
	if err != nil {
		return nil, err
	}
	return b.decoder.decode(m.MetaCompressor, stored, int(m.MetaUncompressed)) //nolint:gosec // readMetaHeader bounds it
}

// dictionary returns the dictionary of a context, which must not be changed.
func (b *BlobReader) dictionary(c *disk.ZranContext) ([]byte, error) {
	switch {
	case b.meta.dicts != nil || c.DictSize == 0:
		return b.meta.dicts[min(c.DictOffset, uint64(len(b.meta.dicts))):][:c.DictSize], nil
	case b.scratch != nil:
		return readExactly(b.scratch, c.DictOffset, uint64(c.DictSize))
	}
	dicts, err := b.dicts()
	if err != nil {
		return nil, fmt.Errorf("dictionaries of blob.meta: %w", err)
	}
	return dicts[c.DictOffset:][:c.DictSize], nil
}

// readDictionaries reads the dictionaries that readMeta has passed over.
func (b *BlobReader) readDictionaries() ([]byte, error) {
	r, err := b.openTable()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if _, err := io.CopyN(io.Discard, r, int64(b.meta.dictsAt)); err != nil { //nolint:gosec // inside the table
		return nil, cutOffTable(err)
	}
	p := make([]byte, b.meta.dictEnd)
	if _, err := io.ReadFull(r, p); err != nil {
		return nil, cutOffTable(err)
	}
	return p, nil
}

// CopyTable writes the blob.meta table as nydusd keeps it in its cache, in a file BLOB.blob.meta, and as nydus-snapshotter has
// it in bootstrap layers: not compressed, zeros up to a multiple of 4096 bytes, the header. It returns how many bytes that is.
// The table is checked first; the errors are those of [BlobReader.ReadChunk] and w.
func (b *BlobReader) CopyTable(w io.Writer) (int64, error) {
	n, err := b.copyTable(w)
	if err != nil {
		return n, fmt.Errorf("blob.meta of %s: %w", short(b.blob.ID), err)
	}
	return n, nil
}

func (b *BlobReader) copyTable(w io.Writer) (int64, error) {
	if _, err := b.table(); err != nil {
		return 0, err
	}
	header, err := b.readMetaHeader()
	if err != nil {
		return 0, err
	}
	r, err := b.openTable()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	out := countingWriter{w: w}
	_, err = io.Copy(&out, r)
	if err == nil {
		_, err = out.Write(make([]byte, alignUp(b.blob.MetaUncompressed, disk.BlockSize)-b.blob.MetaUncompressed))
	}
	if err == nil {
		_, err = out.Write(header)
	}
	return out.n, err
}

// tableReader reads the uncompressed table of blob.meta front to back, and fails at the end unless it has its size.
type tableReader struct {
	src  *faultReader
	r    io.Reader
	left uint64
	zstd *zstd.Decoder // nil: not compressed
	err  error
}

// faultReader keeps the error of what it reads from, to tell broken bytes from bytes that cannot be read.
type faultReader struct {
	r   io.Reader
	err error
}

func (f *faultReader) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		f.err = err
	}
	return n, err
}

// openTable begins to read the table, whose place and size readMetaHeader has checked.
func (b *BlobReader) openTable() (*tableReader, error) {
	m := &b.blob
	stored := io.NewSectionReader(b.metaFile, clampOffset(m.MetaOffset), clampOffset(m.MetaCompressed))
	if !piecewise(m.MetaCompressor) {
		table, err := b.readTable()
		if err != nil {
			return nil, err
		}
		return newTableReader(bytes.NewReader(table), CompressorNone, m.MetaUncompressed)
	}
	return newTableReader(stored, m.MetaCompressor, m.MetaUncompressed)
}

// piecewise tells whether tables compressed with c can be had piece by piece.
func piecewise(c Compressor) bool { return c == CompressorZstd || c == CompressorNone }

// newTableReader begins to read a table of size bytes that is stored in r, compressed with one of the compressors that [piecewise] names.
func newTableReader(stored io.Reader, c Compressor, size uint64) (*tableReader, error) {
	t := &tableReader{src: &faultReader{r: stored}, left: size}
	t.r = t.src
	if c == CompressorZstd {
		// nydus-image makes one segment of a table, however large, which is then the window.
		window := max(tableWindow, uint64(1)<<bits.Len64(size))
		var err error
		t.zstd, err = zstd.NewReader(t.src, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(window))
		if err != nil {
			return nil, fmt.Errorf("%w: blob.meta: %w", ErrInvalid, err)
		}
		t.r = t.zstd
	}
	return t, nil
}

// Read reads from the table.
func (t *tableReader) Read(p []byte) (int, error) {
	if t.err != nil {
		return 0, t.err
	}
	n, err := t.r.Read(p)
	switch {
	case uint64(n) > t.left: //nolint:gosec // not negative
		n, err = int(t.left), fmt.Errorf("%w: the table has more bytes than it says", ErrInvalid) //nolint:gosec // below n
	case t.src.err != nil:
		err = t.src.err
	case errors.Is(err, io.EOF) && t.left > uint64(n): //nolint:gosec // not negative
		err = fmt.Errorf("%w: the table ends %d bytes early", ErrInvalid, t.left-uint64(n)) //nolint:gosec // not negative
	case err != nil && !errors.Is(err, io.EOF):
		err = fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	t.left -= uint64(n) //nolint:gosec // not negative
	t.err = err
	return n, err
}

// Close frees the decompressor.
func (t *tableReader) Close() {
	if t.zstd != nil {
		t.zstd.Close()
	}
}

// cutOffTable says of a table that ends too early what it is.
func cutOffTable(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: the table ends early", ErrInvalid)
	}
	return err
}
