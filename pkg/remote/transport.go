package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"go.uber.org/zap"
)

// dialer returns a DialContext that gives up after timeout.
func dialer(timeout time.Duration) func(context.Context, string, string) (net.Conn, error) {
	return (&net.Dialer{Timeout: timeout, KeepAlive: 30 * time.Second}).DialContext
}

// retriesKey is the context key of how often the transport may repeat a request (an int).
type retriesKey struct{}

// withRetries returns ctx in which the transport repeats a request at most n times.
func withRetries(ctx context.Context, n int) context.Context {
	return context.WithValue(ctx, retriesKey{}, n)
}

// transport repeats requests that may succeed later and ends those that stall. It is below
// redirects and authorization: each hop and each token request is one request to it.
// It is safe for concurrent use.
type transport struct {
	base  http.RoundTripper
	o     settings
	clear *atomic.Bool // some endpoint of the registry is plain http by configuration
}

// RoundTrip implements http.RoundTripper. A request whose body cannot be made again
// (GetBody is nil) is sent once.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme == "http" && !t.clear.Load() && !docker.IsLocalhost(req.URL.Host) {
		closeBody(req)
		return nil, fmt.Errorf("%w: an https registry sent us to http://%s: refused", ErrInvalid, req.URL.Host)
	}
	retries := t.o.Retries
	if n, ok := req.Context().Value(retriesKey{}).(int); ok {
		retries = min(retries, n)
	}
	if req.Body != nil && req.Body != http.NoBody && req.GetBody == nil {
		retries = 0
	}
	stalls := 0
	for attempt := 0; ; attempt++ {
		resp, err := t.once(req)
		if errors.Is(err, ErrStalled) {
			stalls++
		}
		if attempt >= retries || stalls > 1 || !retryable(req.Context(), resp, err) {
			return resp, err
		}
		wait := t.o.backoff(attempt)
		if resp != nil {
			if after, ok := retryAfter(resp.Header); ok {
				if after > t.o.Timeouts.RetryAfter {
					return resp, nil // the caller reports how long the registry wants us to wait
				}
				wait = max(wait, after)
			}
			drain(resp.Body)
		}
		t.o.Log.Debug("repeat registry request", zap.String("method", req.Method), zap.String("url", req.URL.Redacted()),
			zap.Int("attempt", attempt+1), zap.Duration("wait", wait), zap.Error(err), zap.Int("status", status(resp)))
		if err := sleep(req.Context(), wait); err != nil {
			return nil, err
		}
		if req, err = again(req); err != nil {
			return nil, err
		}
	}
}

func status(resp *http.Response) int {
	if resp == nil {
		return 0
	}
	return resp.StatusCode
}

// again returns a request equal to req with a fresh body.
func again(req *http.Request) (*http.Request, error) {
	next := req.Clone(req.Context())
	if req.GetBody != nil {
		body, err := req.GetBody()
		if err != nil {
			return nil, err
		}
		next.Body = body
	}
	return next, nil
}

// drain reads a little of an error response, so that its connection is used again.
func drain(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, 16<<10)
	_ = body.Close() // only read; nothing depends on it
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		_ = req.Body.Close() // the round tripper's duty; the request failed anyhow
	}
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// backoff returns how long to wait after the attempt, counted from 0: doubled each time,
// within 10 %, at most 20 times the first.
func (o settings) backoff(attempt int) time.Duration {
	d := min(o.Timeouts.Backoff<<min(attempt, 10), 20*o.Timeouts.Backoff)
	return d - d/10 + rand.N(d/5+1)
}

// retryAfter reads a Retry-After header, in seconds or as a date.
func retryAfter(h http.Header) (time.Duration, bool) {
	v := h.Get("Retry-After")
	if v == "" {
		return 0, false
	}
	if n, err := strconv.ParseUint(v, 10, 31); err == nil {
		return time.Duration(n) * time.Second, true
	}
	if at, err := http.ParseTime(v); err == nil {
		return max(0, time.Until(at)), true
	}
	return 0, false
}

