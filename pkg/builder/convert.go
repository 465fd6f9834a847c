package builder

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

const (
	blobBuffer = 256 << 10 // bytes written to a blob file at once

	// layersAtOnce hides the ends of layers, where not all workers have something to do.
	layersAtOnce = 2
)

// Convert reads the layers of src, merges them, and writes the RAFS image that o asks
// for. The image has been read back and verified when Convert returns; the caller closes
// the Result. On error nothing is left on disk; what killed builders have left in
// o.TempDir is removed first. It returns ErrInvalid, ErrUnsupported or ErrDigest for what
// is wrong with src, and the context's error soon after it ended.
func Convert(ctx context.Context, src Source, o Options) (_ *Result, err error) {
	o, err = o.complete()
	if err != nil {
		return nil, err
	}
	cfg, err := parseConfig(src.Config)
	if err != nil {
		return nil, err
	}
	src.Layers, err = completeLayers(src.Layers, cfg.diffIDs)
	if err != nil {
		return nil, err
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
	c := &conversion{src: src, o: o, dir: dir.path, res: &Result{dir: dir}}
	if c.dict, err = o.Dict.index(o, c.prefetchNumber()+1); err != nil {
		return nil, err
	}
	if err := c.run(ctx, cfg); err != nil {
		if ctxErr := context.Cause(ctx); ctxErr != nil {
			return nil, ctxErr // whatever broke, it broke because of this
		}
		return nil, err
	}
	return c.res, nil
}

// complete returns o with defaults filled in, or what is wrong with it.
func (o Options) complete() (Options, error) {
	switch o.FSVersion {
	case rafs.V5, rafs.V6:
	case 0:
		o.FSVersion = rafs.V6
	default:
		return Options{}, fmt.Errorf("%w: RAFS version %v, want 5 or 6", ErrUnsupported, o.FSVersion)
	}
	if o.ChunkSize == 0 {
		o.ChunkSize = rafs.DefaultChunkSize
	}
	if o.ChunkSize < rafs.MinChunkSize || o.ChunkSize > rafs.MaxChunkSize || o.ChunkSize&(o.ChunkSize-1) != 0 {
		return Options{}, fmt.Errorf("%w: chunk size %d, want a power of two from %d to %d", ErrUnsupported, o.ChunkSize, rafs.MinChunkSize, rafs.MaxChunkSize)
	}
	switch o.Compressor {
	case rafs.CompressorNone, rafs.CompressorLZ4, rafs.CompressorGzip, rafs.CompressorZstd:
	default:
		return Options{}, fmt.Errorf("%w: compressor %v, want zstd, gzip, lz4 or none", ErrUnsupported, o.Compressor)
	}
	if err := o.checkGzip(); err != nil {
		return Options{}, err
	}
	if o.Digester != rafs.DigesterBLAKE3 && o.Digester != rafs.DigesterSHA256 {
		return Options{}, fmt.Errorf("%w: digester %v, want blake3 or sha256", ErrUnsupported, o.Digester)
	}
	for _, size := range []uint32{o.BatchSize, o.PrefetchBatchSize} {
		switch {
		case size == 0:
		case size < rafs.MinChunkSize || size > rafs.MaxChunkSize || size&(size-1) != 0:
			return Options{}, fmt.Errorf("%w: batch size %d, want a power of two from %d to %d", ErrUnsupported, size, rafs.MinChunkSize, rafs.MaxChunkSize)
		case o.FSVersion != rafs.V6:
			return Options{}, fmt.Errorf("%w: batches in RAFS v%v", ErrUnsupported, o.FSVersion)
		}
	}
	if err := o.completeRef(); err != nil {
		return Options{}, err
	}
	var err error
	if o.Workers, err = settleWorkers(o.Workers); err != nil {
		return Options{}, err
	}
	return o, nil
}

// checkGzip refuses what gzip chunks do not go with: a v6 record of one says sizes below 16 MiB only.
func (o *Options) checkGzip() error {
	switch {
	case o.Compressor != rafs.CompressorGzip:
		return nil
	case o.FSVersion == rafs.V6 && o.ChunkSize == rafs.MaxChunkSize:
		return fmt.Errorf("%w: compressor gzip with chunks of %d bytes, want at most %d", ErrUnsupported, o.ChunkSize, o.ChunkSize/2)
	}
	return nil
}

// completeLayers returns layers with their diff IDs, which must be those of the config.
func completeLayers(layers []Layer, diffIDs []digest.Digest) ([]Layer, error) {
	if len(layers) != len(diffIDs) {
		return nil, fmt.Errorf("%w: the manifest has %d layers, the config %d diff IDs", ErrInvalid, len(layers), len(diffIDs))
	}
	if len(layers) >= math.MaxUint16 {
		return nil, fmt.Errorf("%w: %d layers", ErrUnsupported, len(layers))
	}
	out := make([]Layer, len(layers))
	for i, l := range layers {
		if l.DiffID == "" {
			l.DiffID = diffIDs[i]
		}
		if l.DiffID != diffIDs[i] {
			return nil, fmt.Errorf("%w: layer %d: diff ID is %s, the config says %s", ErrInvalid, i, l.DiffID, diffIDs[i])
		}
		out[i] = l
	}
	return out, nil
}

// conversion is the state of one call of Convert.
type conversion struct {
	src Source
	o   Options
	dir string
	res *Result

	layers   []builtLayer
	prefetch *builtBlob
	copies   *copies // of prefetch
	dict     *dict   // nil: none
	merged   bool    // the layers are one tree

	mu sync.Mutex // guards calls of o.Progress
}

// builtLayer is what one layer came to.
type builtLayer struct {
	tree          *tree
	blob          *builtBlob // nil when the layer has no data
	tarBytes      int64
	xattrsIgnored int
	dictChunks    int   // chunks that the dictionary has
	cut           int   // chunks that lie in two gzip members
	record        *File // nil: none was asked for
	reused        bool
}

func (c *conversion) progress(e Event) {
	if c.o.Progress == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.o.Progress(e)
}

func (c *conversion) path(name string) string { return filepath.Join(c.dir, name) }

// run does the work, stage by stage.
func (c *conversion) run(ctx context.Context, cfg sourceConfig) error {
	if err := c.buildLayers(ctx); err != nil {
		return err
	}
	if err := c.assemble(ctx, cfg); err != nil {
		return c.blame(err)
	}
	return nil
}

// assemble makes the image of the layers.
func (c *conversion) assemble(ctx context.Context, cfg sourceConfig) error {
	merged := newTree()
	for i := range c.layers {
		l := &c.layers[i]
		if err := merged.merge(l.tree); err != nil {
			return c.layerError(i, err)
		}
		l.tree = nil
		st := &c.res.Stats
		st.DictChunks += l.dictChunks
		if l.reused {
			st.LayersReused++
		} else {
			st.SourceBytes += c.src.Layers[i].Descriptor.Size
		}
		if l.record != nil {
			c.res.Records = append(c.res.Records, c.recordOf(i, l))
		}
		st.TarBytes += l.tarBytes
		st.XattrsIgnored += l.xattrsIgnored
		st.CutChunks += l.cut
		if l.blob != nil {
			st.Chunks += int(l.blob.ChunkCount)
		}
	}
	c.merged = true
	final := merged.finalize()
	plan := planPrefetch(final.root, c.o.List, c.o.ChunkSize)
	c.res.Stats.Entries, c.res.Stats.Files = final.entries, len(final.files)
	for _, f := range final.files {
		c.res.Stats.FileBytes += int64(f.Size) //nolint:gosec // came from an int64
	}
	if err := plan.follow(ctx, final.files); err != nil {
		return err
	}
	records, err := c.writePrefetch(ctx, plan)
	if err != nil {
		return fmt.Errorf("prefetch blob: %w", err)
	}
	c.res.Stats.Prefetch, c.res.Stats.MissingPaths = plan.stats, plan.missing
	blobs, err := c.numberBlobs(ctx, final.files, records)
	if err != nil {
		return err
	}
	img := &rafs.Image{
		Version: c.o.FSVersion, Root: final.root, Blobs: blobs, ChunkSize: c.o.ChunkSize,
		Compressor: c.o.imageCompressor(), Digester: c.o.Digester, Prefetch: plan.inodes,
	}
	c.progress(Event{Stage: StageBootstrap})
	if err := c.writeBootstrap(img); err != nil {
		return fmt.Errorf("bootstrap: %w", err)
	}
	collectTree(final.entries) // the plan of the bootstrap
	want, chunks := summarize(img), c.chunksToVerify(img)
	c.progress(Event{Stage: StageVerify})
	return c.complete(ctx, cfg, want, chunks)
}

// complete verifies what was written, and meanwhile packs the bootstrap; then it writes
// the documents of the image.
func (c *conversion) complete(ctx context.Context, cfg sourceConfig, want summary, chunks []blobChunks) error {
	collectTree(want.entries)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := c.verifyBootstrap(ctx, want); err != nil {
			return fmt.Errorf("verify the bootstrap: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		for _, b := range chunks {
			if err := c.verifyChunks(ctx, b); err != nil {
				return fmt.Errorf("verify the blobs: %w", err)
			}
		}
		return nil
	})
	var diffID digest.Digest
	g.Go(func() (err error) {
		if diffID, err = c.packBootstrap(ctx); err != nil {
			return fmt.Errorf("bootstrap layer: %w", err)
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return err
	}
	return c.res.describe(c.src, cfg, diffID)
}

func (c *conversion) layerError(i int, err error) error {
	return fmt.Errorf("layer %d (%s): %w", i, c.src.Layers[i].Descriptor.Digest, err)
}

// buildLayers reads the layers, a few at a time, all with one set of workers.
func (c *conversion) buildLayers(ctx context.Context) error {
	c.layers = make([]builtLayer, len(c.src.Layers))
	workers, ctx := errgroup.WithContext(ctx)
	p, err := startPool(ctx, workers, c.o.Workers, c.o.Compressor, rafs.LevelDefault)
	if err != nil {
		return err
	}
	layers, layersCtx := errgroup.WithContext(ctx)
	atOnce := min(layersAtOnce, c.o.Workers)
	layers.SetLimit(atOnce)
	free := newBatches(c.o.Workers, atOnce)
	for i := range c.src.Layers {
		layers.Go(func() error {
			l, err := c.buildLayer(layersCtx, p, free, i)
			if err != nil {
				return c.layerError(i, err)
			}
			c.layers[i] = l
			return nil
		})
	}
	err = layers.Wait()
	p.close()
	return errors.Join(err, workers.Wait())
}

// buildLayer reads layer i and writes its blob.
func (c *conversion) buildLayer(ctx context.Context, p *pool, free chan *batch, i int) (_ builtLayer, err error) {
	// A layer that waited for its turn while another failed is not even opened.
	if err := ctx.Err(); err != nil {
		return builtLayer{}, err
	}
	if c.src.Layers[i].Record != nil {
		l, err := c.readRecord(ctx, i)
		if err != nil {
			return builtLayer{}, fmt.Errorf("%w: %w", ErrReuse, err)
		}
		return l, nil
	}
	if c.o.OCIRef {
		return c.buildRef(ctx, p, free, i)
	}
	stream, err := openLayer(ctx, c.src.Layers[i], nil)
	if err != nil {
		return builtLayer{}, err
	}
	defer func() { err = errors.Join(err, stream.Close()) }()

	out, err := c.createBlob(fmt.Sprintf("layer-%d.blob", i), false)
	if err != nil {
		return builtLayer{}, err
	}
	defer out.abort()

	ck := newChunker(p, free, c.o, c.dict, uint16(i), out.BlobWriter) //nolint:gosec // completeLayers bounds it
	ck.stream, ck.place = stream, stream.place
	reader, err := c.readLayer(ctx, stream, ck, i)
	if err != nil {
		return builtLayer{}, err
	}
	blob, err := out.finish()
	if err != nil {
		return builtLayer{}, fmt.Errorf("write blob: %w", err)
	}
	l := builtLayer{tree: reader.tree, blob: blob, tarBytes: stream.size, xattrsIgnored: reader.xattrsIgnored, dictChunks: ck.known}
	if c.o.Records {
		if l.record, err = c.writeRecord(i, &l); err != nil {
			return builtLayer{}, fmt.Errorf("write the layer's record: %w", err)
		}
	}
	return l, nil
}

// readLayer reads layer i to its end and has ck store what is in it.
func (c *conversion) readLayer(ctx context.Context, stream *layerStream, ck *chunker, i int) (*layerReader, error) {
	total := c.src.Layers[i].Descriptor.Size
	ck.flushed = func() { c.progress(Event{Stage: StageLayer, Layer: i, Done: stream.stored.n, Total: total}) }
	reader := &layerReader{tree: newTree(), sink: ck, chunkSize: int64(c.o.ChunkSize)}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return ck.commit(gctx) })
	g.Go(func() error {
		if err := reader.read(gctx, stream); err != nil {
			if errors.Is(err, errTarSyntax) {
				// Bytes that were damaged on their way are the better explanation.
				if deeper := stream.finish(); deeper != nil {
					return fmt.Errorf("%w (%w)", deeper, err)
				}
			}
			return err
		}
		if err := stream.finish(); err != nil {
			return err
		}
		return ck.close(gctx)
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	c.progress(Event{Stage: StageLayer, Layer: i, Done: total, Total: total})
	return reader, nil
}

// blobFile is a blob being written to a file.
type blobFile struct {
	*rafs.BlobWriter
	f    *os.File
	w    *bufio.Writer
	path string
}

func (c *conversion) createBlob(name string, prefetch bool) (*blobFile, error) {
	f, err := os.OpenFile(c.path(name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create blob: %w", err)
	}
	b := &blobFile{f: f, w: bufio.NewWriterSize(c.o.writer(f), blobBuffer), path: f.Name()}
	o := rafs.BlobOptions{
		Version: c.o.FSVersion, Compressor: c.o.Compressor, Digester: c.o.Digester, ChunkSize: c.o.ChunkSize, BatchSize: c.o.BatchSize,
	}
	if prefetch {
		o.MarkPrefetch, o.BatchSize = c.o.MarkPrefetchBlob, c.o.PrefetchBatchSize
		if !c.o.NoRecompress {
			o.BatchLevel = rafs.LevelBest
		}
	}
	b.BlobWriter, err = rafs.NewBlobWriter(b.w, o)
	if err != nil {
		b.abort()
		return nil, err
	}
	return b, nil
}

// finish completes the file; the result is nil, and the file gone, when the blob has no chunks.
func (b *blobFile) finish() (*builtBlob, error) {
	blob, err := b.Close()
	if errors.Is(err, rafs.ErrNoChunks) {
		b.abort()
		return nil, os.Remove(b.path)
	}
	err = errors.Join(err, b.w.Flush(), b.f.Close())
	b.f = nil
	if err != nil {
		return nil, err
	}
	return &builtBlob{Blob: blob, path: b.path}, nil
}

// abort closes the file of a blob that is not wanted; nothing to do after finish.
func (b *blobFile) abort() {
	if b.f != nil {
		_ = b.f.Close() // its content does not matter
		b.f = nil
	}
}

// writePrefetch writes the prefetch blob of plan and returns the records of its chunks.
func (c *conversion) writePrefetch(ctx context.Context, plan *prefetchPlan) (_ map[rafs.Digest]rafs.Chunk, err error) {
	if len(plan.chunks) == 0 {
		return nil, nil
	}
	readers := blobReaders{dir: c.dir}
	defer func() { err = errors.Join(err, readers.Close()) }()
	out, err := c.createBlob("prefetch.blob", true)
	if err != nil {
		return nil, err
	}
	defer out.abort()

	if err := c.announcePlan(ctx, &readers, plan); err != nil {
		return nil, err
	}
	best := !c.o.NoRecompress && c.o.Compressor != rafs.CompressorNone
	level := rafs.LevelDefault
	if best {
		level = rafs.LevelBest
	}
	g, ctx := errgroup.WithContext(ctx)
	p, err := startPool(ctx, g, c.o.Workers, c.o.Compressor, level)
	if err != nil {
		return nil, err
	}
	total := plan.stats.RawBytes
	records, err := plan.writeChunks(ctx, p, out.BlobWriter, best,
		func(blob uint16) (*rafs.BlobReader, error) { return readers.get(ctx, c.blobAt(blob)) },
		func(done int64) { c.progress(Event{Stage: StagePrefetch, Done: done, Total: total}) })
	p.close()
	if err := errors.Join(err, g.Wait()); err != nil {
		return nil, err
	}
	c.prefetch, err = out.finish()
	if err != nil {
		return nil, err
	}
	c.copies = plan.copies
	plan.stats.BlobBytes = int64(c.prefetch.CompressedSize) //nolint:gosec // a file's size
	return records, nil
}
