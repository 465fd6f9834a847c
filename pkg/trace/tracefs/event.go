package tracefs

import (
	"fmt"
	"strings"
)

// Kind says what happened; a kernel tracepoint each.
type Kind uint8

// The kinds of events. The numbers are this package's.
const (
	Read   Kind = iota // pages were read from the page cache: mm_filemap_get_pages
	Fault              // one page was faulted on: mm_filemap_fault
	Around             // the cached pages in a window around a fault were mapped: mm_filemap_map_pages
	Insert             // pages entered the page cache: mm_filemap_add_to_page_cache
	Fork               // a thread or process was made: sched_process_fork
	Exec               // a program was started: sched_process_exec
	Wait               // a thread sleeps uninterruptibly, as for storage: sched_switch

	kinds = int(Wait) + 1
)

// tracepoint says where a kind comes from: its directory below events/ and the fields of
// its record that this package reads, in the order of the constants below. A field in
// optional may be missing and is then 0.
type tracepoint struct {
	dir      string
	fields   [maxFields]string
	optional int // index of the first optional field; maxFields: none
}

const maxFields = 4

// tracepoints is by [Kind]. Sources: include/trace/events/filemap.h and sched.h.
var tracepoints = [kinds]tracepoint{
	Read:   {"filemap/mm_filemap_get_pages", [maxFields]string{"s_dev", "i_ino", "index", "last_index"}, maxFields},
	Fault:  {"filemap/mm_filemap_fault", [maxFields]string{"s_dev", "i_ino", "index"}, maxFields},
	Around: {"filemap/mm_filemap_map_pages", [maxFields]string{"s_dev", "i_ino", "index", "last_index"}, maxFields},
	Insert: {"filemap/mm_filemap_add_to_page_cache", [maxFields]string{"s_dev", "i_ino", "index", "order"}, 3}, // order: Linux 5.16
	Fork:   {"sched/sched_process_fork", [maxFields]string{"parent_pid", "child_pid"}, maxFields},
	Exec:   {"sched/sched_process_exec", [maxFields]string{"pid", "old_pid"}, maxFields},
	Wait:   {"sched/sched_switch", [maxFields]string{"prev_pid", "prev_state"}, maxFields},
}

// waitFilter picks the switches away from threads that [Wait] is about. Source: include/linux/sched.h TASK_UNINTERRUPTIBLE.
const waitFilter = "prev_state & 2"

// String returns the tracepoint's name, such as "filemap:mm_filemap_get_pages".
func (k Kind) String() string {
	if int(k) >= kinds {
		return fmt.Sprintf("kind(%d)", uint8(k))
	}
	return strings.Replace(tracepoints[k].dir, "/", ":", 1)
}

// Set is a set of kinds. The zero value is empty.
type Set uint8

// Sets of kinds that belong together.
const (
	// Pages are the events of the exact engine: all that a program touches.
	Pages Set = 1<<Read | 1<<Fault | 1<<Around
	// Inserts is the event of the next best engine: what was read from storage.
	Inserts Set = 1 << Insert
	// Processes are the events about processes.
	Processes Set = 1<<Fork | 1<<Exec
	// Waits is the event about sleep.
	Waits Set = 1 << Wait

	all Set = 1<<kinds - 1
)

// Has reports whether k is in s.
func (s Set) Has(k Kind) bool { return int(k) < kinds && s&(1<<k) != 0 }

// Contains reports whether all of t is in s.
func (s Set) Contains(t Set) bool { return s&t == t }

// String returns the names of the kinds, separated by commas and spaces.
func (s Set) String() string {
	var names []string
	for k := range Kind(kinds) {
		if s.Has(k) {
			names = append(names, k.String())
		}
	}
	return strings.Join(names, ", ")
}

// Event is one record of the kernel.
type Event struct {
	Kind Kind
	// PID is the thread that did it, as the initial PID namespace numbers it: a
	// process' first thread has the number of the process, the others have not.
	PID int32
	// Other is the new thread of a [Fork], and what the thread of an [Exec] was called
	// before, which differs from PID where a thread took over its process; else 0.
	Other int32
	// Time is when it happened, in nanoseconds of CLOCK_MONOTONIC.
	Time int64
	// Device is the superblock's device number as the kernel has it, s_dev: not in the
	// encoding of stat(2). See Major and Minor. 0 for Fork, Exec and Wait, like Inode, First and Last.
	Device uint32
	Inode  uint64
	// First and Last are page indexes of the file, both included: page i holds bytes
	// [i*pagesize, (i+1)*pagesize). Last may lie beyond the end of the file, as a read's
	// buffer may. First <= Last.
	First, Last uint64
}

// Source of the shift: include/linux/kdev_t.h MINORBITS.
const minorBits = 20

// Major returns the major number of the event's device.
func (e *Event) Major() uint32 { return e.Device >> minorBits }

// Minor returns the minor number of the event's device.
func (e *Event) Minor() uint32 { return e.Device & (1<<minorBits - 1) }
