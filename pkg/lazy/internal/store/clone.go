package store

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Cloned is what became of a [Blob.Clone].
type Cloned uint8

// The outcomes.
const (
	// CloneUnable: the file system cannot, or not here; the bytes have to be copied.
	CloneUnable Cloned = iota
	// CloneReady: the chunk is ready.
	CloneReady
	// CloneWrong: the bytes on the lender's disk are not what the chunk's digest says.
	CloneWrong
)

// cloning is what a data file knows of clones on their way. Put writes what is right, so that it may be done twice at once; a clone
// brings what nobody has looked at yet, so that nothing else may make its blocks ready meanwhile.
type cloning struct {
	on  atomic.Int64             // how many there are
	now map[uint64]chan struct{} // by first block, closed at the end; guarded by Blob.mu
}

// Clone makes chunk c ready without a copy: its blocks on disk are those that from has at offset, until either file is written there
// (FICLONERANGE, ioctl_ficlonerange(2): xfs, btrfs). Afterwards it is read through this file and compared with its digest, so
// that what was looked at is what mounts read. Both descriptors were opened before any mark was set: nothing of it is an event.
// What from has there must be durable or is written first, by the kernel. An error is of the disk, and leaves the chunk not ready.
func (b *Blob) Clone(c rafs.Chunk, from *Blob, offset int64) (Cloned, error) {
	r := record(c)
	n := int64(r.end()*BlockSize - r.Offset) //nolint:gosec // at most rafs.MaxChunkSize and a block
	if b.store.copies.Load() || from.store != b.store || offset < 0 || offset%BlockSize != 0 || offset > from.Size()-n || !from.allReady(offset, n) {
		return CloneUnable, nil
	}
	if from == b && offset < int64(r.Offset)+n && int64(r.Offset) < offset+n { //nolint:gosec // below Size
		return CloneUnable, nil
	}
	done, ok := b.beginClone(&r)
	if !ok {
		return CloneUnable, nil
	}
	defer done()
	fail := func(err error) (Cloned, error) {
		return CloneUnable, fmt.Errorf("blob %s: clone chunk %d at %d of %s: %w", b.name, c.Index, offset, from.name, err)
	}
	err := unix.IoctlFileCloneRange(int(b.data.Fd()), &unix.FileCloneRange{
		Src_fd: int64(from.data.Fd()), Src_offset: uint64(offset), Src_length: uint64(n), Dest_offset: r.Offset, //nolint:gosec // not below 0
	})
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOSYS):
		b.store.copies.Store(true) // nor will it later
		return CloneUnable, nil
	case err != nil:
		return fail(err)
	}
	b.reach(int64(r.end() * BlockSize)) //nolint:gosec // below Size
	var buf []byte
	good, err := b.readChunk(&c, &buf)
	if err == nil && good {
		b.mu.RLock()
		defer b.mu.RUnlock()
		b.setReady(&r)
		return CloneReady, nil
	}
	// Zeros, as they were, so that what is stored next finds them behind its end.
	if err = errors.Join(err, unix.Fallocate(int(b.data.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(r.Offset), n)); err != nil { //nolint:gosec // below Size
		return fail(err)
	}
	return CloneWrong, nil
}

// beginClone keeps others from storing a chunk until done is called; false: it is ready, claimed, not of this file, or somebody clones it.
func (b *Blob) beginClone(r *chunkRecord) (done func(), ok bool) {
	b.mu.Lock() // whoever stores something is done, and the next one looks
	defer b.mu.Unlock()
	first, ready := r.first(), b.ready.Words()
	if !b.view.Load().table.has(first) || b.cloning.now[first] != nil || b.isClaimed(first, r.end()) ||
		!eachWord(first, r.end(), func(w, mask uint64) bool { return ready[w].Load()&mask == 0 }) {
		return nil, false
	}
	if b.cloning.now == nil {
		b.cloning.now = map[uint64]chan struct{}{}
	}
	over := make(chan struct{})
	b.cloning.now[first] = over
	b.cloning.on.Add(1)
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.cloning.now, first)
		b.cloning.on.Add(-1)
		close(over)
	}, true
}

// lockStored holds mu for reading when no clone of the chunk at block first is on its way.
func (b *Blob) lockStored(first uint64) {
	for {
		b.mu.RLock()
		if b.cloning.on.Load() == 0 || b.cloning.now[first] == nil {
			return
		}
		over := b.cloning.now[first]
		b.mu.RUnlock()
		<-over
	}
}
