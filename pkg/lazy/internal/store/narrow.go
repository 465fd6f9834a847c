package store

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// narrow makes a table of all without chunks that are not among recs and of which nothing is there, and returns it with what is left: images had them that
// were unmounted before they were fetched, and nobody fetches them for those that have recs, which would never be complete. No other mount needs
// the blob, but for complete ones, and for those that failed, of which all was there, or claimed: where something of it was wrong nothing is taken out, since what is not needed
// reads as zeros. nil, and all, when nothing is to be taken out, or cannot be, for instance since the disk is full, with the reason.
func (b *Blob) narrow(dir *os.Root, all, recs []chunkRecord) (*table, []chunkRecord, error) {
	if _, wrong := b.store.wrong.Load(file{b.dev, b.ino}); wrong {
		return nil, all, nil
	}
	left, gone := make([]chunkRecord, 0, len(all)), []chunkRecord(nil)
	for i := range all {
		switch {
		case len(recs) > 0 && recs[0] == all[i]:
			recs = recs[1:]
			left = append(left, all[i])
		case b.void(&all[i]):
			gone = append(gone, all[i])
		default:
			left = append(left, all[i])
		}
	}
	if len(gone) == 0 || len(recs) > 0 {
		return nil, all, nil
	}
	t, err := b.takeOut(dir, left, gone)
	if err != nil {
		return nil, all, err
	}
	return t, left, nil
}

// Narrow takes chunks that are in none of sets, of which nothing is there, out of what is needed: an image that has been unmounted had them, and
// nobody fetches them for those that are left, whose chunks sets are; nor does anybody fetch a chunk that is in no set meanwhile. It does
// nothing where somebody may read the data file whom this process does not know. After an error all is needed that was.
func (b *Blob) Narrow(sets ...[]rafs.Chunk) error {
	if b.Complete() || !b.known {
		return nil
	}
	var recs []chunkRecord
	for _, set := range sets {
		more, err := records(set, b.blob.UncompressedSize)
		if err == nil {
			recs, _, err = merge(recs, more)
		}
		if err != nil {
			return fmt.Errorf("blob %s: %w", b.name, err)
		}
	}
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	err := b.inDir(func(dir *os.Root) error {
		_, all, err := readTable(dir, b.identity)
		if err != nil {
			return err
		}
		if _, added, err := merge(all, recs); err != nil || added {
			return errors.Join(err, errCorrupt)
		}
		t, left, err := b.narrow(dir, all, recs)
		if err != nil {
			return err
		}
		return b.see(dir, t, left)
	})
	if err != nil {
		return fmt.Errorf("blob %s: %w", b.name, err)
	}
	return nil
}

// void reports whether no block of a chunk is ready or claimed.
func (b *Blob) void(r *chunkRecord) bool {
	ready := b.ready.Words()
	return eachWord(r.first(), r.end(), func(w, mask uint64) bool { return mask&(ready[w].Load()|b.claimOf(w)) == 0 })
}

// takeOut writes a table of left, and makes holes of gone: what a process wrote there that died before it synced would lie behind another chunk's
// end.
func (b *Blob) takeOut(dir *os.Root, left, gone []chunkRecord) (*table, error) {
	for i := 0; i < len(gone); {
		first, end := gone[i].first(), gone[i].end()
		for i++; i < len(gone) && gone[i].first() == end; i++ {
			end = gone[i].end()
		}
		if err := b.punch(int64(first)*BlockSize, int64(end-first)*BlockSize); err != nil { //nolint:gosec // at most maxBlocks
			return nil, fmt.Errorf("punch hole: %w", err)
		}
	}
	t, err := writeTable(dir, b.blob, left)
	if err != nil {
		return nil, fmt.Errorf("write table: %w", err)
	}
	return t, nil
}

// punch makes a range of the data file a hole.
func (b *Blob) punch(offset, length int64) error {
	for {
		if err := unix.Fallocate(int(b.data.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, length); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
