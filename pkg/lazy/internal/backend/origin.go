package backend

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// ErrInvalid is returned for an origin that is none.
var ErrInvalid = errors.New("invalid origin")

// Origin says where the blobs of an image are. It is kept, as JSON, by what outlives a process.
type Origin struct {
	// Reference names the image as [remote.Parse] reads it; files are absolute. Empty: loose files.
	Reference string `json:"reference,omitempty"`
	// Digest is the manifest's; empty for loose files.
	Digest digest.Digest `json:"digest,omitempty"`
	// BlobDir holds the blobs of loose files, each named by its id; absolute.
	BlobDir string `json:"blob_dir,omitempty"`
	// Blobs are those of the bootstrap, in the order of its table.
	Blobs []BlobOrigin `json:"blobs"`
	// Prefetch is the index of the prefetch blob; -1: there is none.
	Prefetch int `json:"prefetch"`
}

// BlobOrigin is a blob: the file that has its data, and the one that has its table, if that is another one.
type BlobOrigin struct {
	Data File  `json:"data"`
	Meta *File `json:"meta,omitempty"`
}

// File is a file of an image: a layer, or a file of that name.
type File struct {
	ID   string `json:"id"`   // sha256, 64 hex digits; of loose files any name
	Size int64  `json:"size"` // bytes; 0: not known, which is an error for all but loose files
}

// plainID matches what a blob id may be to be a file name.
var plainID = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[0-9A-Za-z]{1,64}$`) })

// originOf finds the blobs of img.
func originOf(img *nydusimage.Image) (Origin, error) {
	o := Origin{Prefetch: -1}
	if n, ok := img.PrefetchBlob(); ok {
		o.Prefetch = n
	}
	sizes := map[string]int64{}
	if img.Document != nil {
		for _, l := range img.Document.Blobs() {
			sizes[l.Digest.Encoded()] = l.Size
		}
	}
	for i := range img.RAFS.Blobs {
		b := &img.RAFS.Blobs[i]
		meta, separate := b.MetaBlob()
		entry := BlobOrigin{Data: File{ID: b.ID, Size: sizes[b.ID]}}
		if separate {
			entry.Meta = &File{ID: meta.ID, Size: sizes[meta.ID]}
			if entry.Meta.Size == 0 {
				entry.Meta.Size = clamp(meta.CompressedSize)
			}
			if entry.Data.Size == 0 { // a layer of another image in the same repository
				entry.Data.Size = clamp(b.CompressedSize)
			}
		}
		o.Blobs = append(o.Blobs, entry)
	}
	return o, o.check(img.Document == nil)
}

// check refuses what cannot be read. loose: files need no size.
func (o *Origin) check(loose bool) error {
	if o.Prefetch < -1 || o.Prefetch >= len(o.Blobs) || len(o.Blobs) > rafs.MaxBlobs {
		return fmt.Errorf("%w: prefetch blob %d of %d", ErrInvalid, o.Prefetch, len(o.Blobs))
	}
	if o.BlobDir != "" && !filepath.IsAbs(o.BlobDir) {
		return fmt.Errorf("%w: blob directory %s is not absolute", ErrInvalid, o.BlobDir)
	}
	for i, b := range o.Blobs {
		for _, f := range []*File{&b.Data, b.Meta} {
			switch {
			case f == nil:
			case !plainID().MatchString(f.ID):
				return fmt.Errorf("%w: blob %d: id %q, want at most 64 letters and digits", ErrInvalid, i, f.ID)
			case !loose && f.descriptor().Digest.Validate() != nil:
				return fmt.Errorf("%w: blob %d: id %q is no sha256", ErrInvalid, i, f.ID)
			case !loose && (f.Size <= 0 || f.Size > remote.MaxBlobSize):
				return fmt.Errorf("%w: blob %d (%s): size %d: the manifest does not list it", ErrInvalid, i, f.ID, f.Size)
			}
		}
	}
	return nil
}

// descriptor is the file as a layer.
func (f *File) descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: nydusimage.MediaTypeBlob, Digest: digest.NewDigestFromEncoded(digest.SHA256, f.ID), Size: f.Size}
}

func clamp(n uint64) int64 { return int64(min(n, 1<<62)) }
