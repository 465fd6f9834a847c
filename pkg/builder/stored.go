package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// StoredBlob is a blob that lies elsewhere, in a registry perhaps. The image refers to it;
// nothing of it is written. Safe for concurrent use when Open is.
type StoredBlob struct {
	// Descriptor is that of the layer that the blob is in its own image. Digest and size must
	// be those of Blob.
	Descriptor ocispec.Descriptor
	// Blob is its entry in a bootstrap's blob table.
	Blob rafs.Blob
	// Open returns the stored bytes, for the blob's tables, for the chunks that the prefetch
	// blob copies and, with VerifyData, for all chunks. What it returns is closed if it is an io.Closer.
	Open func(ctx context.Context) (io.ReaderAt, error)
}

// check compares the two descriptions.
func (s *StoredBlob) check() error {
	if s.Open == nil {
		return fmt.Errorf("%w: stored blob %s cannot be opened", ErrInvalid, s.Blob.ID)
	}
	if want := digest.NewDigestFromEncoded(digest.SHA256, s.Blob.ID); s.Descriptor.Digest != want {
		return fmt.Errorf("%w: stored blob has digest %s, its bootstrap says %s", ErrInvalid, s.Descriptor.Digest, want)
	}
	if s.Blob.CompressedSize > uint64(s.Descriptor.Size) || s.Descriptor.Size < 0 { //nolint:gosec // not negative
		return fmt.Errorf("%w: stored blob %s has %d bytes, its bootstrap says %d", ErrInvalid, s.Blob.ID, s.Descriptor.Size, s.Blob.CompressedSize)
	}
	return nil
}

// Dict is a chunk dictionary: the chunks of an image that is kept where the result is going
// to be. Chunks that it has are not stored again, but where nydusd would misread them: the result refers to its blobs.
type Dict struct {
	// ID names the dictionary, by its manifest's digest perhaps: the blobs of layers depend on it. It is to stand for More too.
	ID string
	// Image is the dictionary's bootstrap. Its chunk size, version and digester must be the result's, and in v5 its compressor;
	// in v6 that may be another.
	Image *rafs.Image
	// Blobs has one for each of Image.Blobs, in their order.
	Blobs []StoredBlob
	// More are further images. A chunk that several have is taken from the first of them.
	More []*Dict
}

// Features of blobs whose chunks do not stand alone; rafs-format.md, 0.3.
const dependentBlob = 0x8 | 0x10 | 0x40 | 0x80 | 0x100 | 0x800 // zran, separate, tarfs, batch, encrypted, external

// dictKey is what makes two chunks equal.
type dictKey struct {
	digest rafs.Digest
	size   uint32
}

// dict is a dictionary, indexed. Read only.
type dict struct {
	blobs  []StoredBlob           // of all its images, each once
	chunks map[dictKey]rafs.Chunk // Blob is the number in the conversion
}

// find returns the dictionary's chunk; a nil dictionary has none.
func (d *dict) find(sum rafs.Digest, size int) (rafs.Chunk, bool) {
	if d == nil {
		return rafs.Chunk{}, false
	}
	c, ok := d.chunks[dictKey{sum, uint32(size)}] //nolint:gosec // at most the chunk size
	return c, ok
}

// Check says why d cannot be the dictionary of a conversion with o: ErrInvalid for one that contradicts itself,
// ErrUnsupported for other chunks or another version.
func (d *Dict) Check(o Options) error {
	o, err := o.complete()
	if err != nil {
		return err
	}
	return d.check(o)
}

// check is Check for complete options.
func (d *Dict) check(o Options) error {
	switch img := d.Image; {
	case img == nil || len(d.Blobs) != len(img.Blobs):
		return fmt.Errorf("%w: blobs and bootstrap do not belong together", ErrInvalid)
	case img.Version.String() != o.FSVersion.String(): // 0 is a version too
		return fmt.Errorf("%w: it is RAFS v%v, the image is to be v%v", ErrUnsupported, img.Version, o.FSVersion)
	case img.ChunkSize != o.ChunkSize:
		return fmt.Errorf("%w: it has chunks of %d bytes, the image is to have %d", ErrUnsupported, img.ChunkSize, o.ChunkSize)
	case img.Digester != o.Digester:
		return fmt.Errorf("%w: it has digests %v, the image is to have %v", ErrUnsupported, img.Digester, o.Digester)
	case img.Version == rafs.V5 && img.Compressor != o.Compressor: // a v5 image has one for all its blobs
		return fmt.Errorf("%w: it is compressed with %v, the image is to be with %v, and a v5 image has one for all blobs", ErrUnsupported, img.Compressor, o.Compressor)
	}
	for i := range d.Blobs {
		if d.Image.Blobs[i].Features&dependentBlob != 0 {
			continue
		}
		if err := d.Blobs[i].check(); err != nil {
			return err
		}
	}
	for _, m := range d.More {
		if err := m.check(o); err != nil {
			return err
		}
	}
	return nil
}

// maxDictBlobs bounds the blobs of a dictionary: a chunk's number of its blob has 16 bits, and layers have some.
const maxDictBlobs = 1 << 15

