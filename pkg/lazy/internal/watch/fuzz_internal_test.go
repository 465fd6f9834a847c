package watch

import (
	"encoding/binary"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// record returns what the kernel writes for one pre-content event.
func record(fd int32, offset, count uint64) []byte {
	order := binary.NativeEndian
	p := make([]byte, recordSize)
	order.PutUint32(p, recordSize)
	p[4] = unix.FANOTIFY_METADATA_VERSION
	order.PutUint16(p[6:], fanotify.MetadataSize)
	order.PutUint64(p[8:], unix.FAN_PRE_ACCESS)
	order.PutUint32(p[16:], uint32(fd))
	p[fanotify.MetadataSize] = unix.FAN_EVENT_INFO_TYPE_RANGE
	order.PutUint16(p[fanotify.MetadataSize+2:], fanotify.RangeInfoSize)
	order.PutUint64(p[fanotify.MetadataSize+8:], offset)
	order.PutUint64(p[fanotify.MetadataSize+16:], count)
	return p
}

// FuzzInbox decodes any bytes as the events of one read. Those that are found can be kept in a slot.
func FuzzInbox(f *testing.F) {
	f.Add(record(7, 4096, 8192))
	f.Add(append(record(7, 1<<64-1, 1<<64-1), record(8, 0, 0)...))
	f.Add(append(record(-9, 0, 4096), make([]byte, recordSize)...))
	f.Add(record(7, 0, 4096)[:recordSize-1])
	table, err := NewTable(1)
	must(f, err)
	f.Cleanup(func() { must(f, table.Close()) })
	f.Fuzz(func(t *testing.T, p []byte) {
		events, err := decodeInbox(p)
		if err != nil && !errors.Is(err, fanotify.ErrInvalid) {
			t.Errorf("decodeInbox: %v", err)
		}
		if len(events) > len(p)/fanotify.MetadataSize {
			t.Errorf("%d events in %d bytes", len(events), len(p))
		}
		for _, e := range events {
			if e.fd < 0 || e.offset < 0 || e.count < 0 {
				t.Errorf("event %+v", e)
			}
			e.file = file{uint64(len(p)), uint64(e.fd)}
			table.put(0, e)
			if got, ok := table.get(0); !ok || got != e {
				t.Errorf("kept %+v as %+v, %v", e, got, ok)
			}
			table.free(0)
			if n := table.Pending(); n != 0 {
				t.Errorf("%d events are pending after all", n)
			}
		}
	})
}

// tableBytes returns a table of two slots, one of which is in use, with p as its inbox.
func tableBytes(f *testing.F, p []byte) []byte {
	table, err := NewTable(2)
	must(f, err)
	defer func() { must(f, table.Close()) }()
	table.put(1, event{fd: 1000, offset: 4096, count: 4096, file: file{1, 2}})
	copy(table.inbox(), p)
	return append([]byte(nil), table.memory.Bytes()...)
}

// FuzzTakeOver takes any bytes over as the table of a process that died. What is pending is found once, and the rest is free.
func FuzzTakeOver(f *testing.F) {
	f.Add(tableBytes(f, nil))
	f.Add(tableBytes(f, record(1001, 0, 4096)))
	f.Add(tableBytes(f, record(1000, 0, 4096)))
	f.Add(tableBytes(f, append(record(1001, 0, 4096), record(1002, 0, 4096)...)))
	f.Add(tableBytes(f, append(record(1001, 0, 4096), record(1001, 4096, 4096)...)))
	f.Add(tableBytes(f, record(1001, 0, 4096)[:30]))
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 1<<20 {
			return
		}
		fd, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC)
		must(t, err)
		mem := os.NewFile(uintptr(fd), "fuzz")
		if _, err := mem.Write(p); err != nil {
			t.Fatal(err)
		}
		table, err := OpenTable(mem)
		if err != nil {
			must(t, mem.Close())
			if table != nil {
				t.Errorf("OpenTable = %v, %v", table, err)
			}
			return
		}
		defer func() { must(t, table.Close()) }()
		w := &Watcher{table: table, inherited: map[int]inherited{}}
		err = w.inherit()
		seen := map[int32]bool{}
		for slot, i := range w.inherited {
			if i.held {
				must(t, unix.Close(int(i.fd)))
			}
			if seen[i.fd] {
				t.Errorf("event %d is inherited twice", i.fd)
			}
			seen[i.fd] = true
			if got, ok := table.get(slot); !ok || got != i.event {
				t.Errorf("slot %d has %+v, %v, want %+v", slot, got, ok, i.event)
			}
			if fill := w.fillInherited(t.Context(), w.lookInherited(i.event), i.event); i.offset < 0 && fill == nil {
				t.Errorf("%+v passes, though no file has such bytes", i.event)
			}
		}
		if err != nil {
			if !errors.Is(err, ErrTable) && !errors.Is(err, fanotify.ErrInvalid) {
				t.Errorf("inherit: %v", err)
			}
			return
		}
		if len(w.inherited)+len(w.freeSlots) != table.slots || table.Pending() != len(w.inherited) {
			t.Errorf("%d pending, %d inherited and %d free of %d slots", table.Pending(), len(w.inherited), len(w.freeSlots), table.slots)
		}
		if left, err := decodeInbox(table.inbox()); len(left) > 0 || err != nil {
			t.Errorf("%d events left in the inbox, %v", len(left), err)
		}
	})
}
