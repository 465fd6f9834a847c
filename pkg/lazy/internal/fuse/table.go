package fuse

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/shm"
)

// Words of a table, of 8 bytes each: a header, the inboxes, the slots.
const (
	wordMagic = 0 // tableMagic
	wordFlags = 1 // what INIT agreed on, flagAgreed with it
	wordInbox = 512

	// inboxBytes is what one read takes at most: the kernel wants room for any request that it may send, and at least this
	// (FUSE_MIN_READ_BUFFER), which suffices as nothing is written (maxWrite).
	inboxBytes = 8192
	inboxes    = 4
	firstSlot  = wordInbox + inboxes*inboxBytes/8

	// A slot has the bytes of a READ request, the only one that waits for anything.
	slotWords = 16
	slots     = 4096

	tableWords = firstSlot + slots*slotWords
	tableMagic = 0x6873_6675_7365_0001 // "hsfuse", version 1
	flagAgreed = 1 << 63               // INIT was answered; no capability has this bit
)

// ErrTable is returned for memory that is no table of this version.
var ErrTable = errors.New("no table of FUSE requests of this version")

// Table is what survives a process of the requests that it has read from the kernel and not answered. One [Server]
// uses it at a time.
type Table struct {
	memory *shm.Memory
	words  []atomic.Uint64
}

// NewTable returns an empty table. Of its half MiB, what was never used takes no memory. The caller closes it.
func NewTable() (*Table, error) {
	m, err := shm.New("headstart-fuse", tableWords)
	if err != nil {
		return nil, err
	}
	t := &Table{memory: m, words: m.Words()}
	t.words[wordMagic].Store(tableMagic)
	return t, nil
}

// OpenTable returns the table that f, from [Table.File], refers to, as another process left it. The Table owns f; when
// there is an error, such as [ErrTable], the caller keeps it.
func OpenTable(f *os.File) (*Table, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != tableWords*8 {
		return nil, fmt.Errorf("%w: %d bytes, want %d", ErrTable, info.Size(), tableWords*8)
	}
	m, err := shm.Open(f)
	if err != nil {
		return nil, err
	}
	t := &Table{memory: m, words: m.Words()}
	if magic := t.words[wordMagic].Load(); magic != tableMagic {
		return nil, errors.Join(fmt.Errorf("%w: magic %#x", ErrTable, magic), m.Unmap())
	}
	return t, nil
}

// File returns the descriptor to keep. It stays the Table's.
func (t *Table) File() *os.File { return t.memory.File() }

// Close unmaps the table, which nobody may use any more. What others keep stays.
func (t *Table) Close() error { return t.memory.Close() }

// Pending returns how many requests are pending, in whichever process.
func (t *Table) Pending() int {
	n := 0
	for i := range inboxes {
		if t.words[wordInbox+i*inboxBytes/8].Load() != 0 {
			n++
		}
	}
	for i := range t.used() {
		if t.pending(i) {
			n++
		}
	}
	return n
}

// used returns a number that all slots are below which may be pending. To look at a page of memory makes it take room, so those that
// nobody has written to are left alone: half a MiB for each mount.
func (t *Table) used() int {
	fd, end := int(t.File().Fd()), int64(0)
	for {
		data, err := unix.Seek(fd, end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // none behind it
			break
		}
		if err == nil {
			end, err = unix.Seek(fd, data, unix.SEEK_HOLE)
		}
		if err != nil {
			return slots
		}
	}
	return int(min(max(0, end/8-firstSlot+slotWords-1)/slotWords, slots))
}

// inbox is where reader n has the kernel write a request. Its first word, which has the request's length, is zero
// unless there is one that is not answered and has no slot.
func (t *Table) inbox(n int) []byte {
	at := wordInbox*8 + n*inboxBytes
	return t.memory.Bytes()[at : at+inboxBytes : at+inboxBytes]
}

// clearInbox says that the request of inbox n was answered, or has a slot.
func (t *Table) clearInbox(n int) { t.words[wordInbox+n*inboxBytes/8].Store(0) }

// slot returns the bytes of slot n.
func (t *Table) slot(n int) []byte {
	at := (firstSlot + n*slotWords) * 8
	return t.memory.Bytes()[at : at+slotWords*8 : at+slotWords*8]
}

// put makes request pending in slot n: its first word, with which it counts, comes last.
func (t *Table) put(n int, request []byte) {
	copy(t.slot(n)[8:], request[8:])
	t.words[firstSlot+n*slotWords].Store(word(request))
}

// pending reports whether slot n has a request.
func (t *Table) pending(n int) bool { return t.words[firstSlot+n*slotWords].Load() != 0 }

// free empties slot n.
func (t *Table) free(n int) { t.words[firstSlot+n*slotWords].Store(0) }

// agreed returns the capabilities that INIT agreed on, 0 before it.
func (t *Table) agreed() uint64 { return t.words[wordFlags].Load() &^ flagAgreed }

func (t *Table) agree(flags uint64) { t.words[wordFlags].Store(flags | flagAgreed) }