// retryable reports whether the same request may succeed a little later. A connection that
// cannot be made is not repeated: the next endpoint or the user knows better.
func retryable(ctx context.Context, resp *http.Response, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" {
			return false
		}
		return errors.Is(err, ErrStalled) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
			errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	}
	return retryableStatus(resp.StatusCode)
}

func retryableStatus(code int) bool {
	switch code {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// once sends req and watches it: connecting and waiting for the header, then each read of
// the response's body.
func (t *transport) once(req *http.Request) (*http.Response, error) {
	parent := req.Context()
	ctx, cancel := context.WithCancelCause(parent)
	w := &watch{cancel: cancel, host: req.URL.Host}
	answer := t.o.Timeouts.Header
	if req.Method == http.MethodPut || req.Method == http.MethodPatch {
		answer = t.o.Timeouts.Commit
	}
	out := req.WithContext(ctx)
	w.arm("no response", t.o.Timeouts.Connect+answer)
	if req.Body != nil && req.Body != http.NoBody {
		out.Body = &sentBody{ReadCloser: req.Body, w: w, left: req.ContentLength, stall: t.o.Timeouts.Stall, answer: answer}
	}
	resp, err := t.base.RoundTrip(out)
	w.answered.Store(true)
	w.disarm()
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && parent.Err() == nil {
			err = cause
		}
		cancel(nil)
		return nil, err
	}
	resp.Body = &receivedBody{ReadCloser: resp.Body, ctx: func() error { return context.Cause(ctx) }, w: w, stall: t.o.Timeouts.Stall}
	return resp, nil
}

// watch ends a request when nothing happens for a while. The timer runs only while the
// network is waited for, never while we are. It is safe for concurrent use: a body may still
// be read while its response is.
type watch struct {
	answered atomic.Bool // the response's header is there; what is sent counts no more
	cancel   context.CancelCauseFunc
	host     string

	mu       sync.Mutex // guards what follows
	timer    *time.Timer
	deadline time.Time // zero: disarmed
	what     string
	wait     time.Duration
}

func (w *watch) arm(what string, d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.what, w.wait, w.deadline = what, d, time.Now().Add(d)
	if w.timer == nil {
		w.timer = time.AfterFunc(d, w.fire)
	} else {
		w.timer.Reset(d)
	}
}

func (w *watch) disarm() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deadline = time.Time{}
	if w.timer != nil {
		w.timer.Stop()
	}
}

// fire may come late, after disarm or another arm.
func (w *watch) fire() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.deadline.IsZero() && !time.Now().Before(w.deadline) {
		w.cancel(fmt.Errorf("%w: %s: %s for %s", ErrStalled, w.host, w.what, w.wait))
	}
}

// sentBody is a request's body on its way out. Between two reads the network has its turn.
type sentBody struct {
	io.ReadCloser
	w             *watch
	left          int64
	stall, answer time.Duration
}

func (b *sentBody) Read(p []byte) (int, error) {
	if b.w.answered.Load() {
		return b.ReadCloser.Read(p)
	}
	b.w.disarm()
	n, err := b.ReadCloser.Read(p)
	b.left -= int64(n)
	switch {
	case b.w.answered.Load():
	case err != nil || b.left == 0:
		b.w.arm("no response to what was sent", b.answer)
	default:
		b.w.arm("no byte taken", b.stall)
	}
	return n, err
}

// receivedBody is a response's body; a read that gets nothing for too long ends with
// [ErrStalled].
type receivedBody struct {
	io.ReadCloser
	ctx   func() error // why the request's context ended
	w     *watch
	stall time.Duration
}

func (b *receivedBody) Read(p []byte) (int, error) {
	b.w.arm("no byte received", b.stall)
	n, err := b.ReadCloser.Read(p)
	b.w.disarm()
	if err != nil && !errors.Is(err, io.EOF) {
		if cause := b.ctx(); cause != nil {
			err = cause
		}
	}
	return n, err
}

func (b *receivedBody) Close() error {
	b.w.disarm()
	err := b.ReadCloser.Close()
	b.w.cancel(nil)
	return err
}
