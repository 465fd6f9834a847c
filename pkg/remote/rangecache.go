package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	// readAhead is what a read that nobody announced asks for at least: a request costs as much time.
	readAhead = 256 << 10

	// rangesAtOnce is how many ranges are fetched at a time.
	rangesAtOnce = 4
)

// Range is the half-open range [Offset, Offset+Length) of some content, in bytes.
type Range struct{ Offset, Length int64 }

// RangeCache reads parts of some content of a source and keeps them in a temporary file that
// has no name; content that is a file of this host already is read there. What it reads is not verified. Safe for
// concurrent use, except for Close.
type RangeCache struct {
	ctx   context.Context //nolint:containedctx // io.ReaderAt has none
	src   Source
	desc  ocispec.Descriptor
	f     *os.File
	local bool // f is the content itself

	mu       sync.Mutex // guards what follows
	have     []Range    // sorted, neither overlapping nor touching
	requests int
	fetched  int64
}

// localSource is a source that has content in files of its own.
type localSource interface {
	// file opens the file that is desc's content, of its size; nil where there is none: then FetchRange tells why.
	file(desc ocispec.Descriptor) *os.File
}

// NewRangeCache returns a cache of desc's content, with its file in dir, which may be empty
// for os.TempDir. It asks for nothing yet. Its reads end with ctx. The caller closes it.
func NewRangeCache(ctx context.Context, src Source, desc ocispec.Descriptor, dir string) (*RangeCache, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	if l, ok := src.(localSource); ok {
		if f := l.file(desc); f != nil {
			return &RangeCache{ctx: ctx, src: src, desc: desc, f: f, local: true}, nil
		}
	}
	f, err := os.CreateTemp(dir, "headstart-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &RangeCache{ctx: ctx, src: src, desc: desc, f: f}, nil
}

// Close gives the file back.
func (c *RangeCache) Close() error { return c.f.Close() }

// Size returns the bytes that the descriptor says.
func (c *RangeCache) Size() int64 { return c.desc.Size }

// Traffic returns how many ranges were asked for and how many bytes came.
func (c *RangeCache) Traffic() (requests int, fetched int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.requests, c.fetched
}

// Fetch gets what is missing of ranges, each missing piece with one request and several at
// once. [ErrRange] when one lies outside of the content.
func (c *RangeCache) Fetch(ctx context.Context, ranges []Range) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(rangesAtOnce)
	for _, r := range ranges {
		if err := checkRange(c.desc, r.Offset, r.Length); err != nil {
			return errors.Join(err, g.Wait())
		}
		for _, piece := range c.missing(r) {
			g.Go(func() error { return c.get(ctx, piece) })
		}
	}
	return g.Wait()
}

func (c *RangeCache) get(ctx context.Context, r Range) error {
	if !c.local {
		if err := c.load(ctx, r); err != nil {
			return fmt.Errorf("%d bytes of %s from %d: %w", r.Length, c.desc.Digest, r.Offset, err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests++
	c.fetched += r.Length
	c.have = withRange(c.have, r)
	return nil
}

// load writes a range into the temporary file.
func (c *RangeCache) load(ctx context.Context, r Range) error {
	rc, err := c.src.FetchRange(ctx, c.desc, r.Offset, r.Length)
	if err != nil {
		return err
	}
	n, err := io.Copy(io.NewOffsetWriter(c.f, r.Offset), rc)
	if err == nil && n != r.Length {
		err = io.ErrUnexpectedEOF
	}
	return errors.Join(err, rc.Close())
}

// ReadAt implements io.ReaderAt. What was not fetched is fetched, with some bytes behind it.
// Beyond the content's end it returns io.EOF.
func (c *RangeCache) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%w: offset %d", ErrRange, off)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off >= c.desc.Size {
		return 0, io.EOF
	}
	n := min(int64(len(p)), c.desc.Size-off)
	if len(c.missing(Range{off, n})) > 0 {
		want := min(max(n, readAhead), c.desc.Size-off)
		if err := c.Fetch(c.ctx, []Range{{off, want}}); err != nil {
			return 0, err
		}
	}
	got, err := c.f.ReadAt(p[:n], off)
	if err == nil && n < int64(len(p)) {
		err = io.EOF
	}
	return got, err
}

// missing returns the parts of r that are not there.
func (c *RangeCache) missing(r Range) []Range {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Range
	at, end := r.Offset, r.Offset+r.Length
	for _, h := range c.have {
		switch {
		case h.Offset+h.Length <= at:
			continue
		case h.Offset >= end:
		case h.Offset > at:
			out = append(out, Range{at, h.Offset - at})
			at = h.Offset + h.Length
			continue
		default:
			at = h.Offset + h.Length
			continue
		}
		break
	}
	if at < end {
		out = append(out, Range{at, end - at})
	}
	return out
}

// withRange returns have with r, merged with what it overlaps or touches.
func withRange(have []Range, r Range) []Range {
	from, _ := slices.BinarySearchFunc(have, r.Offset, func(h Range, off int64) int {
		if h.Offset+h.Length < off {
			return -1
		}
		return 1
	})
	to := from
	for to < len(have) && have[to].Offset <= r.Offset+r.Length {
		end := max(r.Offset+r.Length, have[to].Offset+have[to].Length)
		r.Offset = min(r.Offset, have[to].Offset)
		r.Length = end - r.Offset
		to++
	}
	return slices.Replace(have, from, to, r)
}
