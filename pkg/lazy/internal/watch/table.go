package watch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/shm"
)

// Words of a table, of 8 bytes each: a header, the inbox, the slots.
const (
	wordMagic = 0 // tableMagic
	wordSlots = 1 // number of slots
	wordMost  = 2 // the highest number of an event so far
	wordInbox = 8 // the inbox begins here

	// recordSize is the most that the kernel writes for one event of a pre-content group.
	recordSize = fanotify.MetadataSize + fanotify.RangeInfoSize
	// inboxEvents is how many events one read takes at most.
	inboxEvents = 64
	inboxWords  = inboxEvents * recordSize / 8
	firstSlot   = wordInbox + inboxWords

	// A slot: state and descriptor, offset, count, device and inode of the file.
	slotWords   = 5
	slotState   = 0 // 0: free; else slotPending with the descriptor's number in the low half
	slotOffset  = 1
	slotCount   = 2
	slotDevice  = 3
	slotInode   = 4
	slotPending = 1 << 32

	// DefaultSlots is how many events may be pending. More wait in the kernel's queue.
	DefaultSlots = 4096

	tableMagic = 0x6873_7065_6e64_0001 // "hspend", version 1
)

// ErrTable is returned for memory that is no table of this version.
var ErrTable = errors.New("no table of pending events of this version")

// Table is what survives a daemon of its pending events. It is used by one [Watcher] at
// a time.
type Table struct {
	memory *shm.Memory
	words  []atomic.Uint64
	slots  int // inboxEvents more than may be pending when the next ones are read
}

// NewTable returns an empty table for slots events; 0: [DefaultSlots]. The caller closes it.
func NewTable(slots int) (*Table, error) {
	if slots == 0 {
		slots = DefaultSlots
	}
	if slots < 1 || slots > 1<<20 {
		return nil, fmt.Errorf("table of %d pending events, want 1 to %d", slots, 1<<20)
	}
	// A read may give twice as many events as asked for, if they had no ranges.
	slots += inboxEvents
	m, err := shm.New("headstart-pending", firstSlot+slots*slotWords)
	if err != nil {
		return nil, err
	}
	t := &Table{memory: m, words: m.Words(), slots: slots}
	t.words[wordSlots].Store(uint64(slots))
	t.words[wordMagic].Store(tableMagic)
	return t, nil
}

// OpenTable returns the table that f, from [Table.File], refers to, as another process
// left it. The Table owns f; when there is an error, such as [ErrTable], the caller keeps it.
func OpenTable(f *os.File) (*Table, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() < (firstSlot+slotWords)*8 {
		return nil, fmt.Errorf("%w: %d bytes", ErrTable, info.Size())
	}
	m, err := shm.Open(f)
	if err != nil {
		return nil, err
	}
	t := &Table{memory: m, words: m.Words()}
	slots := t.words[wordSlots].Load()
	if magic := t.words[wordMagic].Load(); magic != tableMagic || slots <= inboxEvents || slots > 1<<20+inboxEvents || firstSlot+int(slots)*slotWords != len(t.words) {
		err := fmt.Errorf("%w: magic %#x, %d slots, %d words", ErrTable, magic, slots, len(t.words))
		return nil, errors.Join(err, m.Unmap())
	}
	t.slots = int(slots)
	return t, nil
}

// File returns the descriptor to keep. It stays the Table's.
func (t *Table) File() *os.File { return t.memory.File() }

// Pending returns how many events are pending, in whichever process. It looks at every slot.
func (t *Table) Pending() int {
	n := 0
	for i := range t.slots {
		if _, ok := t.get(i); ok {
			n++
		}
	}
	return n
}

// Close unmaps the table. What others keep stays.
func (t *Table) Close() error { return t.memory.Close() }

// inbox is where the kernel writes events to. It is zero but between the read and the
// moment when every event of it has its slot.
func (t *Table) inbox() []byte {
	return t.memory.Bytes()[wordInbox*8 : (wordInbox+inboxWords)*8]
}

// clearInbox makes the first n bytes of the inbox zero, the first word first: without it nothing
// in the inbox counts.
func (t *Table) clearInbox(n int) {
	for i := range (n + 7) / 8 {
		t.words[wordInbox+i].Store(0)
	}
}

// event is one pending event.
type event struct {
	fd            int32
	offset, count int64
	file          file
}

// file identifies a data file; zero when a process died before it knew.
type file struct{ dev, ino uint64 }

func (t *Table) slot(n int) []atomic.Uint64 {
	at := firstSlot + n*slotWords
	return t.words[at : at+slotWords]
}

// put makes e pending in slot n.
func (t *Table) put(n int, e event) {
	s := t.slot(n)
	for fd := uint64(max(0, e.fd)); ; {
		most := t.words[wordMost].Load()
		if fd <= most || t.words[wordMost].CompareAndSwap(most, fd) {
			break
		}
	}
	s[slotOffset].Store(uint64(e.offset)) //nolint:gosec // same bits back
	s[slotCount].Store(uint64(e.count))   //nolint:gosec // same bits back
	s[slotDevice].Store(e.file.dev)
	s[slotInode].Store(e.file.ino)
	s[slotState].Store(slotPending | uint64(uint32(e.fd))) //nolint:gosec // same bits back
}

// get returns what is pending in slot n.
func (t *Table) get(n int) (event, bool) {
	s := t.slot(n)
	state := s[slotState].Load()
	if state&slotPending == 0 {
		return event{}, false
	}
	return event{
		fd:     int32(uint32(state)),                                           //nolint:gosec // put stored it
		offset: int64(s[slotOffset].Load()), count: int64(s[slotCount].Load()), //nolint:gosec // put stored them
		file: file{s[slotDevice].Load(), s[slotInode].Load()},
	}, true
}

// free empties slot n.
func (t *Table) free(n int) { t.slot(n)[slotState].Store(0) }

// decodeInbox returns the events in p, which the kernel wrote, without their files; it
// ends at zeros.
func decodeInbox(p []byte) ([]event, error) {
	var out []event
	for len(p) >= fanotify.MetadataSize && binary.NativeEndian.Uint32(p) != 0 {
		e, size, err := fanotify.Decode(p)
		if err != nil {
			return out, err
		}
		p = p[size:]
		if e.FD < 0 || !e.Permission() {
			continue // the kernel has answered the one and waits for no answer to the other
		}
		out = append(out, pending(e))
	}
	return out, nil
}

// pending returns e as a range of its file. Without a range it may be any byte.
func pending(e fanotify.Event) event {
	const most = 1<<63 - 1
	p := event{fd: e.FD, count: most}
	if e.HasRange {
		p.offset, p.count = int64(min(e.Offset, most)), int64(min(e.Count, most))
	}
	return p
}
