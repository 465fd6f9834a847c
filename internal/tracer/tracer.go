// Package tracer runs one optimizer-server per container and turns what it streams
// into a trace.
package tracer

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// Options says what to trace and for how long.
type Options struct {
	Server  string        // path of the optimizer-server binary
	PID     int           // the container's first process, as the host numbers it
	Timeout time.Duration // 0: none; the recording ends then, counted from arming
	Idle    time.Duration // 0: none; ends when no file was touched for the first time for that long
	Log     *zap.Logger   // nil: silent
}

// Result is what one session recorded.
type Result struct {
	Trace    trace.Trace
	End      string        // "exit", "stop", "timeout", "idle", "killed", or the reason handed to Stop
	Armed    time.Time     // wall clock of arming; zero when it never armed
	Duration time.Duration // from arming to the end
	Err      error         // the tracer could not start or died; the Trace then has a Loss
}

// Session is one running recording. All methods are safe for concurrent use.
type Session struct {
	ready chan struct{}
	done  chan struct{}
	res   Result
}

// Start spawns the server and returns without waiting for it.
func Start(ctx context.Context, o Options) (*Session, error) {
	return nil, errors.New("tracer: not built yet")
}

// Ready returns a channel that is closed once the marks are in place.
func (s *Session) Ready() <-chan struct{} { return s.ready }

// Done returns a channel that is closed when the recording has ended and every event is in.
func (s *Session) Done() <-chan struct{} { return s.done }

// Stop asks the recording to end.
func (s *Session) Stop(reason string) {}

// Result returns what was recorded; call it after Done.
func (s *Session) Result() Result { return s.res }
