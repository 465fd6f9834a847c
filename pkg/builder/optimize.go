package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// NydusSource is an existing Nydus image to optimize: a published one, or a bare bootstrap.
// It is read, never changed.
type NydusSource struct {
	// Manifest and Config are the documents as stored, ManifestDescriptor describes the
	// first. All are empty for a bare bootstrap: then the result has no documents either.
	Manifest, Config   []byte
	ManifestDescriptor ocispec.Descriptor
	// BootstrapLayer is the image's last layer. Descriptor, DiffID and Open must be set when Manifest is.
	BootstrapLayer Layer
	// Bootstrap is a bare bootstrap of BootstrapSize bytes, when Manifest is empty.
	Bootstrap     io.ReaderAt
	BootstrapSize int64

	// OpenBlob gives the reader of a blob. It is called once for each blob that a chunk is
	// needed of; whoever calls Optimize closes what it opened, afterwards.
	OpenBlob func(ctx context.Context, b rafs.Blob) (*rafs.BlobReader, error)
	// Fetch, when set, is told the ranges of a blob's stored bytes before they are read
	// from the reader of OpenBlob, so that they can be had with few requests. The ranges ascend
	// and do not overlap.
	Fetch func(ctx context.Context, b rafs.Blob, ranges []StoredRange) error
}

// StoredRange is the half-open range [Offset, Offset+Length) of a blob file, in bytes.
type StoredRange struct{ Offset, Length int64 }

// OptimizeOptions say how an image is optimized; the zero value is the default. Chunk size,
// digester and RAFS version are those of the image, and cannot be chosen.
type OptimizeOptions struct {
	// List is the access list the prefetch blob is made from.
	List *persist.List
	// Workers is the number of goroutines that read, digest and compress, at most [MaxWorkers]; 0 means
	// GOMAXPROCS. It never changes the output.
	Workers int
	// Recompress compresses the chunks anew with the strongest level where that is smaller.
	// Without it they are copied as they are stored, wherever that form stands alone.
	Recompress bool
	// BatchSize makes batches in the prefetch blob: chunks below half of it are compressed together, as many as
	// stay below it. A power of two in [rafs.MinChunkSize, rafs.MaxChunkSize]; 0 means no batches. RAFS v6 only.
	// nydusd before 2.3 refuses such images.
	BatchSize uint32
	// MarkPrefetchBlob sets the feature 0x400 on the prefetch blob. Readers before Nydus 2.4
	// refuse an image that has it.
	MarkPrefetchBlob bool
	// TempDir is where the result's files are made; empty means os.TempDir.
	TempDir string
	// Progress, when set, is told how far the work is, by one goroutine at a time.
	Progress func(Event)
}

// Optimized is an optimized image in temporary files. It is not changed after [Optimize]
// returned it and safe for concurrent use, except for Close.
type Optimized struct {
	// Prefetch is the new blob; nil when the list names no data of the image.
	Prefetch *File
	// Bootstrap is the new last layer; its zero value for a bare bootstrap.
	Bootstrap File
	// BootstrapPath is the bare bootstrap file.
	BootstrapPath string
	// Blobs are the bootstrap's blobs, in its order.
	Blobs []rafs.Blob
	// Kept are the layers of the source that remain, in order.
	Kept []ocispec.Descriptor
	// Config and Manifest are the JSON documents of the image; nil for a bare bootstrap.
	Config, Manifest                     []byte
	ConfigDescriptor, ManifestDescriptor ocispec.Descriptor
	Stats                                OptimizeStats

	dir *workDir
}

// OptimizeStats tells what became of the list and what was written.
type OptimizeStats struct {
	Prefetch     PrefetchStats
	MissingPaths []string // the first of the listed paths that are not in the image, at most [MaxMissingPaths]

	SourceBlobs    int   // blobs that chunks were read from
	Dropped        int   // blobs of the source that nothing refers to any more
	BootstrapBytes int64 // bytes of the bare bootstrap
	VerifiedChunks int   // chunks of the prefetch blob that were read back and digested
	Files          int   // regular files of the image; hard links count as one
}

// MaxMissingPaths bounds MissingPaths of [Stats] and [OptimizeStats].
const MaxMissingPaths = 8

// Close removes the files of r. It may be called more than once.
func (r *Optimized) Close() error { return r.dir.remove() }

