package rafs

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
	"github.com/headstart-oci/headstart/pkg/rafs/internal/inflate"
)

// RefOptions says how a [RefBuilder] makes its table. The zero value takes BLAKE3 digests and chunks of 1 MiB;
// nydus itself takes SHA-256 for images of this kind.
type RefOptions struct {
	Digester Digester
	// ChunkSize is the image's chunk size in bytes, a power of two; 0: DefaultChunkSize.
	ChunkSize uint32
	// TOC adds chunk digests and a table of contents to the table's file, as registries hold it.
	TOC bool
	// Scratch takes the dictionaries, 32 KiB for every 512 KiB of layer or 2 MiB of tar, and at the end the
	// compressed table, until Close; nil: memory.
	Scratch Scratch
}

// RefBuilder makes the blob of an image whose data stay where they are: in a layer of an OCI image, a tar
// that is compressed with gzip or not at all (OCI-ref). The layer is read once, front to back; beside it comes a small
// file with the blob.meta table, which says of every chunk from where on to decompress (ZRAN).
//
// It is an io.Reader of the decompressed tar. Before the content of a chunk is read from it, directly or
// through a tar.Reader, Begin is called, behind it End, and Append as soon as the digest is known:
//
//	tr := tar.NewReader(rb)
//	…
//	rb.Begin(size)
//	io.ReadFull(tr, p[:size])
//	place, err := rb.End()
//	chunk, err := rb.Append(place, digester.Sum(p[:size]))
//	…
//	blob, err := rb.Close(file)
//
// Memory is about 100 bytes a chunk, and as much for every 512 KiB of layer or 2 MiB of tar, but for RefOptions.Scratch.
// Append and AppendAfter may be called by one goroutine while another reads, begins and ends
// chunks; else it is not safe for concurrent use.
type RefBuilder struct {
	options RefOptions
	src     *refSource
	plain   *bufio.Reader // of a layer without compression; nil for gzip
	gzip    *inflate.Decoder
	err     error // of the layer
	closed  bool

	piece   []byte           // decompressed and not read
	pieceIn int64            // where the compressed bytes of the last piece begin
	offset  int64            // of the next Read in the tar
	block   inflate.Position // where the block began that the next byte belongs to
	window  []byte           // output before that

	context *refContext // the present one
	dict    []byte      // its window, which it may have given away by now
	begun   uint32      // size of the chunk that is being read; 0: none is
	begin   refPosition
	member  int // of the gzip stream, where the chunk begins
	cut     int // chunks that do not end in the member in which they begin

	writer refTable
}

// refSource counts and hashes the layer.
type refSource struct {
	r    io.Reader
	sum  hash.Hash
	size int64
}

func (s *refSource) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.sum.Write(p[:n])
	s.size += int64(n)
	return n, err
}

// refPosition is where a chunk begins.
type refPosition struct{ in, out int64 }

// refContext is a place where decompression may begin.
type refContext struct {
	start  inflate.Position
	window []byte // until the first chunk of it is stored
	dictAt int64  // then it is here in the table's dictionaries
	dict   uint32 // and has so many bytes
	in     int64  // end of what its chunks need, in the layer
	out    int64  // and in the tar
	index  int    // in the table; -1: no chunk of it is stored yet
}

// RefPlace is where a chunk was read. The zero value is no place.
type RefPlace struct {
	context *refContext
	begin   refPosition
	in, out int64 // ends, as in refContext
	size    uint32
	of      *RefBuilder
}

// Lengths at which a new context begins, where a deflate block does. Source: ZranContextGenerator in nydus'
// storage/src/meta/zran.rs.
const (
	refContextIn  = 512 << 10
	refContextOut = 2 << 20
)

