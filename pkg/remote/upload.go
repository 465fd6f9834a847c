package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"go.uber.org/zap"
)

// upload sends one blob to a registry and picks up where it stopped when a request fails.
// Source: distribution-spec, "Pushing blobs".
type upload struct {
	t  registryTarget
	h  docker.RegistryHost
	b  Blob
	at *url.URL // where the next request goes; nil: no session
	// off is how much the registry has of the blob.
	off int64
}

// errSession means that the registry knows the upload no more.
var errSession = errors.New("upload session lost")

// progress is how much an upload must have got ahead for its attempts to be counted anew: a
// connection that breaks every few megabytes is slow, not down.
const progress = 1 << 20

// run uploads the blob, or has it mounted.
func (u *upload) run(ctx context.Context) (PushResult, error) {
	stalls, reached := 0, int64(0)
	for attempt, first := 0, true; ; attempt, first = attempt+1, false {
		result, err := u.try(ctx, first)
		if err == nil {
			return result, nil
		}
		if errors.Is(err, ErrStalled) {
			stalls++
		}
		if ctx.Err() != nil || attempt >= u.t.o.Retries || stalls > 1 || !resumable(err) {
			u.abandon(ctx)
			return 0, err
		}
		u.t.o.Log.Debug("resume upload", zap.Stringer("digest", u.b.Descriptor.Digest), zap.Int("attempt", attempt+1), zap.Error(err))
		wait := u.t.o.backoff(attempt)
		if answer, ok := errors.AsType[*RegistryError](err); ok {
			if answer.RetryAfter > u.t.o.Timeouts.RetryAfter {
				u.abandon(ctx)
				return 0, err
			}
			wait = max(wait, answer.RetryAfter)
		}
		if err := sleep(ctx, wait); err != nil {
			return 0, err
		}
		u.find(ctx)
		if u.off >= reached+progress {
			attempt, reached = -1, u.off
		}
	}
}

// resumable reports whether an upload that failed with err may be continued.
func resumable(err error) bool {
	if errors.Is(err, ErrDigest) || errors.Is(err, errSource) {
		return false
	}
	return errors.Is(err, ErrUnavailable) || errors.Is(err, ErrStalled) || errors.Is(err, errSession)
}

// try does what is left of the upload.
func (u *upload) try(ctx context.Context, mount bool) (PushResult, error) {
	if u.at == nil {
		done, err := u.begin(ctx, mount)
		if err != nil || done {
			return Mounted, err
		}
	}
	chunk := u.t.o.UploadChunk
	if u.off == 0 && (chunk <= 0 || u.b.Descriptor.Size <= chunk) {
		return Uploaded, u.finish(ctx, u.b.Descriptor.Size) // one request
	}
	for u.off < u.b.Descriptor.Size {
		n := u.b.Descriptor.Size - u.off
		if chunk > 0 {
			n = min(n, chunk)
		}
		if err := u.patch(ctx, n); err != nil {
			return 0, err
		}
	}
	return Uploaded, u.finish(ctx, 0)
}

// begin starts a session; done says that the registry took the blob from MountFrom.
func (u *upload) begin(ctx context.Context, mount bool) (done bool, err error) {
	c := call{want: "start the upload of " + u.b.Descriptor.Digest.String(), method: http.MethodPost, path: "blobs/uploads/", push: true}
	if mount && u.b.MountFrom != "" {
		m := c
		m.from, m.query = u.b.MountFrom, url.Values{"mount": {u.b.Descriptor.Digest.String()}, "from": {u.b.MountFrom}}
		resp, err := u.t.do(ctx, u.h, m)
		switch {
		case err == nil && resp.StatusCode == http.StatusCreated:
			drain(resp.Body)
			return true, nil
		case err == nil && resp.StatusCode == http.StatusAccepted: // not there: a session instead
			return false, u.moved(m, resp)
		case err == nil:
			err = u.t.answer(u.h, m, resp)
		}
		if ctx.Err() != nil {
			return false, err
		}
		u.t.o.Log.Debug("blob not mounted", zap.String("from", u.b.MountFrom), zap.Error(err))
	}
	resp, err := u.t.do(ctx, u.h, c)
	if err != nil {
		return false, err
	}
	if resp.StatusCode != http.StatusAccepted {
		return false, u.t.answer(u.h, c, resp)
	}
	return false, u.moved(c, resp)
}

