// Package persist owns the access list: one type, its native format, the formats of
// other tools, and its storage on disk. It neither traces nor builds.
package persist

import (
	"time"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// Values of [List.Grade]. A list of a later recorder may have another one.
const (
	// GradeExact: every byte range was touched by the run itself.
	GradeExact = trace.GradeExact
	// GradeFaultAround: ranges that are not certain were mapped around a page fault.
	GradeFaultAround = trace.GradeFaultAround
	// GradeFile: whole files.
	GradeFile = trace.GradeFile
	// GradeRange: the ranges come from another tool's list.
	GradeRange = "range"
)

// Verdicts of a list, as its file says them.
const (
	verdictComplete   = "complete"
	verdictIncomplete = "incomplete"
)

// Verdict returns "complete", or "incomplete" when l has losses.
func (l *List) Verdict() string {
	if l.Complete() {
		return verdictComplete
	}
	return verdictIncomplete
}

// List is the access list of one run: what the run read of its image, in order, and
// what is known to be missing. A List is a value: functions that change one return a new one.
type List struct {
	// Reference is the image reference the container was started from, as the runtime gave it.
	Reference string
	// Digest is the digest of the image's manifest for Platform ("sha256:…"), empty when unknown.
	Digest string
	// Platform is "os/arch[/variant]".
	Platform string
	// Container is the container's id; unique per run.
	Container string
	// Name is the container's name, Pod and Namespace its pod's; each may be empty.
	Name, Pod, Namespace string
	// Command is the argument vector of the container's first process; may be empty.
	Command []string
	// Engine names what recorded the run: "fanotify" alone, or with the source of the ranges
	// ("fanotify+filemap"). Empty when unknown.
	Engine string
	// Grade says how exact the list is: one of the Grade constants, or empty when unknown.
	Grade string
	// Started is the wall-clock time of arming.
	Started time.Time
	// Duration is the time from arming to the end of the recording.
	Duration time.Duration
	// End is why the recording ended: "exit", "stop", "timeout", "idle", "killed".
	End string

	trace.Trace
}
