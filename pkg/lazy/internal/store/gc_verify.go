package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/atomicfile"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Checked is what [Blob.Verify] found.
type Checked struct {
	Chunks int64 // that were ready, and were read
	Bytes  int64 // of them
	Bad    []rafs.Chunk
	// Next is where to go on; the size of the data file when all was looked at.
	Next int64
}

// Reopen opens the blob called name as its own table describes it, beside mounts that have it or open it later. The caller
// closes it. fs.ErrNotExist when there is none; [ErrInUse] when its descriptors are kept for somebody who has not come yet;
// [ErrUnknownDigest] when nobody can say what its bytes should be.
func (s *Store) Reopen(name string) (*Blob, error) {
	if err := entryName(name); err != nil {
		return nil, err
	}
	b, err := s.openNamed(name)
	for deadline := time.Now().Add(leaveLimit); errors.Is(err, ErrInUse) && !s.has(name) && time.Now().Before(deadline); b, err = s.openNamed(name) {
		<-time.After(5 * time.Millisecond)
	}
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", name, err)
	}
	return b, nil
}

// Digester returns what the digests of the blob's chunks are made with.
func (b *Blob) Digester() rafs.Digester { return b.blob.Digester }

// verifyStep bounds how many blocks are looked up at once, to 4 MiB of data.
const verifyStep = 1024

// Verify reads the ready chunks at and behind offset from the disk and compares them with their digests, until it is at the end
// or ctx ends, which is no error. It changes nothing: see [Blob.Drop]. A chunk that is being dropped or stored meanwhile may be in Bad.
func (b *Blob) Verify(ctx context.Context, offset int64) (c Checked, err error) {
	buf := []byte(nil)
	for c.Next = max(0, offset); c.Next < b.Size(); {
		chunks, err := b.Chunks(c.Next, verifyStep*BlockSize)
		if err != nil {
			return c, err
		}
		next := c.Next + verifyStep*BlockSize
		for i := range chunks {
			chunk := &chunks[i]
			at := int64(chunk.UncompressedOffset) //nolint:gosec // below Size
			if at < c.Next {
				continue // reached into from before
			}
			if ctx.Err() != nil && c.Chunks > 0 { // whoever goes on from here again and again comes to an end
				c.Next = at
				return c, nil
			}
			if !b.wholly(chunk) {
				continue
			}
			good, err := b.verifyChunk(chunk, &buf)
			if err != nil {
				return c, fmt.Errorf("blob %s: read chunk %d at %d: %w", b.name, chunk.Index, at, err)
			}
			if !good && !b.wholly(chunk) {
				continue // it was dropped while it was read
			}
			c.Chunks++
			c.Bytes += int64(chunk.UncompressedSize)
			if !good {
				c.Bad = append(c.Bad, *chunk)
			} else if r := record(*chunk); b.isClaimed(r.first(), r.end()) {
				if err := b.settleClaim(&r, true); err != nil {
					return c, err
				}
			}
		}
		c.Next = min(next, b.Size())
	}
	return c, nil
}

// Wrong returns those of chunks that are there and are not what they should be: others may have dropped or stored some since they turned out wrong.
func (b *Blob) Wrong(chunks []rafs.Chunk) (wrong []rafs.Chunk, err error) {
	var buf []byte
	for i := range chunks {
		if !b.wholly(&chunks[i]) {
			continue
		}
		good, err := b.verifyChunk(&chunks[i], &buf)
		if err != nil {
			return nil, fmt.Errorf("blob %s: read chunk %d at %d: %w", b.name, chunks[i].Index, chunks[i].UncompressedOffset, err)
		}
		if !good {
			wrong = append(wrong, chunks[i])
		}
	}
	return wrong, nil
}

// wholly reports whether all of a chunk is ready or claimed, whether or not an image needs it.
func (b *Blob) wholly(c *rafs.Chunk) bool {
	r, ready := record(*c), b.ready.Words()
	return eachWord(r.first(), r.end(), func(w, mask uint64) bool {
		claimed := b.claimOf(w)
		return mask&^claimed&^ready[w].Load() == 0
	})
}