// moved takes the next location from an answer.
func (u *upload) moved(c call, resp *http.Response) error {
	drain(resp.Body)
	at, err := location(resp)
	if err != nil {
		return u.t.fail(u.h, c, err)
	}
	u.at = at
	return nil
}

// patch sends the n bytes after u.off.
func (u *upload) patch(ctx context.Context, n int64) error {
	c := u.call(ctx, http.MethodPatch, n)
	c.header.Set("Content-Range", fmt.Sprintf("%d-%d", u.off, u.off+n-1))
	resp, err := u.t.do(ctx, u.h, c)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusAccepted && resp.StatusCode != http.StatusNoContent && resp.StatusCode != http.StatusCreated {
		return u.refused(c, resp)
	}
	u.off += n
	return u.moved(c, resp)
}

// finish sends n bytes, all of them or none, and has the registry verify the blob.
func (u *upload) finish(ctx context.Context, n int64) error {
	c := u.call(ctx, http.MethodPut, n)
	at := *u.at
	q := at.Query()
	q.Set("digest", u.b.Descriptor.Digest.String())
	at.RawQuery = q.Encode()
	c.url = &at
	resp, err := u.t.do(ctx, u.h, c)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNoContent {
		return u.refused(c, resp)
	}
	drain(resp.Body)
	return nil
}

// call is a request that carries the n bytes after u.off.
func (u *upload) call(ctx context.Context, method string, n int64) call {
	off := u.off
	return call{
		want: "push blob " + u.b.Descriptor.Digest.String(), method: method, url: u.at, push: true, once: true,
		header: http.Header{"Content-Type": {"application/octet-stream"}},
		body:   func() (io.ReadCloser, error) { return u.open(ctx, off, n) },
		size:   n,
	}
}

// refused makes an error of an answer; a session that is gone may be replaced.
func (u *upload) refused(c call, resp *http.Response) error {
	err := u.t.answer(u.h, c, resp)
	if err.Status == http.StatusNotFound || err.Status == http.StatusRequestedRangeNotSatisfiable {
		return fmt.Errorf("%w: %w", errSession, err)
	}
	return err
}

// find asks how much of the blob the registry has; without an answer the upload begins anew.
func (u *upload) find(ctx context.Context) {
	at := u.at
	u.at, u.off = nil, 0
	if at == nil {
		return
	}
	c := call{want: "ask for the state of an upload", method: http.MethodGet, url: at, push: true, once: true}
	resp, err := u.t.do(ctx, u.h, c)
	if err != nil {
		return
	}
	if resp.StatusCode != http.StatusNoContent && resp.StatusCode != http.StatusOK {
		drain(resp.Body)
		return
	}
	// "0-0" is said of an empty upload too (distribution): one byte less is not worth a guess.
	if first, last, ok := strings.Cut(strings.TrimPrefix(resp.Header.Get("Range"), "bytes="), "-"); ok && first == "0" {
		if n, err := strconv.ParseInt(last, 10, 64); err == nil && n > 0 && n < u.b.Descriptor.Size {
			if u.moved(c, resp) == nil {
				u.off = n + 1
			}
			return
		}
	}
	drain(resp.Body)
}

// abandon tells the registry to forget the upload; it does so itself after a while.
func (u *upload) abandon(ctx context.Context) {
	if u.at == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), u.t.o.Timeouts.Connect)
	defer cancel()
	resp, err := u.t.do(ctx, u.h, call{want: "cancel an upload", method: http.MethodDelete, url: u.at, push: true, once: true})
	if err == nil {
		drain(resp.Body)
	}
}

// errSource means that the bytes to send could not be had: no fault of the registry.
var errSource = errors.New("read what is to be pushed")

// open returns the n bytes of the blob after off, hashed from the start: at the blob's end
// they are known to be right before the last of them is sent.
func (u *upload) open(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	rc, err := u.b.Open(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", errSource, u.b.Descriptor.Digest, err)
	}
	v := verify(rc, u.b.Descriptor, "")
	if _, err := io.CopyN(io.Discard, v, off); err != nil {
		_ = v.Close() // only read
		return nil, fmt.Errorf("%w: %s: %w", errSource, u.b.Descriptor.Digest, err)
	}
	return &sourced{exactly{rc: v, left: n}}, nil
}

// sourced marks read errors as the source's.
type sourced struct{ exactly }

func (s *sourced) Read(p []byte) (int, error) {
	n, err := s.exactly.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: %w", errSource, err)
	}
	return n, err
}
