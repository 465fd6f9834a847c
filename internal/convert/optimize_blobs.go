package convert

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// sourceBlobs reads the blobs of an optimization's source by ranges.
type sourceBlobs struct {
	run    *optimizeRun
	caches map[string]*remote.RangeCache // by the id of the file
}

// open gives the reader of a blob; its file and, where that is another one, the file of its table.
func (s *sourceBlobs) open(ctx context.Context, b rafs.Blob) (*rafs.BlobReader, error) {
	return rafs.OpenBlobFrom(func(f rafs.Blob) (io.ReaderAt, error) {
		if c, ok := s.caches[f.ID]; ok { // blobs may share the file of their tables
			return c, nil
		}
		d, err := s.layer(f)
		if err != nil {
			return nil, err
		}
		c, err := remote.NewRangeCache(ctx, s.run.src, d, s.run.o.Build.TempDir)
		if err != nil {
			return nil, err
		}
		s.caches[f.ID] = c
		return c, nil
	}, b)
}

// layer returns the descriptor of a file: that of the image's layer, or of a layer that its
// bootstrap refers to in the same repository (OCI-ref).
func (s *sourceBlobs) layer(f rafs.Blob) (ocispec.Descriptor, error) {
	for _, l := range s.run.img.Layers {
		if l.Descriptor.Digest.Encoded() == f.ID {
			return l.Descriptor, nil
		}
	}
	d := ocispec.Descriptor{Digest: digest.NewDigestFromEncoded(digest.SHA256, f.ID), Size: clampSize(f.CompressedSize)}
	if _, separate := f.MetaBlob(); !separate {
		return ocispec.Descriptor{}, fmt.Errorf("%w: no layer of the image has digest %s", remote.ErrNotFound, d.Digest)
	}
	return d, d.Digest.Validate()
}

// fetch gets ranges of a blob's file.
func (s *sourceBlobs) fetch(ctx context.Context, b rafs.Blob, ranges []builder.StoredRange) error {
	list := make([]remote.Range, len(ranges))
	for i, r := range ranges {
		list[i] = remote.Range(r)
	}
	return s.caches[b.ID].Fetch(ctx, list)
}

// Close counts what was read and gives the files back.
func (s *sourceBlobs) Close() error {
	var errs []error
	for _, c := range s.caches {
		requests, fetched := c.Traffic()
		s.run.sum.Requests += requests
		s.run.sum.FetchedBytes += fetched
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
