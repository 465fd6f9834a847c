package fuse

import (
	"testing"

	"golang.org/x/sys/unix"
)

// A table takes memory for the slots that were used, and those that are pending are found wherever they are.
func TestTableTakesLittle(t *testing.T) {
	t.Parallel()
	table, err := NewTable()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	}()
	taken := func() int64 {
		var st unix.Stat_t
		if err := unix.Fstat(int(table.File().Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512 // st_blocks in inode(7)
	}
	server := func() *Server {
		s, err := NewServer(Config{Device: table.File(), Table: table})
		if err != nil {
			t.Fatal(err)
		}
		s.takeOver()
		return s
	}
	s := server()
	if n := len(s.freeSlots); n != slots || table.Pending() != 0 {
		t.Errorf("%d slots of a new table are free and %d requests pending, want %d and 0", n, table.Pending(), slots)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got := taken(); got > 64<<10 {
		t.Errorf("a table that nobody used takes %d bytes, want at most 64 KiB", got)
	}
	for i, n := range []int{slots - 1, 0, 1000} {
		table.words[firstSlot+n*slotWords].Store(1)
		if got := table.Pending(); got != i+1 {
			t.Errorf("with slot %d used, Pending() = %d, want %d", n, got, i+1)
		}
		if used := table.used(); used <= n || used > slots {
			t.Errorf("with slot %d used, used() = %d, want more than it, and at most %d", n, used, slots)
		}
	}
	table.free(0)
	s, err = NewServer(Config{Device: table.File(), Table: table})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(s.freeSlots); n != slots-2 {
		t.Errorf("%d slots are free, want all but 2 of %d", n, slots)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