// verifyChunk is readChunk past the page cache: what is in memory may be right where the disk is not. That it stays in memory, being
// written just now, is no harm.
func (b *Blob) verifyChunk(c *rafs.Chunk, buf *[]byte) (good bool, err error) {
	r := record(*c)
	if err := unix.Fadvise(int(b.data.Fd()), int64(r.Offset), int64(r.end()*BlockSize-r.Offset), unix.FADV_DONTNEED); err != nil { //nolint:gosec // below Size
		return false, err
	}
	return b.readChunk(c, buf)
}

// readChunk compares one chunk with its digest, and the rest of its last block with zeros: mounts show it behind the end of a mapped file.
// A disk that cannot give the bytes back counts as one that gives others.
func (b *Blob) readChunk(c *rafs.Chunk, buf *[]byte) (good bool, err error) {
	r := record(*c)
	at, n := int64(r.Offset), int(r.end()*BlockSize-r.Offset) //nolint:gosec // below Size, and at most rafs.MaxChunkSize and a block
	if cap(*buf) < n {
		*buf = make([]byte, n)
	}
	p := (*buf)[:n]
	_, err = b.data.ReadAt(p, at)
	if errors.Is(err, io.EOF) || errors.Is(err, unix.EIO) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, pad := range p[r.Size:] {
		if pad != 0 {
			return false, nil
		}
	}
	return b.blob.Digester.Sum(p[:r.Size]) == c.Digest, nil
}

// Drop makes chunks that turned out wrong not ready, durably, so that they are fetched again. Whoever has the data file
// mounted must see events of it: the caller has marked it. The index forgets the whole data file.
func (b *Blob) Drop(chunks []rafs.Chunk) error {
	if len(chunks) == 0 {
		return nil
	}
	b.store.wrong.Store(file{b.dev, b.ino}, nil)
	b.feedMu.Lock() // who feeds the index does it before, or without the chunks
	defer b.feedMu.Unlock()
	b.fed = nil
	err := b.store.forget(b.name)
	b.syncMu.Lock()
	defer b.syncMu.Unlock()
	// Not what is ready by now, whose data may not be durable.
	durable := slices.Clone(b.durable)
	b.mu.Lock()
	words := b.ready.Words()
	for _, c := range chunks {
		r := record(c)
		eachWord(r.first(), r.end(), func(w, mask uint64) bool {
			words[w].And(^mask)
			if w < uint64(len(durable)) {
				durable[w] &^= mask
			}
			return true
		})
	}
	b.recount()
	b.mu.Unlock()
	for len(durable) > 0 && durable[len(durable)-1] == 0 {
		durable = durable[:len(durable)-1] // as a snapshot
	}
	for _, c := range chunks {
		r := record(c)
		b.unclaim(r.first(), r.end())
		err = errors.Join(err, b.clearPad(&r))
	}
	return errors.Join(err, b.retract(durable))
}

// retract makes durable what the file "ready" says. Where it cannot be written, for instance on a full disk, there is none until the next Sync: to
// fetch all again after the machine stopped is better than to take a wrong chunk for a right one. The caller holds syncMu.
func (b *Blob) retract(durable []uint64) error {
	err := b.writeReady(durable)
	if err == nil {
		b.durable = durable
		return nil
	}
	b.durable, b.stamped = durable, neverStamp
	rerr := b.inDir(func(dir *os.Root) error {
		if err := dir.Remove("ready"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		b.durable = nil
		return atomicfile.SyncDir(dir, ".")
	})
	if rerr == nil && b.writeReady(durable) == nil { // where the one before was
		b.durable = durable
		return nil
	}
	return fmt.Errorf("blob %s: sync ready bits: %w", b.name, errors.Join(err, rerr))
}
