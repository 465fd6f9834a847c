package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/atomicfile"
)

// Sync makes what is ready durable: first the data, then the bits. It costs nothing
// when nothing has changed. When the data cannot be made durable, what was stored since
// the last Sync is not ready any more, because the kernel may have dropped it; when only
// the bits cannot, it stays ready until the machine stops. One Sync runs at a time.
func (b *Blob) Sync() error {
	b.syncMu.Lock()
	defer b.syncMu.Unlock()
	snapshot := b.snapshot()
	if slices.Equal(snapshot, b.durable) && (len(snapshot) == 0 || b.stamped == b.stamp()) {
		return nil
	}
	if err := syncData(b.data); err != nil {
		b.forget()
		return fmt.Errorf("blob %s: sync data: %w", b.name, err)
	}
	if err := b.writeReady(snapshot); err != nil {
		return fmt.Errorf("blob %s: sync ready bits: %w", b.name, err)
	}
	b.durable = snapshot
	return nil
}

// Durable reports whether the blob is complete and all that is needed of it would be there after the machine stopped. While a
// Sync runs it is not, as far as anybody knows.
func (b *Blob) Durable() bool {
	if !b.Complete() || !b.syncMu.TryLock() {
		return false
	}
	defer b.syncMu.Unlock()
	for w, need := range b.view.Load().need {
		if need == 0 {
			continue
		}
		if w >= len(b.durable) || need&^b.durable[w] != 0 {
			return false
		}
	}
	return true
}

func syncData(f *os.File) error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// snapshot copies the ready bits, without zeros at the end. A bit is set after its data
// were written, so data that are synced later than this have them all.
func (b *Blob) snapshot() []uint64 {
	words := b.ready.Words()
	out := make([]uint64, len(words))
	last := 0
	for i := range words {
		claimed := b.claimOf(uint64(i)) // before what is ready: what is confirmed is that first
		if out[i] = words[i].Load() | claimed; out[i] != 0 {
			last = i + 1
		}
	}
	return out[:last:last]
}

// forget takes back what is not durable. The caller holds syncMu.
func (b *Blob) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	words := b.ready.Words()
	for i := range words {
		keep := uint64(0)
		if i < len(b.durable) {
			keep = b.durable[i]
		}
		words[i].And(keep)
	}
	b.recount()
}

func (b *Blob) writeReady(words []uint64) error {
	stamp := b.stamp()
	h := header{Magic: magicReady, Records: uint32(len(words)), Size: b.blob.UncompressedSize, Blob: b.identity, Changed: stamp} //nolint:gosec // at most maxBlocks/64
	body, err := binary.Append(make([]byte, 0, len(words)*8), binary.LittleEndian, words)
	if err != nil {
		return err
	}
	p, err := encode(h, body)
	if err != nil {
		return err
	}
	if err := b.inDir(func(dir *os.Root) error {
		return atomicfile.Write(dir, ".", "ready", 0o600, func(w io.Writer) error {
			_, err := w.Write(p)
			return err
		})
	}); err != nil {
		return err
	}
	b.stamped = stamp
	return nil
}

// readReady returns the durable bits of a data file of length bytes that is to have size
// bytes; none when there is no such file. errCorrupt when it is not what writeReady
// writes, or speaks of more than there is.
func readReady(dir *os.Root, blob [32]byte, size uint64, length int64) ([]uint64, error) {
	p, err := readState(dir, "ready", 8)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseReady(p, blob, size, length)
}

// parseReady is readReady for the bytes of the file.
func parseReady(p []byte, blob [32]byte, size uint64, length int64) ([]uint64, error) {
	h, body, err := decode(p, magicReady, blob, 8)
	if err != nil { // also when it is another blob's: the chunk table says whose directory it is
		return nil, fmt.Errorf("ready: %w: %w", errCorrupt, err)
	}
	words := make([]uint64, h.Records)
	for i := range words {
		words[i] = binary.LittleEndian.Uint64(body[i*8:])
	}
	end := uint64(0)
	if n := len(words); n > 0 {
		end = uint64(n*64-bits.LeadingZeros64(words[n-1])) * BlockSize //nolint:gosec // at most maxBlocks
	}
	if h.Size != size || end > size || end > uint64(length) { //nolint:gosec // of a file
		return nil, fmt.Errorf("ready: %w: bits up to byte %d of %d, in a file of %d of %d", errCorrupt, end, h.Size, length, size)
	}
	return words, nil
}
