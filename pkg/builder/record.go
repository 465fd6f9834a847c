package builder

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// MediaTypeRecord is the media type of layer records: a zstd stream of [recordMagic], a header
// as JSON and the layer's tree.
const MediaTypeRecord = "application/vnd.headstart.layer-record.v1+zstd"

// recordMagic begins a record. Its number changes whenever the form of records or what a
// layer's blob depends on does.
const recordMagic = "headstart layer record 2\n"

// Record is what a later conversion needs to use a layer's blob without reading the layer:
// its tree, and where in the blob its chunks are. See [Layer].Record.
type Record struct {
	Layer  int           // index into Source.Layers
	DiffID digest.Digest // of the layer
	Key    string        // RecordKey of both
	File   File          // the record itself, of MediaTypeRecord
	Blob   *File         // the layer's blob; nil when it has no data
}

// RecordKey returns what a layer's blob is a function of: the layer's tar and those of the
// options that shape blobs. Blobs of equal keys have equal chunks.
func RecordKey(diffID digest.Digest, o Options) string {
	chunk := o.ChunkSize
	if chunk == 0 {
		chunk = rafs.DefaultChunkSize
	}
	dict := "none"
	if o.Dict != nil {
		dict = o.Dict.ID
	}
	version := o.FSVersion
	if version == 0 {
		version = rafs.V6
	}
	text := fmt.Sprintf("%s%s %v %v %v %d %d %s", recordMagic, diffID, version, o.Compressor, o.Digester, chunk, o.BatchSize, dict)
	return digest.FromString(text).Encoded()
}

// recordHeader is the part of a record that is JSON.
type recordHeader struct {
	Key           string        `json:"key"`
	DiffID        digest.Digest `json:"diff_id"`
	Blob          *rafs.Blob    `json:"blob,omitempty"`
	TarBytes      int64         `json:"tar_bytes"`
	XattrsIgnored int           `json:"xattrs_ignored"`
	DictChunks    int           `json:"dict_chunks"`
}

// Flags of chunks in a record.
const (
	recordCompressed = 0x1
	recordBatch      = 0x2
)

// Kinds of entries in a record.
const (
	kindInode  = iota // an inode follows
	kindAgain         // the number of an inode that came before: a hard link
	kindLower         // the number of a hard link to a lower layer
	kindDir           // an inode and a directory's content follow
	kindShared        // an inode follows that may come again
)

