package builder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// blobJoin copies what files need of several layers' blobs into one: the format counts [rafs.MaxBlobs] blobs, and
// an image may have more layers.
type blobJoin struct {
	c       *conversion
	layers  []int // numbers of the layers, ascending
	member  []bool
	readers blobReaders
	out     *blobFile
	enc     *rafs.Encoder
}

// joinBlobs makes one blob of the smallest blobs of layers when there are too many; it takes the place
// of the first of these layers, and the others have none any more. used tells which of the conversion's blobs chunks of files are in.
func (c *conversion) joinBlobs(ctx context.Context, files []*rafs.Inode, used []bool) (err error) {
	layers := c.tooMany(used)
	if len(layers) == 0 {
		return nil
	}
	j := &blobJoin{c: c, layers: layers, member: make([]bool, len(used))}
	for _, i := range layers {
		j.member[i] = true
	}
	defer func() { err = errors.Join(err, j.readers.Close()) }()
	if j.out, err = c.createBlob("joined.blob", false); err != nil {
		return err
	}
	defer j.out.abort()
	if j.enc, err = rafs.NewEncoder(c.o.Compressor, rafs.LevelDefault); err != nil {
		return err
	}
	if err := j.announce(ctx, files); err != nil {
		return err
	}
	for _, f := range files {
		if err := j.file(ctx, f); err != nil {
			return err
		}
	}
	blob, err := j.out.finish()
	if err != nil {
		return fmt.Errorf("write blob: %w", err)
	}
	for _, i := range layers {
		c.layers[i].blob, used[i] = nil, false
	}
	c.layers[layers[0]].blob, used[layers[0]] = blob, true
	c.res.Stats.JoinedLayers = len(layers)
	return nil
}

// tooMany returns the layers whose blobs must become one: the fewest, those with the smallest blobs. None when
// there are not too many blobs, or too many that are of no layer.
func (c *conversion) tooMany(used []bool) []int {
	var small []int // one layer for each blob
	byID := map[string][]int{}
	count := 0
	for i, is := range used {
		switch {
		case i >= len(c.layers) && is:
			count++ // of the dictionary, or the prefetch blob
		case is:
			id := c.layers[i].blob.ID
			if byID[id] = append(byID[id], i); len(byID[id]) == 1 {
				small = append(small, i)
				count++
			}
		}
	}
	over := count - rafs.MaxBlobs
	if over <= 0 || len(small) <= over {
		return nil
	}
	slices.SortFunc(small, func(a, b int) int {
		return cmp.Or(cmp.Compare(c.layers[a].blob.CompressedSize, c.layers[b].blob.CompressedSize), cmp.Compare(a, b))
	})
	var out []int
	for _, i := range small[:over+1] {
		out = append(out, byID[c.layers[i].blob.ID]...)
	}
	slices.Sort(out)
	return out
}

// announce has what is read of layers that are referred to fetched.
func (j *blobJoin) announce(ctx context.Context, files []*rafs.Inode) error {
	if !j.c.o.OCIRef {
		return nil
	}
	chunks := make([][]rafs.Chunk, len(j.c.layers))
	for _, f := range files {
		for _, ch := range f.Chunks {
			if j.member[ch.Blob] {
				chunks[ch.Blob] = append(chunks[ch.Blob], ch)
			}
		}
	}
	for _, i := range j.layers {
		if err := j.readers.announce(ctx, j.c.layers[i].blob, chunks[i]); err != nil {
			return err
		}
	}
	return nil
}

// file copies the chunks of f that are in one of the blobs and points them at their copies.
func (j *blobJoin) file(ctx context.Context, f *rafs.Inode) error {
	to := uint16(j.layers[0]) //nolint:gosec // completeLayers bounds it
	joined := false           // the chunk before is
	for i := range f.Chunks {
		ch := f.Chunks[i]
		if !j.member[ch.Blob] {
			joined = false
			continue
		}
		var before []rafs.Chunk
		if joined {
			before = f.Chunks[i-1 : i]
		}
		enc, err := j.read(ctx, ch)
		if err != nil {
			return err
		}
		rec, err := j.out.AppendAfter(before, enc)
		if err != nil {
			return fmt.Errorf("write blob: %w", err)
		}
		rec.Blob, joined = to, true
		f.Chunks[i] = rec
	}
	return nil
}

// read returns a chunk as it is stored, or compressed anew where that form does not stand alone.
func (j *blobJoin) read(ctx context.Context, ch rafs.Chunk) (rafs.EncodedChunk, error) {
	b := j.c.layers[ch.Blob].blob
	r, err := j.readers.get(ctx, b)
	if err != nil {
		return rafs.EncodedChunk{}, err
	}
	out := rafs.EncodedChunk{Digest: ch.Digest, Compressed: ch.Compressed, UncompressedSize: ch.UncompressedSize}
	if b.Features&dependentBlob == 0 && b.stored == nil {
		out.Data, err = r.ReadStored(ctx, ch)
		return out, err
	}
	raw, err := r.ReadChunk(ctx, ch)
	if err != nil {
		return rafs.EncodedChunk{}, err
	}
	if out.Data, out.Compressed = raw, false; j.out.Batches(ch.UncompressedSize) {
		return out, nil // the writer compresses it
	}
	out.Data, out.Compressed, err = j.enc.Encode(nil, raw)
	return out, err
}