// index makes the dictionary ready. first is the conversion's number of its first blob.
// Of equal chunks the first in the tree's order counts.
func (d *Dict) index(o Options, first int) (*dict, error) {
	if d == nil {
		return nil, nil
	}
	if err := d.check(o); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDict, err)
	}
	out := &dict{chunks: map[dictKey]rafs.Chunk{}}
	out.add(d, map[string]int{}, first)
	if n := len(out.blobs); n > maxDictBlobs || first+n > math.MaxUint16 {
		return nil, fmt.Errorf("%w: %w: it has %d blobs, at most %d", ErrDict, ErrUnsupported, n, maxDictBlobs)
	}
	return out, nil
}

// add adds the chunks of d. byID has the places of the blobs so far.
func (d *dict) add(from *Dict, byID map[string]int, first int) {
	for i := range from.Blobs {
		b := &from.Image.Blobs[i]
		n, known := byID[b.ID]
		switch {
		case known && d.blobs[n].Blob != *b:
			continue // two images that say different things of one file
		case !known:
			n = len(d.blobs)
			byID[b.ID] = n
			stored := from.Blobs[i]
			stored.Blob = *b
			d.blobs = append(d.blobs, stored)
		}
		if b.Features&dependentBlob != 0 {
			continue
		}
		for _, c := range from.Image.BlobChunks(i) {
			key := dictKey{c.Digest, c.UncompressedSize}
			if _, ok := d.chunks[key]; !ok && !c.Batch {
				c.Blob = uint16(first + n) //nolint:gosec // index bounds it
				d.chunks[key] = c
			}
		}
	}
	for _, m := range from.More {
		d.add(m, byID, first)
	}
}

// builtBlob is a blob in a file of the conversion, or a stored one.
type builtBlob struct {
	rafs.Blob
	path   string // with layer: of the file that holds the table
	stored *StoredBlob
	layer  *Layer // where the chunks are, when they stay in a layer of the source
	fault  error  // with stored: what an error of reading it is, ErrReuse or ErrDict
}

// open returns the blob's bytes; who closes them must ask whether they can be.
func (b *builtBlob) open(ctx context.Context) (io.ReaderAt, error) {
	if b.stored == nil {
		return os.Open(b.path)
	}
	r, err := b.stored.Open(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: stored blob %s: %w", b.fault, b.ID, err)
	}
	return faultReader{r, b.fault}, nil
}

// faultReader reads a stored blob.
type faultReader struct {
	io.ReaderAt
	fault error
}

// ReadAt reads; its errors are fault, too.
func (r faultReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.ReaderAt.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: %w", r.fault, err)
	}
	return n, err
}

// Close closes the reader, if it can be.
func (r faultReader) Close() error { return closeReader(r.ReaderAt) }

// blame makes err, of what was made of all layers, ErrReuse or ErrDict when bytes are not what they should be and some of them
// are of a record or of the dictionary. Errors of writing are of no such class.
func (c *conversion) blame(err error) error {
	var fault error
	switch {
	case errors.Is(err, ErrReuse), errors.Is(err, ErrDict):
		return err
	case slices.ContainsFunc(c.layers, func(l builtLayer) bool { return l.reused }):
		fault = ErrReuse
	case c.merged && c.res.Stats.DictChunks > 0:
		fault = ErrDict
	default:
		return err // of layers that do not go together, perhaps, which no dictionary is the reason for
	}
	for _, class := range []error{ErrInvalid, ErrDigest, rafs.ErrInvalid, rafs.ErrUnsupported, rafs.ErrDigest, io.ErrUnexpectedEOF} {
		if errors.Is(err, class) {
			return fmt.Errorf("%w: %w", fault, err)
		}
	}
	return err
}

// file describes a blob for a manifest.
func (b *builtBlob) file(sourceLayer int) File {
	if b.layer != nil {
		return b.tableFile(sourceLayer)
	}
	f := File{
		Path: b.path, SourceLayer: sourceLayer,
		Descriptor: ocispec.Descriptor{
			MediaType:   MediaTypeBlob,
			Digest:      digest.NewDigestFromEncoded(digest.SHA256, b.ID),
			Size:        int64(b.CompressedSize), //nolint:gosec // a file's size
			Annotations: map[string]string{AnnotationBlob: "true"},
		},
	}
	if b.stored != nil {
		f.Stored, f.Descriptor.Size = true, b.stored.Descriptor.Size
	}
	return f
}

// numberOf is the conversion's number of the prefetch blob; those of layers are below it,
// those of the dictionary above.
func (c *conversion) prefetchNumber() int { return len(c.src.Layers) }

// blobAt returns the blob with a conversion's number.
func (c *conversion) blobAt(n uint16) *builtBlob {
	if int(n) < len(c.layers) {
		return c.layers[n].blob
	}
	i := int(n) - c.prefetchNumber() - 1
	return &builtBlob{Blob: c.dict.blobs[i].Blob, stored: &c.dict.blobs[i], fault: ErrDict}
}

