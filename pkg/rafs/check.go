package rafs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// CheckOptions says how deep [Check] looks. The zero value checks structure only.
type CheckOptions struct {
	Data      bool // read every chunk of the tree and compare its digest; hash each blob file and its sections
	Workers   int  // goroutines that read and decompress chunks; 0: GOMAXPROCS
	MaxFaults int  // stop after so many faults; 0: 100
	// Scratch gives room for what [BlobReader.Spill] puts by, which else is in memory: 32 KiB for every 512 KiB of a large gzip
	// layer that chunks lie in. It is called at most once for a blob. Check closes what it gives if that is an io.Closer.
	Scratch func() (Scratch, error)
}

// Report is what [Check] saw.
type Report struct {
	Inodes       int   `json:"inodes"` // distinct ones
	Files        int   `json:"files"`  // distinct regular files
	Dirs         int   `json:"dirs"`
	Symlinks     int   `json:"symlinks"`
	Blobs        int   `json:"blobs"`
	Chunks       int   `json:"chunks"`        // distinct ones that files use
	FileBytes    int64 `json:"file_bytes"`    // of distinct regular files
	CheckedBytes int64 `json:"checked_bytes"` // chunk bytes whose digest was compared
}

// Check verifies an image: the tables as the readers of the format do, the tree with its link counts, reserved
// bytes, and for every blob its size, its blob.meta table against the chunk table, and its table of
// contents; with o.Data every chunk's digest and every blob's id too.
//
// open gives the blob file of b and Check closes it if it is an io.Closer; a blob that it gives nil for,
// without an error, is left out, and with a nil open the bootstrap is checked alone. Sizes are compared where the file tells its own (Size or Stat).
// The error joins all faults found, at most o.MaxFaults, each a [*FormatError] or wrapping
// one where it is about bytes; ctx.Err() when cancelled. Memory is that of [Open] plus a chunk per worker.
func Check(ctx context.Context, bootstrap io.ReaderAt, size int64, open func(b Blob) (io.ReaderAt, error), o CheckOptions) (Report, error) {
	if o.MaxFaults <= 0 {
		o.MaxFaults = 100
	}
	if o.Workers <= 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	c := &checker{options: o, faults: faultList{limit: o.MaxFaults, links: true}}
	err := c.run(ctx, bootstrap, size, open)
	if err != nil && !errors.Is(err, errTooManyFaults) {
		c.faults.faults = append(c.faults.faults, err)
	}
	c.report.CheckedBytes = c.checked.Load()
	if err := c.faults.err(); err != nil {
		return c.report, fmt.Errorf("check image: %w", err)
	}
	return c.report, nil
}

type checker struct {
	options CheckOptions
	report  Report
	checked atomic.Int64

	mu     sync.Mutex // guards faults
	faults faultList
}

// add records a fault; the result is not nil when it is time to stop.
func (c *checker) add(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.faults.add(err)
}

func (c *checker) run(ctx context.Context, bootstrap io.ReaderAt, size int64, open func(b Blob) (io.ReaderAt, error)) error {
	reader, err := openBootstrap(bootstrap, size)
	if err != nil {
		return err
	}
	if err := reader.checkTables(&c.faults); err != nil {
		return err
	}
	var t tally
	img, table, err := reader.load(&c.faults, &t)
	if err != nil {
		return err
	}
	// In the order of places: blob by blob, and inside each as the chunks are stored.
	slices.SortFunc(table, func(a, b Chunk) int { return cmp.Compare(chunkID(a.Blob, a.Index), chunkID(b.Blob, b.Index)) })
	c.count(&t, img, table)
	if open == nil {
		return nil
	}
	blobs := img.Blobs
	for i := range blobs {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, _ := findChunk(table, chunkID(uint16(i+1), 0))
		if i+1 == len(blobs) {
			n = len(table)
		}
		if err := c.openBlob(ctx, blobs[i], table[:n], open); err != nil {
			return err
		}
		table = table[n:]
	}
	return nil
}

// findChunk returns where in a sorted table the chunk is, or would be.
func findChunk(table []Chunk, id uint32) (int, bool) {
	return slices.BinarySearchFunc(table, id, func(c Chunk, id uint32) int { return cmp.Compare(chunkID(c.Blob, c.Index), id) })
}

// tally counts what a tree has while it is read.
type tally struct {
	inodes, files, dirs, symlinks int
	fileBytes                     int64
	used                          bitset // the chunk table's records that files use, by place; nil: all
}

// add counts an inode that was met first.
func (t *tally) add(ino *Inode) {
	t.inodes++
	switch fileType(ino.Mode) {
	case modeDir:
		t.dirs++
	case modeSymlink:
		t.symlinks++
	case modeRegular:
		t.files++
		t.fileBytes += clampOffset(ino.Size)
	}
}

// count fills in the report. table is sorted.
func (c *checker) count(t *tally, img *Image, table []Chunk) {
	r := &c.report
	r.Blobs = len(img.Blobs)
	r.Inodes, r.Files, r.Dirs, r.Symlinks, r.FileBytes = t.inodes, t.files, t.dirs, t.symlinks, t.fileBytes
	if t.used != nil {
		r.Chunks = t.used.count()
		return
	}
	for i := range table {
		if i == 0 || chunkID(table[i-1].Blob, table[i-1].Index) != chunkID(table[i].Blob, table[i].Index) {
			r.Chunks++
		}
	}
}

// errLeftOut means that the caller gave no file for a blob.
var errLeftOut = errors.New("left out")

