package tracer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// run owns the process: it reads until the stream ends, then waits for it, once.
func (s *Session) run(ctx context.Context) {
	watched, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		s.watch(ctx, s.stdout, ended)
	}()
	in := receiver{s: s}
	err := in.read(stream.NewReader(bufio.NewReaderSize(s.stdout, 64<<10)))
	if err != nil {
		// Nothing sensible follows, and a process that writes on would never end.
		_ = s.cmd.Process.Kill() // it may have ended already
	}
	close(ended)
	<-watched
	s.unlend()
	s.lending.Wait()
	exit := s.cmd.Wait()
	s.giveBack()
	s.res = in.result(err, asExit(exit))
	s.returning.Wait()
	close(s.done)
}

// watch asks the process to end when it is time to, and kills it when it does not.
func (s *Session) watch(ctx context.Context, stdout io.Closer, ended <-chan struct{}) {
	timeout, idle, grace := newAlarm(), newAlarm(), newAlarm()
	defer timeout.stop()
	defer idle.stop()
	defer grace.stop()
	ready, stop, cancelled := s.ready, s.stop, ctx.Done()
	asked := false
	for {
		select {
		case <-ended:
			s.closeInput.Do(s.hangUp)
			return
		case <-ready:
			ready = nil
			timeout.in(s.o.Timeout)
			idle.in(s.o.Idle)
		case <-s.touched:
			if ready == nil {
				idle.in(s.o.Idle)
			}
		case <-s.alive:
			if asked {
				grace.in(s.o.Grace)
			}
		case <-timeout.C:
			s.Stop(EndTimeout)
		case <-idle.C:
			s.Stop(EndIdle)
		case <-cancelled:
			cancelled = nil
			s.Stop(EndStop)
		case <-stop:
			stop, asked = nil, true
			s.closeInput.Do(s.hangUp)
			grace.in(s.o.Grace)
		case <-grace.C:
			s.log.Warn("tracer does not end; killing it", zap.Duration("grace", s.o.Grace))
			_ = s.cmd.Process.Kill() // it may have ended already
			_ = stdout.Close()       // a child of it may live on; nothing more is read
		}
	}
}

// hangUp closes the pipe or socket whose end asks the server to finish.
func (s *Session) hangUp() {
	if err := s.stdin.Close(); err != nil {
		s.log.Debug("close the tracer's input", zap.Error(err))
	}
}

// alarm is a timer that may be unset.
type alarm struct{ *time.Timer }

func newAlarm() alarm {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return alarm{t}
}

// in sets the alarm; 0 leaves it as it is.
func (a alarm) in(d time.Duration) {
	if d > 0 {
		a.Reset(d)
	}
}

func (a alarm) stop() { a.Stop() }

// receiver turns frames into a result.
type receiver struct {
	s       *Session
	rec     trace.Recorder
	armed   time.Time
	early   bool
	began   time.Time // monotonic
	mark    string
	engine  string
	end     *stream.End
	failure *stream.Failure
}

// read handles frames until the stream ends. It returns nil at an end that the server
// announced, and else what was wrong.
func (r *receiver) read(in *stream.Reader) error {
	for {
		f, err := in.Next()
		if errors.Is(err, io.EOF) && (r.end != nil || r.failure != nil) {
			return nil
		}
		if err != nil {
			return err
		}
		if r.end != nil || r.failure != nil {
			return fmt.Errorf("%w: %T after the last frame", stream.ErrInvalid, f)
		}
		if err := r.frame(f); err != nil {
			return err
		}
		token(r.s.alive)
	}
}

func (r *receiver) frame(f stream.Frame) error {
	switch f := f.(type) {
	case stream.Ready:
		if !r.began.IsZero() {
			return fmt.Errorf("%w: ready twice", stream.ErrInvalid)
		}
		r.armed, r.early, r.began, r.mark, r.engine = f.Armed, f.Early, time.Now(), f.Mark, f.Engine
		if f.Note != "" { // it does not use the instance, which is armed
			r.s.filesOnly(f.Note)
			r.s.giveBack()
		}
		close(r.s.ready)
	case stream.Touch:
		token(r.s.touched)
		return r.rec.Touch(f.ID, f.Access)
	case stream.Found:
		return r.rec.Found(f.ID, f.Access)
	case stream.Rename:
		return r.rec.Rename(f.ID, f.Path)
	case stream.Ranges:
		r.rec.Ranges(f.ID, f.Ranges)
	case stream.Process:
		r.rec.Process(f.Process)
	case stream.Pending:
		token(r.s.touched)
	case stream.Drained:
		if f.Why != "" {
			r.s.filesOnly(f.Why)
		}
		r.s.giveBack()
	case stream.Merge:
		r.rec.Merge(f.ID, f.How)
	case stream.Failure:
		r.failure = &f
	case stream.End:
		r.end = &f
	}
	return nil
}

// token leaves a token in a channel that holds one.
func token(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// result puts together what came in. err is what was wrong with the stream, exit how the
// process ended.
func (r *receiver) result(err error, exit string) Result {
	s := r.s
	s.mu.Lock()
	why := s.why
	s.mu.Unlock()
	res := Result{Armed: r.armed, Early: r.early, Mark: r.mark, End: why, Engine: r.engine, Grade: trace.GradeFile}
	switch {
	case r.end != nil && err == nil:
		r.rec.Saw(r.end.Events)
		r.rec.Skip(r.end.Skipped)
		for _, l := range r.end.Losses {
			r.rec.Lose(l)
		}
		res.Duration = r.end.Elapsed
		res.Engine, res.Grade = r.end.Engine, r.end.Grade
		if r.end.Reason == EndExit || why == "" {
			res.End = r.end.Reason
		}
	case r.failure != nil && err == nil:
		res.Err = failed(*r.failure)
	default:
		res.Err = fmt.Errorf("%w (%s)%s: %w", ErrKilled, exit, quoted(s.stderr.String()), err)
	}
	if res.Err != nil {
		res.End = EndKilled
		loss := trace.Loss{Reason: "killed", Count: -1, Detail: oneLine(res.Err.Error())}
		if r.began.IsZero() {
			loss.Reason = "late"
		} else {
			res.Duration = time.Since(r.began)
		}
		r.rec.Lose(loss)
	}
	res.Trace = r.rec.Trace()
	return res
}

// failed is the error for what the server says it failed at.
func failed(f stream.Failure) error {
	switch f.Code {
	case "late":
		return fmt.Errorf("%w: %s", ErrLate, f.Text)
	case "privilege":
		return fmt.Errorf("%w: %s", ErrPrivilege, oneLine(f.Text))
	case "kernel":
		return fmt.Errorf("%w: %s", ErrKernel, f.Text)
	}
	return fmt.Errorf("tracer: %s", f.Text)
}

func quoted(stderr string) string {
	if stderr = strings.TrimSpace(stderr); stderr == "" {
		return ""
	}
	return fmt.Sprintf(", it said %q", stderr)
}

func oneLine(s string) string { return strings.ReplaceAll(s, "\n", "; ") }
