package store

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/shm"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Blob is one data file with its ready bits. All images that have the blob, with the
// same chunks at the same places, share it. Methods are safe for concurrent use, except
// that nothing may follow the last [Blob.Close].
type Blob struct {
	store    *Store
	name     string
	blob     rafs.Blob
	identity [32]byte
	data     *os.File
	opened   atomic.Bool // see FirstUse
	dev, ino uint64
	ready    *shm.Memory
	claims   []atomic.Uint64 // bits of blocks, see Confirm; nil: there never were any
	claimed  atomic.Int64    // how many are set
	refs     int             // guarded by store.mu
	used     bool            // by a mount: its end is the last use; guarded by store.mu
	stays    atomic.Bool     // see Leave
	met      atomic.Bool     // see NoStrangers
	known    bool            // all who have the data file open opened it here; does not change

	view    atomic.Pointer[view]
	missing atomic.Int64 // needed blocks that are not ready
	written atomic.Int64 // length of the data file

	// mu guards done, gone and which view there is. Put holds it for reading, so that missing
	// counts what one view needs.
	mu   sync.RWMutex
	done chan struct{}
	gone bool // ready is not mapped any more

	tableMu sync.RWMutex // held to read the table's file, and to close it

	syncMu  sync.Mutex
	durable []uint64 // the bits in the file "ready" but for what turned out wrong; guarded by syncMu, never changed, only replaced
	stamped int64    // its stamp, neverStamp when it is to be written in any case; guarded by syncMu

	cloning cloning

	feedMu sync.Mutex // guards fed, and is held while it is fed
	fed    []uint64   // see Feed; nil: nobody knows

	scopeMu sync.Mutex // guards scopes
	scopes  []string   // never changed, only replaced; nil: not read
}

// view is what the blob's users need of it. It does not change.
type view struct {
	table *table
	need  []uint64 // one bit per block
	total int64    // needed blocks
}

func newView(t *table, recs []chunkRecord, words int) *view {
	v := &view{table: t, need: make([]uint64, words)}
	for i := range recs {
		eachWord(recs[i].first(), recs[i].end(), func(w uint64, mask uint64) bool {
			v.need[w] |= mask
			return true
		})
		v.total += int64(recs[i].end() - recs[i].first()) //nolint:gosec // at most maxBlocks
	}
	return v
}

// same reports whether other is of the same chunks, which all are here.
func (v *view) same(all []chunkRecord, other *view) bool {
	return slices.Equal(v.need, other.need) && slices.EqualFunc(all, other.table.starts, func(r chunkRecord, start uint32) bool {
		return r.first() == uint64(start)
	})
}

// eachWord calls f with the bits of each word that lie in the blocks [first, end).
func eachWord(first, end uint64, f func(word, mask uint64) bool) bool {
	for first < end {
		w := first / 64
		stop := min(end, (w+1)*64)
		mask := ^uint64(0) << (first % 64) & (^uint64(0) >> (63 - (stop-1)%64))
		if !f(w, mask) {
			return false
		}
		first = stop
	}
	return true
}

// ID returns the blob's id as the bootstrap has it.
func (b *Blob) ID() string { return b.blob.ID }

// Name returns the name of the blob's directory, by which [Store.Adopt] and
// [Options.Kept] know it.
func (b *Blob) Name() string { return b.name }

// Path returns the absolute path of the data file, the device to give to EROFS.
func (b *Blob) Path() string { return filepath.Join(b.store.path, "blobs", b.name, "data") }

// Size returns the size of the whole data file in bytes, a multiple of [BlockSize].
func (b *Blob) Size() int64 { return int64(b.blob.UncompressedSize) } //nolint:gosec // at most maxBlocks blocks

// File returns the descriptor of the data file, which was opened before any mark was set on
// it and therefore raises no event. It stays the Blob's.
func (b *Blob) File() *os.File { return b.data }

// FirstUse reports, once, that this process opened the data file by itself. Then no mark may be on it yet; on
// one whose descriptors an earlier process kept a mark may have been all the time.
func (b *Blob) FirstUse() bool { return b.opened.Swap(false) }

// Inode returns the device and inode number of the data file as fstat(2) has them.
func (b *Blob) Inode() (dev, ino uint64) { return b.dev, b.ino }

// Descriptors returns what has to be kept for a process that takes over. The files stay the
// Blob's.
func (b *Blob) Descriptors() Kept { return Kept{Data: b.data, Bits: b.ready.File()} }

// Total returns the bytes that the images which use the blob need of it, in whole
// blocks.
func (b *Blob) Total() int64 { return b.view.Load().total * BlockSize }

// Local returns how many of [Blob.Total] bytes are there, ready or claimed; after the last Close those that were ready.
func (b *Blob) Local() int64 {
	b.mu.RLock()
	defer b.mu.RUnlock()
	v := b.view.Load()
	local := v.total - b.missing.Load()
	if b.claimed.Load() > 0 && !b.gone {
		ready := b.ready.Words()
		for w, need := range v.need {
			if need != 0 {
				local += int64(bits.OnesCount64(need & b.claimOf(uint64(w)) &^ ready[w].Load()))
			}
		}
	}
	return local * BlockSize
}