// NewRefBuilder starts with the first bytes of layer: gzip is told by its magic number, everything else is taken for a plain tar, but
// zstd data (ErrUnsupported), which has no places to begin at.
func NewRefBuilder(layer io.Reader, o RefOptions) (*RefBuilder, error) {
	if o.ChunkSize == 0 {
		o.ChunkSize = DefaultChunkSize
	}
	switch {
	case !validChunkSize(o.ChunkSize):
		return nil, fmt.Errorf("%w: chunk size %d: want a power of two from %d to %d", ErrInvalid, o.ChunkSize, MinChunkSize, MaxChunkSize)
	case o.Digester > DigesterSHA256:
		return nil, fmt.Errorf("%w: %v", ErrUnsupported, o.Digester)
	}
	b := &RefBuilder{options: o, src: &refSource{r: layer, sum: sha256.New()}}
	b.writer.init(o)
	in := bufio.NewReaderSize(b.src, 64<<10)
	magic, err := in.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read layer: %w", err)
	}
	switch {
	case len(magic) >= 2 && magic[0] == 0x1f && magic[1] == 0x8b:
		b.gzip = inflate.NewReader(in)
	case len(magic) == 4 && magic[0] == 0x28 && magic[1] == 0xb5 && magic[2] == 0x2f && magic[3] == 0xfd:
		return nil, fmt.Errorf("%w: a layer compressed with zstd cannot be referred to: convert it whole", ErrUnsupported)
	default:
		b.plain = in
	}
	return b, nil
}

// Read reads the decompressed layer.
func (b *RefBuilder) Read(p []byte) (int, error) {
	if b.plain != nil {
		n, err := b.plain.Read(p)
		b.offset += int64(n)
		return n, err
	}
	if err := b.fill(); err != nil {
		return 0, err
	}
	n := copy(p, b.piece)
	b.piece, b.offset = b.piece[n:], b.offset+int64(n)
	return n, nil
}

// fill makes the next piece available; it notes the blocks on the way.
func (b *RefBuilder) fill() error {
	for len(b.piece) == 0 {
		if b.err != nil {
			return b.err
		}
		pos := b.gzip.Position()
		if pos.Block {
			b.block = pos
			b.window = append(b.window[:0], b.gzip.Window()...)
		}
		b.pieceIn = pos.In
		if pos.Bits > 0 {
			b.pieceIn--
		}
		if b.piece, b.err = b.gzip.Next(); b.err != nil && !errors.Is(b.err, io.EOF) {
			b.err = fmt.Errorf("layer: %w", b.err)
			if errors.Is(b.err, inflate.ErrFormat) {
				b.err = fmt.Errorf("%w: %w", ErrInvalid, b.err)
			}
		}
	}
	return nil
}

// Offset returns how many bytes of the tar have been read.
func (b *RefBuilder) Offset() int64 { return b.offset }

// Cut returns how many chunks lie in two gzip members or more. nydusd 2.2.0 cannot read those.
func (b *RefBuilder) Cut() int { return b.cut }