// numberBlobs makes the blob table: the blobs that files refer to, those of the layers first,
// then those of the dictionary, the prefetch blob last, and points every chunk at its place.
// Layers with the same blob share one entry, and where there are too many the smallest are made one.
func (c *conversion) numberBlobs(ctx context.Context, files []*rafs.Inode, records map[rafs.Digest]rafs.Chunk) ([]rafs.Blob, error) {
	prefetch, dictBlobs := c.prefetchNumber(), 0
	if c.dict != nil {
		dictBlobs = len(c.dict.blobs)
	}
	used := make([]bool, prefetch+1+dictBlobs)
	pointAt(files, records, uint16(prefetch), used) //nolint:gosec // completeLayers bounds it
	if err := c.joinBlobs(ctx, files, used); err != nil {
		return nil, fmt.Errorf("join the blobs of small layers: %w", err)
	}
	t := blobTable{res: c.res, index: make([]uint16, len(used)), byID: map[string]uint16{}}
	for i := range c.layers {
		switch b := c.layers[i].blob; {
		case b != nil && used[i]:
			t.add(i, i, b)
		case b != nil:
			c.res.Stats.BlobsDropped++
		}
	}
	for i := prefetch + 1; i < len(used); i++ {
		if used[i] {
			t.add(i, -1, c.blobAt(uint16(i))) //nolint:gosec // a blob's number
			c.res.Stats.DictBlobs++
		}
	}
	if c.prefetch != nil {
		t.add(prefetch, -1, c.prefetch)
	}
	if len(t.blobs) > rafs.MaxBlobs {
		err := fmt.Errorf("%w: the image needs %d blobs, the format counts %d, and too few of them are of layers to make one of", ErrUnsupported, len(t.blobs), rafs.MaxBlobs)
		if c.res.Stats.DictBlobs > 0 {
			err = fmt.Errorf("%w: %w", ErrDict, err)
		}
		return nil, err
	}
	for _, f := range files {
		for i := range f.Chunks {
			f.Chunks[i].Blob = t.index[f.Chunks[i].Blob]
		}
	}
	return t.blobs, nil
}

// pointAt makes every chunk that has a record one of blob, and marks in used the blobs that chunks are in.
func pointAt(files []*rafs.Inode, records map[rafs.Digest]rafs.Chunk, blob uint16, used []bool) {
	for _, f := range files {
		for i := range f.Chunks {
			if rec, ok := records[f.Chunks[i].Digest]; ok {
				f.Chunks[i] = rec
				f.Chunks[i].Blob = blob
			}
			used[f.Chunks[i].Blob] = true
		}
	}
}

// blobTable is an image's blob table that grows, and the files of the result with it.
type blobTable struct {
	res   *Result
	blobs []rafs.Blob
	index []uint16 // by the number that a blob has while layers are read
	byID  map[string]uint16
}

// add puts b, which has had the number from, behind the others, unless its file is there already. sourceLayer is -1 for a blob that was
// made of no layer.
func (t *blobTable) add(from, sourceLayer int, b *builtBlob) {
	if n, ok := t.byID[b.ID]; ok {
		t.index[from] = n
		return
	}
	t.index[from] = uint16(len(t.blobs)) //nolint:gosec // below the number of layers
	t.byID[b.ID] = t.index[from]
	t.blobs = append(t.blobs, b.Blob)
	f := b.file(sourceLayer)
	t.res.Blobs = append(t.res.Blobs, f)
	if sourceLayer >= 0 {
		t.res.Stats.BlobBytes += f.Descriptor.Size
	}
	if b.layer != nil {
		t.res.Layers = append(t.res.Layers, b.layer.Descriptor)
	}
}

// blobReaders opens blobs when they are first needed. Not safe for concurrent use.
type blobReaders struct {
	dir     string // for what readers put by
	files   []io.ReaderAt
	data    map[string]io.ReaderAt // of blobs, without those of tables
	readers map[string]*rafs.BlobReader
}

func (r *blobReaders) get(ctx context.Context, b *builtBlob) (*rafs.BlobReader, error) {
	if br := r.readers[b.ID]; br != nil {
		return br, nil
	}
	if r.readers == nil {
		r.readers, r.data = map[string]*rafs.BlobReader{}, map[string]io.ReaderAt{}
	}
	open := b.files(ctx)
	br, err := rafs.OpenBlobFrom(func(f rafs.Blob) (io.ReaderAt, error) {
		ra, err := open(f)
		if err == nil {
			r.files = append(r.files, ra)
			if f.ID == b.ID {
				r.data[b.ID] = ra
			}
		}
		return ra, err
	}, b.Blob)
	if err != nil {
		return nil, err
	}
	if b.layer != nil {
		scratch, err := scratchFile(r.dir)
		if err != nil {
			return nil, err
		}
		r.files = append(r.files, scratch)
		br.Spill(scratch)
	}
	r.readers[b.ID] = br
	return br, nil
}

func (r *blobReaders) Close() error {
	var errs []error
	for _, f := range r.files {
		errs = append(errs, closeReader(f))
	}
	return errors.Join(errs...)
}

func closeReader(r io.ReaderAt) error {
	if c, ok := r.(io.Closer); ok {
		return c.Close()
	}
	return nil
}