// Complete reports whether every needed block is ready. It may become false again when
// an image is opened that needs more ([Store.OpenBlob]), or when [Blob.Sync] fails.
func (b *Blob) Complete() bool { return b.missing.Load() == 0 }

// Done returns a channel that is closed when the blob is complete. After it became
// incomplete again there is another channel.
func (b *Blob) Done() <-chan struct{} {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.done
}

// blocks returns the blocks of a range; a range that reaches beyond the end is cut.
func (b *Blob) blocks(offset, length int64) (first, end uint64) {
	if offset < 0 || length <= 0 || offset >= b.Size() {
		return 0, 0
	}
	stop := b.Size()
	if length < stop-offset {
		stop = offset + length
	}
	return uint64(offset) / BlockSize, (uint64(stop) + BlockSize - 1) / BlockSize
}

// ReadyRange reports whether all needed blocks of [offset, offset+length) are ready.
// What no chunk covers needs nothing: it reads as zeros, or not at all.
func (b *Blob) ReadyRange(offset, length int64) bool {
	first, end := b.blocks(offset, length)
	v, ready := b.view.Load(), b.ready.Words()
	return eachWord(first, end, func(w, mask uint64) bool { return v.need[w]&mask&^ready[w].Load() == 0 })
}

// Freeze returns [Blob.ReadyRange] as it is at this moment, to be called after the last Close too, and whether the blob is
// complete. One that is not takes one bit of memory for each block.
func (b *Blob) Freeze() (ready func(offset, length int64) bool, complete bool) {
	if b.Complete() {
		return func(int64, int64) bool { return true }, true
	}
	v, words := b.view.Load(), b.ready.Words()
	missing := make([]uint64, len(v.need))
	for i, need := range v.need {
		missing[i] = need &^ words[i].Load()
	}
	return func(offset, length int64) bool {
		first, end := b.blocks(offset, length)
		return eachWord(first, end, func(w, mask uint64) bool { return missing[w]&mask == 0 })
	}, false
}

// Ready reports whether chunk c is in the data file: nobody has to fetch it. Where it is claimed ([Blob.Confirm]), it cannot be read yet.
func (b *Blob) Ready(c rafs.Chunk) bool {
	first, end := b.blocks(int64(c.UncompressedOffset), int64(c.UncompressedSize)) //nolint:gosec // beyond Size nothing is needed
	v, ready := b.view.Load(), b.ready.Words()
	return eachWord(first, end, func(w, mask uint64) bool {
		want := v.need[w] & mask
		// In this order: what is confirmed is ready first, and not claimed then.
		return want&^ready[w].Load() == 0 || want&^b.claimOf(w)&^ready[w].Load() == 0
	})
}

// Chunks returns the chunks that overlap [offset, offset+length), by offset; all fields but
// Blob, which is 0, are the image's. It reads the chunk table, not the data file.
func (b *Blob) Chunks(offset, length int64) ([]rafs.Chunk, error) {
	first, end := b.blocks(offset, length)
	if first == end {
		return nil, nil
	}
	b.tableMu.RLock()
	defer b.tableMu.RUnlock()
	chunks, err := b.view.Load().table.lookup(first, end)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", b.name, err)
	}
	return chunks, nil
}

// Missing is [Blob.Chunks] without those that are ready.
func (b *Blob) Missing(offset, length int64) ([]rafs.Chunk, error) {
	if b.ReadyRange(offset, length) {
		return nil, nil
	}
	chunks, err := b.Chunks(offset, length)
	if err != nil {
		return nil, err
	}
	out := chunks[:0]
	for _, c := range chunks {
		if !b.Ready(c) {
			out = append(out, c)
		}
	}
	return out, nil
}

// Put stores the verified bytes of chunk c and makes it ready. When it fails, for
// instance because the disk is full, c stays as it was. Storing a chunk twice, at once
// too, does no harm.
func (b *Blob) Put(c rafs.Chunk, data []byte) error {
	r := record(c)
	if uint64(len(data)) != uint64(c.UncompressedSize) || len(data) == 0 {
		return fmt.Errorf("blob %s: put chunk %d: %d bytes, want %d", b.name, c.Index, len(data), c.UncompressedSize)
	}
	b.lockStored(r.first())
	defer b.mu.RUnlock()
	v := b.view.Load()
	if r.Offset%BlockSize != 0 || r.Offset >= b.blob.UncompressedSize || !v.table.has(r.first()) {
		return fmt.Errorf("blob %s: put chunk %d at %d: %w", b.name, c.Index, c.UncompressedOffset, ErrUnknownChunk)
	}
	if err := b.write(data, int64(r.Offset), int64(r.end()*BlockSize)); err != nil { //nolint:gosec // below Size
		return fmt.Errorf("blob %s: put chunk %d at %d: %w", b.name, c.Index, c.UncompressedOffset, err)
	}
	b.setReady(&r)
	b.unclaim(r.first(), r.end())
	return nil
}