// Optimize gives a Nydus image a prefetch blob: copies of the chunks that o.List names, in
// its order, each once. The bootstrap is written anew so that every file refers to the
// copies; the image's other blobs stay as they are and only the chunks needed are read,
// each verified by its digest. A blob that nothing refers to any more, such as an earlier
// prefetch blob, is left out of the result.
//
// Listed paths are resolved as opening them would. In a list that no engine recorded, a directory
// without ranges stands for all files below it, as in Nydus' prefetch patterns, and a path that is not in
// the image and has one of *?[ is a pattern: of [path.Match] for each element, [!…] as in a shell, and ** for any
// number of directories; symlinks that match an element are followed. In a recorded list a directory stands for itself and has no data.
//
// The result has been read back and verified; on error nothing is left on disk. Errors are
// ErrInvalid, ErrUnsupported and ErrDigest for what is wrong with src, those of [rafs], and the
// context's soon after it ended.
func Optimize(ctx context.Context, src NydusSource, o OptimizeOptions) (_ *Optimized, err error) {
	switch b := o.BatchSize; {
	case b != 0 && (b&(b-1) != 0 || b < rafs.MinChunkSize || b > rafs.MaxChunkSize):
		return nil, fmt.Errorf("%w: batch size %d: want a power of two from %d to %d", ErrUnsupported, b, rafs.MinChunkSize, rafs.MaxChunkSize)
	}
	if o.Workers, err = settleWorkers(o.Workers); err != nil {
		return nil, err
	}
	if o.List == nil {
		o.List = &persist.List{}
	}
	dir, err := makeWorkDir(o.TempDir)
	if err != nil {
		return nil, fmt.Errorf("make a directory for the result: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, dir.remove())
		}
	}()
	c := &optimization{src: src, o: o, dir: dir.path, res: &Optimized{dir: dir}}
	if err := c.run(ctx); err != nil {
		if ctxErr := context.Cause(ctx); ctxErr != nil {
			return nil, ctxErr // whatever broke, it broke because of this
		}
		return nil, err
	}
	return c.res, nil
}

// optimization is the state of one call of Optimize.
type optimization struct {
	src NydusSource
	o   OptimizeOptions
	dir string
	res *Optimized

	doc    *nydusDocument // nil for a bare bootstrap
	extras []extraFile    // what the bootstrap layer holds beside the bootstrap
	before []rafs.Blob    // the source's blobs
	img    *rafs.Image
	blob   *builtBlob // the prefetch blob, nil when there is none
	copies *copies    // of blob
}

func (c *optimization) progress(e Event) {
	if c.o.Progress != nil {
		c.o.Progress(e)
	}
}

func (c *optimization) run(ctx context.Context) error {
	if err := c.open(ctx); err != nil {
		return err
	}
	plan := planPrefetch(c.img.Root, c.o.List, c.img.ChunkSize)
	c.res.Stats.MissingPaths = plan.missing
	var files []*rafs.Inode
	c.eachFile(func(ino *rafs.Inode) { files = append(files, ino) })
	if err := plan.follow(ctx, files); err != nil {
		return err
	}
	records, err := c.writeBlob(ctx, plan)
	if err != nil {
		return fmt.Errorf("prefetch blob: %w", err)
	}
	c.res.Stats.Prefetch = plan.stats
	if err := c.refer(records); err != nil {
		return err
	}
	c.img.Prefetch = plan.inodes
	c.progress(Event{Stage: StageBootstrap})
	if err := c.writeBootstrap(); err != nil {
		return fmt.Errorf("bootstrap: %w", err)
	}
	c.progress(Event{Stage: StageVerify})
	return c.complete(ctx)
}

// complete verifies what was written, and meanwhile packs it into documents and a layer, if the source has them.
func (c *optimization) complete(ctx context.Context) error {
	want := summarize(c.img)
	c.img = nil // for the garbage collector
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := c.verify(ctx, want); err != nil {
			return fmt.Errorf("verify the result: %w", err)
		}
		return nil
	})
	if c.doc != nil {
		g.Go(func() error {
			if err := c.describe(ctx); err != nil {
				return fmt.Errorf("bootstrap layer: %w", err)
			}
			return nil
		})
	}
	return g.Wait()
}

