package store

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"os"
	"slices"
	"sync/atomic"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Claims are ready bits of an earlier process whose data file has changed since they were written: by somebody else, or by a
// daemon that died before it could write them again. What they claim counts as there for those who would fetch it, and as not ready for
// those who would read it, until [Blob.Confirm] has compared it with its digest.

// claim makes the durable bits claims, but for those that are ready already. Nobody else has the blob yet.
func (b *Blob) claim() {
	ready, n := b.ready.Words(), 0
	claims := make([]atomic.Uint64, len(ready))
	for w, word := range b.durable {
		if w < len(ready) {
			word &^= ready[w].Load()
			claims[w].Store(word)
			n += bits.OnesCount64(word)
		}
	}
	if n > 0 {
		b.claims = claims
		b.claimed.Store(int64(n))
	}
}

// Claimed returns how many blocks are claimed and not confirmed.
func (b *Blob) Claimed() int64 { return b.claimed.Load() }

// claimOf returns the claims among the blocks of word w.
func (b *Blob) claimOf(w uint64) uint64 {
	if b.claimed.Load() == 0 {
		return 0
	}
	return b.claims[w].Load()
}

// isClaimed reports whether any block of [first, end) is claimed.
func (b *Blob) isClaimed(first, end uint64) bool {
	return !eachWord(first, end, func(w, mask uint64) bool { return b.claimOf(w)&mask == 0 })
}

// unclaim ends the claims of [first, end).
func (b *Blob) unclaim(first, end uint64) {
	if b.claimed.Load() == 0 {
		return
	}
	eachWord(first, end, func(w, mask uint64) bool {
		if was := b.claims[w].And(^mask); was&mask != 0 {
			b.claimed.Add(-int64(bits.OnesCount64(was & mask)))
		}
		return true
	})
}

// Confirm compares what is claimed in [offset, offset+length) with its digests: it is ready then, or not there any more. An
// error is of the disk, or ctx's; what it left is claimed still. It costs nothing where nothing is claimed.
func (b *Blob) Confirm(ctx context.Context, offset, length int64) error {
	first, end := b.blocks(offset, length)
	if b.claimed.Load() == 0 || !b.isClaimed(first, end) {
		return nil
	}
	chunks, err := b.Chunks(offset, length)
	if err != nil {
		return err
	}
	var buf []byte
	for i := range chunks {
		r := record(chunks[i])
		if !b.isClaimed(r.first(), r.end()) {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		good, err := b.readChunk(&chunks[i], &buf)
		if err != nil {
			return fmt.Errorf("blob %s: read chunk %d at %d: %w", b.name, chunks[i].Index, r.Offset, err)
		}
		if err := b.settleClaim(&r, good); err != nil {
			return err
		}
	}
	return nil
}

// settleClaim ends the claim of one chunk.
func (b *Blob) settleClaim(r *chunkRecord, good bool) error {
	if good {
		b.mu.RLock()
		defer b.mu.RUnlock()
		b.setReady(r)
		b.unclaim(r.first(), r.end()) // last: it is never neither
		return nil
	}
	b.store.log.Error("a chunk was wrong on disk", zap.String("blob", b.name), zap.Uint64("offset", r.Offset))
	b.store.wrong.Store(file{b.dev, b.ino}, nil)
	b.feedMu.Lock() // who feeds the index does it before, or without the chunk
	defer b.feedMu.Unlock()
	b.fed = nil
	if err := b.store.forget(b.name); err != nil { // whoever follows it compares what is there
		b.store.log.Warn("the index does not forget a cache", zap.String("blob", b.name), zap.Error(err))
	}
	if err := b.clearPad(r); err != nil {
		return fmt.Errorf("blob %s: %w", b.name, err)
	}
	b.syncMu.Lock() // over both: a Sync between them would make the claim durable once more
	defer b.syncMu.Unlock()
	// Else what a failing Sync loses of it, stored again, would count as kept. The next Sync writes the file, which has it still.
	b.durable, b.stamped = without(b.durable, r), neverStamp
	b.unclaim(r.first(), r.end())
	return nil
}

// without returns words without the bits of a chunk, as a snapshot has them. It leaves words as it is.
func without(words []uint64, r *chunkRecord) []uint64 {
	out := slices.Clone(words)
	eachWord(r.first(), r.end(), func(w, mask uint64) bool {
		if w < uint64(len(out)) {
			out[w] &^= mask
		}
		return true
	})
	for len(out) > 0 && out[len(out)-1] == 0 {
		out = out[:len(out)-1]
	}
	return out
}

// confirmStep is how many blocks [Blob.ConfirmSome] looks at: 4 MiB.
const confirmStep = 1024

// ConfirmSome confirms a part of what is claimed, anywhere, and reports whether more is.
func (b *Blob) ConfirmSome(ctx context.Context) (more bool, err error) {
	for w := range b.claims {
		if b.claimOf(uint64(w)) == 0 {
			continue
		}
		first := uint64(w) * 64
		end := min(first+confirmStep, uint64(len(b.claims))*64)
		if err := b.Confirm(ctx, int64(first)*BlockSize, confirmStep*BlockSize); err != nil {
			return true, err
		}
		b.unclaim(first, end) // what no chunk covers is nobody's
		break
	}
	return b.claimed.Load() > 0, nil
}

// clearPad makes what follows a chunk in its last block zeros, as they are before anything is stored: nobody else writes them.
func (b *Blob) clearPad(r *chunkRecord) error {
	pad := r.end()*BlockSize - r.Offset - uint64(r.Size)
	if pad == 0 {
		return nil
	}
	_, err := b.data.WriteAt(make([]byte, pad), int64(r.Offset)+int64(r.Size)) //nolint:gosec // below Size
	return err
}

// change is when the data file was changed last, by anybody, in nanoseconds since 1970, which nobody can set back; 0 where
// that cannot be told.
func (b *Blob) change() int64 {
	var st unix.Stat_t
	if err := unix.Fstat(int(b.data.Fd()), &st); err != nil {
		return 0
	}
	return st.Ctim.Nano()
}

// stamp is what the file "ready" says of the data file: its last change, 0 while anything is claimed.
func (b *Blob) stamp() int64 {
	if b.claimed.Load() > 0 {
		return 0
	}
	return b.change()
}

// neverStamp is what no file is stamped with.
const neverStamp = -1

// readStamp returns what the file "ready" said, 0 when it cannot be read.
func readStamp(dir *os.Root) int64 {
	f, err := dir.Open("ready")
	if err != nil {
		return 0
	}
	defer func() { _ = f.Close() }() // nothing was written
	var h header
	if err := binary.Read(io.NewSectionReader(f, 0, sizeHeader), binary.LittleEndian, &h); err != nil {
		return 0
	}
	return h.Changed
}
