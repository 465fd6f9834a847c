package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// Document is a small object held in memory: a config, a manifest or an index.
type Document struct {
	Descriptor ocispec.Descriptor
	Data       []byte
}

// NewDocument returns data with its descriptor: digest sha256.
func NewDocument(mediaType string, data []byte) Document {
	return Document{
		Descriptor: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))},
		Data:       data,
	}
}

// Blob returns the document as content to push.
func (d Document) Blob() Blob {
	return Blob{Descriptor: d.Descriptor, Verify: true, Open: func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(d.Data)), nil
	}}
}

// PublishOptions configures [Publish]; the zero value is the default.
type PublishOptions struct {
	Workers  int            // blobs pushed at once; 0: 4. An archive takes one at a time
	Progress func(Progress) // called from several goroutines, but never at once; must not block
}

// Progress is the state of one blob being pushed.
type Progress struct {
	Descriptor ocispec.Descriptor
	Offset     int64      // bytes read of it so far; it may go back when an upload is repeated
	Result     PushResult // 0 until it is in the target
}

// Published sums up what [Publish] did.
type Published struct {
	Descriptor    ocispec.Descriptor // the manifest
	Uploaded      int                // blobs written, the config included
	Existed       int                // blobs that were there
	Mounted       int                // blobs taken from another repository
	UploadedBytes int64
}

// Publish pushes blobs, then config, then manifest under the target's name: whoever sees the
// name sees a whole image. Every descriptor that the manifest has must be the config's or one
// of blobs'; blobs may have more. Equal blobs are pushed once. When something fails nothing
// is tagged and the first error is returned; blobs that were pushed may remain.
func Publish(ctx context.Context, t Target, blobs []Blob, config, manifest Document, o PublishOptions) (Published, error) {
	return publish(ctx, t, blobs, config, manifest, o, func() error {
		return t.Tag(ctx, manifest.Descriptor, manifest.Data)
	})
}

// PublishUnnamed is [Publish] of an image that gets no name of its own: its manifest is pushed
// by its digest, for an index to refer to. Until [Target].Tag has named that index, whoever
// collects garbage at the target may remove it again.
func PublishUnnamed(ctx context.Context, t Target, blobs []Blob, config, manifest Document, o PublishOptions) (Published, error) {
	return publish(ctx, t, blobs, config, manifest, o, func() error {
		_, err := t.Push(ctx, manifest.Blob())
		return err
	})
}

// publish pushes everything but the manifest, which last does.
func publish(ctx context.Context, t Target, blobs []Blob, config, manifest Document, o PublishOptions, last func() error) (Published, error) {
	if err := checkComplete(blobs, config, manifest); err != nil {
		return Published{}, fmt.Errorf("publish %s: %w", short(manifest.Descriptor.Digest), err)
	}
	p := publisher{t: t, o: o}
	workers := o.Workers
	if workers <= 0 {
		workers = 4
	}
	if _, ok := t.(*archiveTarget); ok {
		workers = 1 // in order: equal images are equal bytes
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	seen := make(map[digest.Digest]bool)
	for _, b := range blobs {
		if seen[b.Descriptor.Digest] {
			continue
		}
		seen[b.Descriptor.Digest] = true
		g.Go(func() error {
			if err := gctx.Err(); err != nil {
				return err
			}
			return p.push(gctx, b)
		})
	}
	if err := g.Wait(); err != nil {
		return Published{}, err
	}
	if err := p.push(ctx, config.Blob()); err != nil {
		return Published{}, err
	}
	if err := last(); err != nil {
		return Published{}, err
	}
	p.sum.Descriptor = manifest.Descriptor
	return p.sum, nil
}

// checkComplete refuses a manifest that refers to what is not pushed with it.
func checkComplete(blobs []Blob, config, manifest Document) error {
	if err := checkDocument(Reference{}, manifest.Descriptor, manifest.Data); err != nil {
		return err
	}
	if int64(len(config.Data)) != config.Descriptor.Size || config.Descriptor.Digest.Validate() != nil ||
		config.Descriptor.Digest.Algorithm().FromBytes(config.Data) != config.Descriptor.Digest {
		return fmt.Errorf("%w: config of %d bytes is not %s of %d", ErrDigest, len(config.Data), short(config.Descriptor.Digest), config.Descriptor.Size)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(manifest.Data, &m); err != nil {
		return fmt.Errorf("%w: manifest: %w", ErrInvalid, err)
	}
	sizes := map[digest.Digest]int64{config.Descriptor.Digest: config.Descriptor.Size}
	for _, b := range blobs {
		if err := checkDescriptor(b.Descriptor); err != nil {
			return err
		}
		if b.Open == nil {
			return fmt.Errorf("%w: blob %s cannot be opened", ErrInvalid, b.Descriptor.Digest)
		}
		sizes[b.Descriptor.Digest] = b.Descriptor.Size
	}
	var errs []error
	for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		size, ok := sizes[d.Digest]
		switch {
		case !ok && images.IsNonDistributable(d.MediaType): // clients fetch it from its URLs
		case !ok:
			errs = append(errs, fmt.Errorf("%w: the manifest refers to %s, which is not pushed", ErrInvalid, short(d.Digest)))
		case size != d.Size:
			errs = append(errs, fmt.Errorf("%w: the manifest says %d bytes for %s, which has %d", ErrInvalid, d.Size, d.Digest, size))
		}
	}
	return errors.Join(errs...)
}

type publisher struct {
	t Target
	o PublishOptions

	mu  sync.Mutex // guards sum and calls of o.Progress
	sum Published
}

func (p *publisher) push(ctx context.Context, b Blob) error {
	open := b.Open
	b.Open = func(ctx context.Context) (io.ReadCloser, error) {
		rc, err := open(ctx)
		if err != nil || p.o.Progress == nil {
			return rc, err
		}
		return &counted{ReadCloser: rc, tell: func(off int64) { p.tell(Progress{Descriptor: b.Descriptor, Offset: off}) }}, nil
	}
	result, err := p.t.Push(ctx, b)
	if err != nil {
		return err
	}
	p.mu.Lock()
	switch result {
	case Uploaded:
		p.sum.Uploaded++
		p.sum.UploadedBytes += b.Descriptor.Size
	case Mounted:
		p.sum.Mounted++
	default:
		p.sum.Existed++
	}
	p.mu.Unlock()
	p.tell(Progress{Descriptor: b.Descriptor, Offset: b.Descriptor.Size, Result: result})
	return nil
}

func (p *publisher) tell(v Progress) {
	if p.o.Progress == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.o.Progress(v)
}

// counted tells how much was read.
type counted struct {
	io.ReadCloser
	off  int64
	tell func(off int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	if n > 0 {
		c.off += int64(n)
		c.tell(c.off)
	}
	return n, err
}