// writeRecord writes the record of layer i.
func (c *conversion) writeRecord(i int, l *builtLayer) (_ *File, err error) {
	f, err := os.OpenFile(c.path(fmt.Sprintf("layer-%d.record", i)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	sum := sha256.New()
	count := &countWriter{w: io.MultiWriter(f, sum)}
	h := recordHeader{
		Key: RecordKey(c.src.Layers[i].DiffID, c.o), DiffID: c.src.Layers[i].DiffID,
		TarBytes: l.tarBytes, XattrsIgnored: l.xattrsIgnored, DictChunks: l.dictChunks,
	}
	if l.blob != nil {
		h.Blob = &l.blob.Blob
	}
	if err := errors.Join(encodeRecord(count, h, l.tree, c.prefetchNumber()), f.Close()); err != nil {
		return nil, err
	}
	return &File{Path: f.Name(), SourceLayer: i, Descriptor: ocispec.Descriptor{
		MediaType: MediaTypeRecord, Digest: digest.NewDigest(digest.SHA256, sum), Size: count.n,
	}}, nil
}

func (c *conversion) recordOf(i int, l *builtLayer) Record {
	r := Record{Layer: i, DiffID: c.src.Layers[i].DiffID, Key: RecordKey(c.src.Layers[i].DiffID, c.o), File: *l.record}
	if l.blob != nil {
		f := l.blob.file(i)
		r.Blob = &f
	}
	return r
}

// recordWriter writes a tree. Directories are in sorted order: equal trees, equal bytes.
type recordWriter struct {
	w      *bufio.Writer
	base   int // chunks of blobs above it are the dictionary's
	shared map[*rafs.Inode]struct{}
	ids    map[*rafs.Inode]uint64
	lower  map[*lowerLink]uint64
}

func encodeRecord(w io.Writer, h recordHeader, t *tree, base int) error {
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithWindowSize(1<<20))
	if err != nil {
		return err
	}
	head, err := json.Marshal(h)
	if err != nil {
		return err
	}
	e := &recordWriter{
		w: bufio.NewWriterSize(z, storedBuffer), base: base, shared: t.shared,
		ids: map[*rafs.Inode]uint64{}, lower: map[*lowerLink]uint64{},
	}
	e.w.WriteString(recordMagic)
	e.bytes(head)
	e.uint(uint64(len(t.links)))
	for i, l := range t.links {
		e.lower[l] = uint64(i)
		e.bytes([]byte(l.name))
		e.bytes([]byte(l.target))
		e.inode(l.attrs.inode(0))
	}
	e.entry(t.root)
	return errors.Join(e.w.Flush(), z.Close())
}

func (e *recordWriter) uint(v uint64)  { e.w.Write(binary.AppendUvarint(e.w.AvailableBuffer(), v)) }
func (e *recordWriter) bytes(p []byte) { e.uint(uint64(len(p))); e.w.Write(p) }

func (e *recordWriter) flag(v bool) {
	if v {
		e.uint(1)
		return
	}
	e.uint(0)
}

func (e *recordWriter) entry(n entry) {
	id, again := e.ids[n.ino]
	_, shared := e.shared[n.ino]
	switch {
	case n.link != nil:
		e.uint(kindLower)
		e.uint(e.lower[n.link])
	case n.dir != nil:
		e.uint(kindDir)
		e.inode(n.ino)
		e.dir(n.dir)
	case shared && again:
		e.uint(kindAgain)
		e.uint(id)
	case shared:
		e.ids[n.ino] = uint64(len(e.ids))
		e.uint(kindShared)
		e.inode(n.ino)
	default:
		e.uint(kindInode)
		e.inode(n.ino)
	}
}

func (e *recordWriter) dir(d *dir) {
	e.flag(d.opaque)
	e.flag(d.explicit)
	e.uint(uint64(len(d.whiteouts)))
	for _, name := range slices.Sorted(maps.Keys(d.whiteouts)) {
		e.bytes([]byte(name))
	}
	e.uint(uint64(d.len())) //nolint:gosec // not negative
	for _, name := range d.sorted() {
		e.bytes([]byte(name))
		e.entry(d.get(name))
	}
}

func (e *recordWriter) inode(ino *rafs.Inode) {
	for _, v := range []uint32{ino.Mode, ino.UID, ino.GID, ino.MtimeNsec, ino.Rdev} {
		e.uint(uint64(v))
	}
	e.w.Write(binary.AppendVarint(e.w.AvailableBuffer(), ino.Mtime))
	e.uint(ino.Size)
	e.bytes([]byte(ino.Target))
	e.uint(uint64(len(ino.Xattrs)))
	for _, x := range ino.Xattrs {
		e.bytes([]byte(x.Name))
		e.bytes(x.Value)
	}
	e.uint(uint64(len(ino.Chunks)))
	for i := range ino.Chunks {
		c := &ino.Chunks[i]
		e.w.Write(c.Digest[:])
		blob := uint64(0) // the layer's own
		if int(c.Blob) > e.base {
			blob = uint64(int(c.Blob) - e.base) //nolint:gosec // positive
		}
		e.uint(blob)
		flags := uint64(0)
		if c.Compressed {
			flags |= recordCompressed
		}
		if c.Batch {
			flags |= recordBatch
		}
		e.uint(flags)
		for _, v := range []uint64{uint64(c.Index), c.CompressedOffset, c.UncompressedOffset, uint64(c.CompressedSize), uint64(c.UncompressedSize)} {
			e.uint(v)
		}
	}
}

// readRecord makes of a record what reading layer i would have made.
func (c *conversion) readRecord(ctx context.Context, i int) (_ builtLayer, err error) {
	src := c.src.Layers[i]
	rc, err := src.Record(ctx)
	if err != nil {
		return builtLayer{}, fmt.Errorf("open the layer's record: %w", err)
	}
	defer func() { err = errors.Join(err, rc.Close()) }()
	h, t, err := decodeRecord(rc, i, c.prefetchNumber(), c.dict)
	if err != nil {
		return builtLayer{}, fmt.Errorf("the layer's record: %w", err)
	}
	if want := RecordKey(src.DiffID, c.o); h.Key != want || h.DiffID != src.DiffID {
		return builtLayer{}, fmt.Errorf("the layer's record: %w: it is of %s with key %s, want %s with key %s", ErrInvalid, h.DiffID, h.Key, src.DiffID, want)
	}
	l := builtLayer{tree: t, tarBytes: h.TarBytes, xattrsIgnored: h.XattrsIgnored, dictChunks: h.DictChunks, reused: true}
	switch {
	case (h.Blob == nil) != (src.Stored == nil):
		return builtLayer{}, fmt.Errorf("the layer's record: %w: record and stored blob do not belong together", ErrInvalid)
	case h.Blob != nil:
		stored := *src.Stored
		stored.Blob = *h.Blob
		if err := stored.check(); err != nil {
			return builtLayer{}, err
		}
		l.blob = &builtBlob{Blob: *h.Blob, stored: &stored, fault: ErrReuse}
	}
	c.progress(Event{Stage: StageLayer, Layer: i, Done: src.Descriptor.Size, Total: src.Descriptor.Size})
	return l, nil
}