func (c *checker) openBlob(ctx context.Context, b Blob, chunks []Chunk, open func(b Blob) (io.ReaderAt, error)) (err error) {
	var files []io.ReaderAt
	defer func() {
		for _, r := range files {
			if closer, ok := r.(io.Closer); ok {
				err = errors.Join(err, closer.Close())
			}
		}
	}()
	reader, err := OpenBlobFrom(func(b Blob) (io.ReaderAt, error) {
		r, err := open(b)
		if err != nil {
			return nil, fmt.Errorf("open blob %s: %w", short(b.ID), err)
		}
		if r == nil {
			return nil, errLeftOut
		}
		files = append(files, r)
		return r, nil
	}, b)
	if errors.Is(err, errLeftOut) {
		return nil
	}
	if err != nil {
		return c.add(err)
	}
	if c.options.Data && c.options.Scratch != nil && reader.Spills() {
		scratch, err := c.options.Scratch()
		if err != nil {
			return fmt.Errorf("room for the dictionaries of blob %s: %w", short(b.ID), err)
		}
		files = append(files, scratch)
		reader.Spill(scratch)
	}
	return c.blob(ctx, reader, chunks)
}

// blob checks one blob with its table.
func (c *checker) blob(ctx context.Context, r *BlobReader, chunks []Chunk) error {
	b := r.blob
	if size, ok := sizeOf(r.r); ok && size < b.CompressedSize {
		return c.add(invalid("blob "+short(b.ID), -1, "file size", size, fmt.Sprintf("at least %d", b.CompressedSize)))
	}
	metaBlob, separate := b.MetaBlob()
	if size, ok := sizeOf(r.metaFile); ok && separate && metaBlob.CompressedSize != 0 && size != metaBlob.CompressedSize {
		return c.add(invalid("blob "+short(metaBlob.ID), -1, "file size", size, metaBlob.CompressedSize))
	}
	if b.hasMeta() {
		if err := c.meta(r, chunks); err != nil {
			return err
		}
		if err := c.sections(ctx, b, r.metaFile); err != nil {
			return err
		}
	}
	if !c.options.Data {
		return nil
	}
	if separate {
		metaBlob.Features = b.Features
		if err := c.add(checkBlobID(ctx, metaBlob, r.metaFile)); err != nil {
			return err
		}
	}
	return c.data(ctx, r, chunks)
}

// sizeOf returns the size of r if it tells it.
func sizeOf(r io.ReaderAt) (uint64, bool) {
	var size int64
	switch s := r.(type) {
	case interface{ Size() int64 }:
		size = s.Size()
	case interface{ Stat() (fs.FileInfo, error) }:
		info, err := s.Stat()
		if err != nil || !info.Mode().IsRegular() {
			return 0, false
		}
		size = info.Size()
	default:
		return 0, false
	}
	return uint64(max(size, 0)), true
}

// meta compares every blob.meta record with the rules and with the chunk table.
func (c *checker) meta(r *BlobReader, chunks []Chunk) error {
	t, err := r.table()
	if err != nil {
		return c.add(err)
	}
	for i := range t.count {
		if err := c.add(t.check(i)); err != nil {
			return err
		}
	}
	for _, chunk := range chunks {
		if err := c.add(t.compare(chunk)); err != nil {
			return err
		}
	}
	return nil
}

// compare holds a record of the chunk table against that of blob.meta.
func (t *metaTable) compare(c Chunk) error {
	section := fmt.Sprintf("blob.meta record %d of %s", c.Index, short(t.blob.ID))
	if c.Index >= t.count {
		return invalid(section, -1, "index", c.Index, fmt.Sprintf("below %d", t.count))
	}
	at := int64(c.Index) * int64(t.size)
	r := t.record(c.Index)
	got := [4]uint64{r.uncompressedOffset, uint64(r.uncompressedSize), r.compressedOffset, uint64(r.compressedSize)}
	want := [4]uint64{c.UncompressedOffset, uint64(c.UncompressedSize), c.CompressedOffset, uint64(c.CompressedSize)}
	if r.batch { // the chunk table has no compressed place of batched chunks
		got[2], got[3], want[2], want[3] = 0, 0, 0, 0
	}
	if got != want {
		return invalid(section, at, "uncompressed offset and size, compressed offset and size", got, want)
	}
	if !r.batch && r.compressed != c.Compressed {
		return invalid(section, at, "compressed", r.compressed, c.Compressed)
	}
	return nil
}

// data reads all chunks, in order of place, and compares their digests, and that of the whole file.
func (c *checker) data(ctx context.Context, r *BlobReader, chunks []Chunk) error {
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(c.options.Workers)
	group.Go(func() error {
		err := checkBlobID(groupCtx, r.blob, r.r)
		if ctxErr := groupCtx.Err(); ctxErr != nil {
			return ctxErr
		}
		return c.add(err)
	})
	readers := sync.Pool{New: func() any { return new(runReader) }}
	for len(chunks) > 0 && groupCtx.Err() == nil {
		var next run
		next, chunks = r.nextRun(chunks)
		group.Go(func() error {
			reader, _ := readers.Get().(*runReader)
			defer readers.Put(reader)
			return reader.read(groupCtx, r, next, func(size int, err error) error {
				switch {
				case groupCtx.Err() != nil:
					return groupCtx.Err()
				case err != nil:
					return c.add(err)
				}
				c.checked.Add(int64(size))
				return nil
			})
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}
