// Package trace turns what the kernel reports of one container run into ordered
// accesses: which bytes of which files the run touched, when, and by whom, together
// with what is known to be missing.
package trace

import "time"

// Range is a half-open byte range [Offset, Offset+Length) of a file.
type Range struct {
	Offset int64 // bytes, at least 0
	Length int64 // bytes, greater than 0
	// Elapsed is the time from the arming of the tracer to the first touch of the range;
	// 0 when the source of the range knows no times.
	Elapsed time.Duration
	// Certain tells that the run itself touched every page of the range: it read them or
	// faulted on them. Without it the range is an upper bound: the kernel mapped those pages
	// around a fault, and whether they were used nobody can tell.
	Certain bool
}

// How tells in what ways a file was touched; a bit set.
type How uint8

// The bits of [How].
const (
	Opened   How = 1 << iota // the file was opened (FAN_OPEN)
	Read                     // bytes were read through a descriptor (FAN_ACCESS)
	Executed                 // the file was opened to be executed (FAN_OPEN_EXEC)
	Runtime                  // the container runtime read the file to create the container
)

// Access is one file of the image that a run touched, at its first touch.
type Access struct {
	// Path is absolute inside the container's root, slash-separated and cleaned;
	// its bytes are arbitrary and need not be UTF-8.
	Path string
	// How holds every way in which the file was touched during the run.
	How How
	// Size is the file's size in bytes at the first touch.
	Size int64
	// Elapsed is the time from the arming of the tracer to the first touch; never negative.
	Elapsed time.Duration
	// PID is the process of the first touch as seen from the host; 0 when unknown.
	PID int32
	// Command is that process' command name (/proc/PID/comm), empty when it was gone.
	Command string
	// Ranges are the bytes touched, disjoint and in order of first touch: together the upper
	// bound of what was touched, those with Certain the lower bound. Nil means that the
	// engine knows files only: the whole file counts. Empty and not nil: no byte was touched.
	Ranges []Range
}

// Grades of a trace: how exact its ranges are.
const (
	GradeExact       = "exact"        // every range is certain: the run touched each of its pages
	GradeFaultAround = "fault-around" // ranges, some of them an upper bound
	GradeFile        = "file"         // whole files
)

// Loss is something a trace is known to miss.
type Loss struct {
	// Reason is a short word: "overflow", "overrun", "late", "killed",
	// "unresolved", "pages", "exec", "limit".
	Reason string
	// Count is how many events or files are missing; -1 when nobody knows.
	Count int64
	// Detail says in one line what happened; may be empty.
	Detail string
}

// Process is one process of a run.
type Process struct {
	PID     int32  // as seen from the host, greater than 0
	Parent  int32  // its parent's PID; 0 when unknown or outside the container
	Command string // its command name when last seen; empty when unknown
}

// Trace is everything recorded of one run. Accesses are ordered by first touch.
type Trace struct {
	Accesses []Access
	// Processes are those that Accesses name and their ancestors as far as known, by the time
	// they were first seen; may be empty.
	Processes []Process
	Losses    []Loss // empty means that the trace is complete
	// Skipped counts touched files that are no content of the image (volumes,
	// deleted files, devices, sockets); this is no loss.
	Skipped int64
	// Events is the number of kernel events the trace was made from.
	Events int64
}

// Complete reports whether nothing is known to be missing.
func (t *Trace) Complete() bool { return len(t.Losses) == 0 }
