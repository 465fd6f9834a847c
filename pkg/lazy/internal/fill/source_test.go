package fill_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
)

var errDown = errors.New("the source is down")

// source is a blob in memory. Faults are set by tests.
type source struct {
	data, meta []byte
	quit       chan struct{}

	mu       sync.Mutex
	requests []fill.Request
	// fault may replace the answer to the n-th request, counted from 1; nil stands for the right one.
	fault func(n int, r fill.Request, right []byte) (io.Reader, error)
}

func (s *source) set(fault func(n int, r fill.Request, right []byte) (io.Reader, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = fault
}

func (s *source) seen() []fill.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]fill.Request(nil), s.requests...)
}

// asked returns how many bytes were asked for.
func (s *source) asked() (total int64) {
	for _, r := range s.seen() {
		total += r.Length
	}
	return total
}

// Range implements fill.Source.
func (s *source) Range(ctx context.Context, r fill.Request) (io.ReadCloser, error) {
	s.mu.Lock()
	s.requests = append(s.requests, r)
	n, fault := len(s.requests), s.fault
	s.mu.Unlock()
	p := s.data
	if r.Meta && s.meta != nil {
		p = s.meta
	}
	if r.Offset < 0 || r.Length < 0 || r.Offset+r.Length > int64(len(p)) {
		return nil, errors.New("a range outside of the file")
	}
	p = p[r.Offset:][:r.Length]
	if fault != nil {
		body, err := fault(n, r, p)
		if err != nil {
			return nil, err
		}
		if body != nil {
			return &body2{Reader: body, ctx: ctx}, nil
		}
	}
	return &body2{Reader: bytes.NewReader(p), ctx: ctx}, nil
}

// Retry implements fill.Source.
func (s *source) Retry(err error) fill.Retry {
	return fill.Retry{Again: errors.Is(err, errDown) || errors.Is(err, io.ErrUnexpectedEOF)}
}

// body2 ends with its context, as the body of a response does.
type body2 struct {
	io.Reader
	ctx context.Context
}

func (b *body2) Read(p []byte) (int, error) {
	if b.ctx.Err() != nil {
		return 0, context.Cause(b.ctx)
	}
	return b.Reader.Read(p)
}

func (b *body2) Close() error { return nil }

// gate is a reader that waits until it is opened; ctx ends it.
type gate struct {
	io.Reader
	open <-chan struct{}
}

func (g *gate) Read(p []byte) (int, error) {
	<-g.open
	return g.Reader.Read(p)
}