// Begin says that the next size bytes that are read are a chunk.
func (b *RefBuilder) Begin(size uint32) error {
	switch {
	case b.begun != 0:
		return fmt.Errorf("rafs: a chunk begins inside another")
	case size == 0 || size > b.options.ChunkSize:
		return fmt.Errorf("%w: chunk of %d bytes: want 1 to %d", ErrInvalid, size, b.options.ChunkSize)
	}
	b.begun, b.begin = size, refPosition{b.offset, b.offset}
	if b.plain != nil {
		return nil
	}
	if err := b.fill(); err != nil {
		b.begun = 0
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	b.begin.in, b.member = b.pieceIn, b.block.Member
	if c := b.context; c == nil || c.start.Member != b.block.Member || c.start.Out != b.block.Out &&
		(b.pieceIn-c.start.In >= refContextIn || b.offset-c.start.Out+int64(size) >= refContextOut) {
		b.dict = append([]byte(nil), b.window...) // a new one: the context may be the other goroutine's by now
		b.context = &refContext{start: b.block, window: b.dict, index: -1}
	}
	return nil
}

// End says that the chunk begun last has been read whole, and returns where it was. ErrUnsupported when that took
// more or fewer bytes of the tar than the chunk has: holes of a sparse file are not in it.
func (b *RefBuilder) End() (RefPlace, error) {
	size, want := b.offset-b.begin.out, b.begun
	b.begun = 0
	switch {
	case want == 0:
		return RefPlace{}, fmt.Errorf("rafs: end of a chunk that was not begun")
	case size != int64(want):
		return RefPlace{}, fmt.Errorf("%w: the layer has %d bytes of a chunk of %d in one piece, as of a sparse file", ErrUnsupported, size, want)
	}
	p := RefPlace{context: b.context, begin: b.begin, in: b.offset, out: b.offset, size: want, of: b}
	if b.plain != nil {
		return p, nil
	}
	last := b.gzip.Position()
	err := b.fill()
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return RefPlace{}, err
	case last.Out > b.offset || err == nil && b.block.Member == last.Member:
		p.in = b.gzip.Position().In // more output follows in this member
	default:
		// What zlib is not given it does not run into: at the end of a member it reports that, and nydusd takes the report for an
		// error. Where the end cannot be told from the last byte, newer versions of nydusd go on to the next member, if
		// they are asked for a byte of it.
		if p.in = last.Data; last.End && last.Data == last.In && err == nil {
			p.in, p.out = b.gzip.Position().In, p.out+1
		}
	}
	if last.Member != b.member {
		// nydusd 2.2.0 does not go from one member to the next, and decompresses the context of a chunk as a whole: the others of
		// this context are spared that.
		b.cut++
		p.context = &refContext{start: p.context.start, window: b.dict, index: -1}
		b.context = nil
	}
	return p, b.checkPlace(&p)
}

func (b *RefBuilder) checkPlace(p *RefPlace) error {
	if p.in-p.context.start.In <= 1<<32-1 && p.out-p.context.start.Out <= 1<<32-1 {
		return nil
	}
	*p = RefPlace{}
	return fmt.Errorf("%w: gzip layer with a deflate block of more than 4 GiB", ErrUnsupported)
}

// Append stores the record of a chunk that was read at p and has digest d, or returns that of the equal
// chunk (same digest and size) that the blob already has. Chunks are appended in the order
// in which they were read; Chunk.Blob is 0, as with [BlobWriter.Append].
func (b *RefBuilder) Append(p RefPlace, d Digest) (Chunk, error) { return b.AppendAfter(nil, p, d) }

// AppendAfter is Append for a chunk that follows the chunks before, all of this blob, in files. Where nydusd would
// read an equal chunk wrongly behind one of them, this one gets a record of its own: see [BlobWriter.AppendAfter].
func (b *RefBuilder) AppendAfter(before []Chunk, p RefPlace, d Digest) (Chunk, error) {
	switch {
	case b.closed:
		return Chunk{}, fmt.Errorf("rafs: append to a closed blob")
	case p.of != b:
		return Chunk{}, fmt.Errorf("rafs: a place of another layer, or none")
	}
	return b.writer.append(before, p, d)
}

// Close reads what is left of the layer, writes the table's file to w and returns the blob: ID and CompressedSize
// are those of the layer, MetaBlobDigest and MetaBlobSize those of the file (see [Blob.MetaBlob]). The
// image's Compressor must be CompressorGzip, as the blob's is.
// ErrNoChunks when nothing was appended: then nothing was written. Errors of the layer come back here too.
func (b *RefBuilder) Close(w io.Writer) (Blob, error) {
	if b.closed {
		return Blob{}, fmt.Errorf("rafs: blob closed twice")
	}
	b.closed = true
	if _, err := io.Copy(io.Discard, b); err != nil {
		return Blob{}, err
	}
	if b.src.size > disk.MaxBlobStored {
		return Blob{}, fmt.Errorf("%w: layer of %d bytes: want at most %d", ErrInvalid, b.src.size, uint64(disk.MaxBlobStored))
	}
	blob := Blob{ID: hex.EncodeToString(b.src.sum.Sum(nil)), CompressedSize: uint64(b.src.size)} //nolint:gosec // not negative
	if b.gzip != nil {
		blob.Features |= disk.FeatureZran
	}
	if err := b.writer.write(w, &blob); err != nil {
		return Blob{}, err
	}
	return blob, nil
}