// open reads the source's documents and its bootstrap.
func (c *optimization) open(ctx context.Context) error {
	r, size := c.src.Bootstrap, c.src.BootstrapSize
	if c.src.Manifest != nil {
		var err error
		if c.doc, err = parseNydusDocument(c.src.Manifest, c.src.Config); err != nil {
			return err
		}
		f, n, err := c.unpackBootstrap(ctx)
		if err != nil {
			return fmt.Errorf("bootstrap layer %s: %w", c.src.BootstrapLayer.Descriptor.Digest, err)
		}
		defer f.Close() //nolint:errcheck // only read
		r, size = f, n
	}
	var err error
	if c.img, err = rafs.Open(r, size); err != nil {
		return err
	}
	if c.img.Version == rafs.V5 && c.o.BatchSize > 0 {
		return fmt.Errorf("%w: batches of %d bytes in RAFS v%v", ErrUnsupported, c.o.BatchSize, c.img.Version)
	}
	return c.settle()
}

// settle makes of the image as it was read one that can be written.
func (c *optimization) settle() error {
	for i := range c.img.Blobs {
		// The bootstrap that stands alone is inlined nowhere, and readers that find the bit take
		// the blob's id from the bootstrap's file name. nydus-image clears it when it rebuilds one.
		c.before = append(c.before, c.img.Blobs[i])
		c.img.Blobs[i].Features &^= rafs.FeatureInlinedBootstrap
	}
	var err error
	c.eachFile(func(ino *rafs.Inode) {
		for i := range ino.Chunks {
			if ino.Chunks[i].Digest == (rafs.Digest{}) {
				err = fmt.Errorf("%w: chunks without digests, as tarfs images have them", ErrUnsupported)
			}
		}
	})
	c.eachInode(func(ino *rafs.Inode) {
		// nydus-image writes them in any order, our writer by name.
		slices.SortFunc(ino.Xattrs, func(a, b rafs.Xattr) int { return strings.Compare(a.Name, b.Name) })
	})
	return err
}

// refer makes the blob table: what files still refer to, and the prefetch blob last. Every
// chunk that has a copy is pointed at it, in unlisted files too: fewer bytes are needed then.
func (c *optimization) refer(records map[rafs.Digest]rafs.Chunk) error {
	old := c.img.Blobs
	prefetch := len(old)
	used := make([]bool, prefetch+1)
	c.eachFile(func(ino *rafs.Inode) {
		c.res.Stats.Files++
		for i := range ino.Chunks {
			if rec, ok := records[ino.Chunks[i].Digest]; ok {
				ino.Chunks[i] = rec
				ino.Chunks[i].Blob = uint16(prefetch) //nolint:gosec // at most 255 blobs are read
			}
			used[ino.Chunks[i].Blob] = true
		}
	})
	index := make([]uint16, len(used))
	c.img.Blobs = nil
	for i, b := range old {
		if !used[i] {
			c.res.Stats.Dropped++
			continue
		}
		index[i] = uint16(len(c.img.Blobs)) //nolint:gosec // at most 255
		c.img.Blobs = append(c.img.Blobs, b)
	}
	if c.blob != nil {
		index[prefetch] = uint16(len(c.img.Blobs)) //nolint:gosec // at most 255
		c.img.Blobs = append(c.img.Blobs, c.blob.Blob)
	}
	if len(c.img.Blobs) > rafs.MaxBlobs {
		return fmt.Errorf("%w: with the prefetch blob the image needs %d blobs, the format counts %d", ErrUnsupported, len(c.img.Blobs), rafs.MaxBlobs)
	}
	c.eachFile(func(ino *rafs.Inode) {
		for i := range ino.Chunks {
			ino.Chunks[i].Blob = index[ino.Chunks[i].Blob]
		}
	})
	c.res.Blobs = slices.Clone(c.img.Blobs)
	return nil
}

// eachFile calls f once for each regular file.
func (c *optimization) eachFile(f func(*rafs.Inode)) {
	c.eachInode(func(ino *rafs.Inode) {
		if ino.IsRegular() {
			f(ino)
		}
	})
}

// eachInode calls f once for each inode.
func (c *optimization) eachInode(f func(*rafs.Inode)) {
	seen := map[*rafs.Inode]struct{}{}
	stack := []*rafs.Inode{c.img.Root}
	for len(stack) > 0 {
		dir := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		f(dir)
		for _, d := range dir.Children {
			if d.Inode.IsDir() {
				stack = append(stack, d.Inode)
			} else if _, ok := seen[d.Inode]; !ok {
				seen[d.Inode] = struct{}{}
				f(d.Inode)
			}
		}
	}
}
