// Package persist owns the access list: one type, its native format, the formats of
// other tools, and its storage on disk. It neither traces nor builds.
package persist

import (
	"time"

	"github.com/headstart-oci/headstart/pkg/trace"
)

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
	// Engine names what recorded the run ("fanotify").
	Engine string
	// Grade says how exact the list is: "file" (whole files).
	Grade string
	// Started is the wall-clock time of arming.
	Started time.Time
	// Duration is the time from arming to the end of the recording.
	Duration time.Duration
	// End is why the recording ended: "exit", "stop", "timeout", "idle", "killed".
	End string

	trace.Trace
}
