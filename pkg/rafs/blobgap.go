package rafs

// readGap is the most bytes between the stored forms of two chunks of a file that nydusd takes for none: it merges the two into
// one request, and where both are in its cache already it reads on behind the first, whatever lies there.
// It is the 128th part of what nydusd reads at once, a MiB in the usual configuration. Nydus 2.2.0,
// storage/src/cache/cachedfile.rs Region.append, storage/src/device.rs BlobIoDesc.is_continuous.
const readGap = 8 << 10

// misread reports whether nydusd would read a chunk stored at offset wrongly behind one that ends at end.
func misread(end, offset uint64) bool { return offset > end && offset-end <= readGap }

// Misread reports whether nydusd would read next wrongly behind prev in a file: both are in one blob, neither in a
// batch, and next is stored a little behind prev's end. [BlobWriter.AppendAfter] avoids that within the blob it
// writes; for chunks of other blobs it is for who refers to them to do.
func Misread(prev, next *Chunk) bool {
	return prev.Blob == next.Blob && misread(storedEnd(prev), next.CompressedOffset)
}

func storedEnd(c *Chunk) uint64 { return c.CompressedOffset + uint64(c.CompressedSize) }

// AppendAfter is [BlobWriter.Append] for a chunk that follows the chunks before, all of this blob, in files. It
// keeps a distance that nydusd wants between chunks of a file that do not touch: a few KiB of zeros, or a second copy of the chunk.
// Chunks of batches are placed as Append does it.
func (b *BlobWriter) AppendAfter(before []Chunk, c EncodedChunk) (Chunk, error) {
	chunk, ok, err := b.known(c.Digest, c.UncompressedSize)
	if err != nil {
		return Chunk{}, err
	}
	if ok && !anyMisread(before, chunk.CompressedOffset) {
		return chunk, nil
	}
	if b.options.BatchSize > 0 || len(before) == 0 {
		return b.Append(c)
	}
	at := b.written
	for again := true; again; {
		again = false
		for i := range before {
			if end := storedEnd(&before[i]); misread(end, at) {
				at, again = end+readGap+1, true
			}
		}
	}
	if err := b.checkRoom(at-b.written+uint64(len(c.Data)), c.UncompressedSize); err != nil {
		return Chunk{}, err
	}
	if at > b.written {
		if err := b.write(make([]byte, at-b.written), b.data); err != nil {
			return Chunk{}, err
		}
	}
	return b.store(c)
}

func anyMisread(before []Chunk, offset uint64) bool {
	for i := range before {
		if misread(storedEnd(&before[i]), offset) {
			return true
		}
	}
	return false
}