// setReady makes the blocks of a chunk ready. The caller holds mu for reading.
func (b *Blob) setReady(r *chunkRecord) {
	v, ready, fresh := b.view.Load(), b.ready.Words(), 0
	eachWord(r.first(), r.end(), func(w, mask uint64) bool {
		before := ready[w].Or(mask)
		fresh += bits.OnesCount64(mask &^ before & v.need[w])
		return true
	})
	if fresh > 0 && b.missing.Add(-int64(fresh)) == 0 {
		close(b.done)
	}
}

// write puts data at offset and makes the file reach to end, a block's, at least:
// the kernel reads whole blocks.
func (b *Blob) write(data []byte, offset, end int64) error {
	if _, err := b.data.WriteAt(data, offset); err != nil {
		return err
	}
	if at := offset + int64(len(data)); at < end && (b.written.Load() < end || !b.store.copies.Load()) {
		// All of it, where a clone may have been cut short: what it left is another chunk's.
		if _, err := b.data.WriteAt(make([]byte, end-at), at); err != nil {
			return err
		}
	}
	b.reach(end)
	return nil
}

// reach notes that the data file reaches to end.
func (b *Blob) reach(end int64) {
	for length := b.written.Load(); length < end && !b.written.CompareAndSwap(length, end); length = b.written.Load() {
	}
}

// see makes all what is needed, with their table t. nil: that on the disk, which has all, unless it is what is seen already: it
// may be another one since a write of it failed in part.
func (b *Blob) see(dir *os.Root, t *table, all []chunkRecord) (err error) {
	v := newView(t, all, len(b.ready.Words()))
	if t == nil {
		if v.same(all, b.view.Load()) {
			return nil
		}
		if v.table, err = openTable(dir, all); err != nil {
			return err
		}
	}
	b.mu.Lock()
	before := b.view.Swap(v)
	b.recount()
	b.mu.Unlock()
	b.tableMu.Lock()
	defer b.tableMu.Unlock()
	return before.table.file.Close()
}

// recount counts what is missing. The caller holds mu, or is alone.
func (b *Blob) recount() {
	v, ready, missing := b.view.Load(), b.ready.Words(), 0
	for w, need := range v.need {
		if need != 0 {
			missing += bits.OnesCount64(need &^ ready[w].Load())
		}
	}
	b.missing.Store(int64(missing))
	select {
	case <-b.done:
		if missing > 0 {
			b.done = make(chan struct{})
		}
	default:
		if missing == 0 {
			close(b.done)
		}
	}
}

// Close gives the blob back. The last Close of what [Store.OpenBlob] and [Store.Adopt] returned
// makes the ready bits durable and closes the descriptors; those that others keep stay. By
// then no mount may have the data file, and no mark may be on it, unless it is left ([Blob.Leave]).
func (b *Blob) Close() error {
	err := b.Sync() // what takes time, without keeping others from opening blobs
	s := b.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.refs == 0 {
		return nil
	}
	if b.refs--; b.refs > 0 {
		return err
	}
	delete(s.blobs, b.name)
	if !b.stays.Load() && (b.known || b.used) { // who only looks at a file knows nobody
		s.left[b.name] = file{b.dev, b.ino}
	}
	if b.used { // who only looks at it or lends of it does not
		b.touch()
	}
	err = errors.Join(err, b.Sync())
	if b.stays.Load() {
		err = errors.Join(err, b.keep())
	}
	return errors.Join(err, b.release())
}

// touch notes that a mount uses the blob now. The caller holds store.mu.
func (b *Blob) touch() {
	if err := b.store.touch(b.name); err != nil {
		b.store.log.Warn("note the use of a blob", zap.String("blob", b.name), zap.Error(err))
	}
}

func (b *Blob) release() error {
	var errs []error
	if v := b.view.Load(); v != nil {
		errs = append(errs, v.table.file.Close())
	}
	if b.ready != nil {
		b.mu.Lock() // status may be looking
		b.gone = true
		errs = append(errs, b.ready.Close())
		b.mu.Unlock()
	}
	if b.data != nil {
		errs = append(errs, b.data.Close())
	}
	return errors.Join(errs...)
}

// inDir calls f with the blob's directory, which is not kept open: a machine has many blobs.
func (b *Blob) inDir(f func(dir *os.Root) error) error {
	dir, err := b.store.root.OpenRoot(filepath.Join("blobs", b.name))
	if err != nil {
		return err
	}
	return errors.Join(f(dir), dir.Close())
}

// stat fills in what identifies the data file.
func (b *Blob) stat() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(b.data.Fd()), &st); err != nil {
		return fmt.Errorf("data: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("data: %w: mode %#o, want a regular file", errCorrupt, st.Mode)
	}
	b.dev, b.ino = st.Dev, st.Ino
	b.written.Store(st.Size)
	return nil
}
