package remote

import (
	"context"
	"errors"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// OpenSource opens the image that ref names for reading. It returns [ErrInvalid] for a
// malformed reference, layout or archive, and [ErrNotFound] for a path that does not exist; a
// registry is not contacted yet.
func OpenSource(ctx context.Context, ref Reference, o Options) (Source, error) {
	return nil, errors.New("not built yet")
}

// OpenTarget opens ref for writing an image. A layout directory is made when it is missing;
// an archive replaces the file, whole, when it is tagged.
func OpenTarget(ctx context.Context, ref Reference, o Options) (Target, error) {
	return nil, errors.New("not built yet")
}

// Layer is one layer of an image.
type Layer struct {
	Descriptor ocispec.Descriptor
	DiffID     digest.Digest
}

// Image is one platform's image, as [Select] found it.
type Image struct {
	Root          ocispec.Descriptor // what the reference resolved to: an index, or the manifest
	Descriptor    ocispec.Descriptor // the manifest; Platform is set
	Manifest      ocispec.Manifest
	ManifestBytes []byte // as stored
	Config        ocispec.Image
	ConfigBytes   []byte // as stored
	Layers        []Layer
}

// Select finds the image for platform ("linux/amd64", "linux/arm/v7"; empty: this machine's).
func Select(ctx context.Context, src Source, platform string) (Image, error) {
	return Image{}, errors.New("not built yet")
}

// Document is a small object held in memory: a config or a manifest.
type Document struct {
	Descriptor ocispec.Descriptor
	Data       []byte
}

// PublishOptions configures [Publish]; the zero value is the default.
type PublishOptions struct {
	Workers  int            // blobs pushed at once; 0: 4
	Progress func(Progress) // called from several goroutines, one at a time
}

// Progress is the state of one blob being pushed.
type Progress struct {
	Descriptor ocispec.Descriptor
	Offset     int64      // bytes read of it so far
	Result     PushResult // 0 until it is in the target
}

// Published sums up what [Publish] did.
type Published struct {
	Descriptor                 ocispec.Descriptor // the manifest
	Uploaded, Existed, Mounted int                // blobs, the config included
	UploadedBytes              int64
}

// Publish pushes blobs, then config, then manifest under the target's name.
func Publish(ctx context.Context, t Target, blobs []Blob, config, manifest Document, o PublishOptions) (Published, error) {
	return Published{}, errors.New("not built yet")
}
