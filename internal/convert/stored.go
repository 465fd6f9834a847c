package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// helpers are what a conversion may take blobs from instead of making them.
type helpers struct {
	dict  *nydusimage.Image // nil: none
	of    *builder.Dict
	notes []string // of the dictionary, for a person
	cache *cache   // nil: none
	// stored has how to bring each blob that lies elsewhere to the target.
	stored map[digest.Digest]remote.Blob
}

// openHelpers opens the chunk dictionary and reads the build cache.
func openHelpers(ctx context.Context, o Options, source, target remote.Reference) (_ *helpers, err error) {
	h := &helpers{stored: map[digest.Digest]remote.Blob{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	if o.ChunkDict == DictAuto {
		if err := h.openTarget(ctx, o, target); err != nil {
			return nil, err
		}
	} else if o.ChunkDict != "" {
		if err := h.openDict(ctx, o, target); err != nil {
			return nil, fmt.Errorf("chunk dictionary: %w", err)
		}
	}
	if o.BuildCache != "" {
		if h.cache, err = openCache(ctx, o, source, target); err != nil {
			return nil, fmt.Errorf("build cache: %w", err)
		}
	}
	return h, nil
}

// Close closes what was opened.
func (h *helpers) Close() error {
	var errs []error
	if h.dict != nil {
		errs = append(errs, h.dict.Close())
	}
	if h.cache != nil {
		errs = append(errs, h.cache.Close())
	}
	return errors.Join(errs...)
}

// dictReference takes nydusify's way to write a dictionary, "bootstrap:registry:REF", too.
func dictReference(s string) string {
	if rest, ok := strings.CutPrefix(s, "bootstrap:"); ok {
		return strings.TrimPrefix(rest, "registry:")
	}
	return s
}

// DictAuto is the value of [Options].ChunkDict that names the image at the target.
const DictAuto = "auto"

// maxSeedBlobs bounds how many blobs the image at the target may have to be referred to: each rebuild adds its own, and the
// format counts 254 in all.
const maxSeedBlobs = 128

// openTarget makes the image that the target names the dictionary, if it can be one. What is there is about to be replaced, so nothing
// that is wrong with it is an error, but that the target cannot be reached.
func (h *helpers) openTarget(ctx context.Context, o Options, target remote.Reference) error {
	o.ChunkDict = target.String()
	err := h.openDict(ctx, o, target)
	switch {
	case errors.Is(err, remote.ErrNotFound), errors.Is(err, fs.ErrNotExist), errors.Is(err, remote.ErrPlatform):
		h.dropDict()
		return nil // the first one
	case ctx.Err() != nil, errors.Is(err, remote.ErrUnauthorized), errors.Is(err, remote.ErrUnavailable), errors.Is(err, remote.ErrStalled):
		return fmt.Errorf("chunk dictionary: %s: %w", target, err)
	case err == nil:
		err = fits(h.dict.RAFS, o.Build)
	}
	if err != nil {
		h.notes = append(h.notes, fmt.Sprintf("chunks of %s are not referred to: %v", target, err))
		h.dropDict()
	}
	return nil
}

// fits says why an image cannot be the dictionary of one that is built so.
func fits(img *rafs.Image, b builder.Options) error {
	switch {
	case img.Version.String() != b.FSVersion.String():
		return fmt.Errorf("it is RAFS v%v, the new one v%v", img.Version, b.FSVersion)
	case img.ChunkSize != b.ChunkSize:
		return fmt.Errorf("it has chunks of %d bytes, the new one of %d", img.ChunkSize, b.ChunkSize)
	case img.Digester != b.Digester:
		return fmt.Errorf("it has digests %v, the new one %v", img.Digester, b.Digester)
	case len(img.Blobs) > maxSeedBlobs:
		return fmt.Errorf("it has %d blobs already, want at most %d", len(img.Blobs), maxSeedBlobs)
	}
	return nil
}

// dropDict goes on without a dictionary.
func (h *helpers) dropDict() {
	if h.dict != nil {
		_ = h.dict.Close() // nothing was written
	}
	h.dict, h.of = nil, nil
	clear(h.stored)
}

func (h *helpers) openDict(ctx context.Context, o Options, target remote.Reference) error {
	name := dictReference(o.ChunkDict)
	ref, err := remote.Parse(name)
	if err != nil {
		return err
	}
	h.dict, err = nydusimage.Open(ctx, name, nydusimage.Options{Platform: o.Platform, Remote: o.TargetRemote, TempDir: o.Build.TempDir})
	if err != nil {
		return err
	}
	h.of = &builder.Dict{ID: h.dict.Digest().String(), Image: h.dict.RAFS}
	for _, b := range h.dict.RAFS.Blobs {
		l, err := h.dict.Layer(b.ID)
		if err != nil {
			return err
		}
		h.of.Blobs = append(h.of.Blobs, builder.StoredBlob{
			Descriptor: l, Blob: b,
			Open: func(ctx context.Context) (io.ReaderAt, error) { return h.dict.ReaderAt(ctx, l), nil },
		})
		h.stored[l.Digest] = remote.Blob{
			Descriptor: l, MountFrom: mountFrom(ref, target),
			Open: func(ctx context.Context) (io.ReadCloser, error) { return h.dict.Fetch(ctx, l) },
		}
	}
	return nil
}

// build converts img with what the helpers have. When that fails on account of the cache it
// is done once more without.
func (h *helpers) build(ctx context.Context, o Options, src remote.Source, img remote.Image, report *reporter) (*builder.Result, error) {
	o.Build.List, o.Build.Progress, o.Build.Dict = o.List, report.build, h.of
	from := builderSource(src, img, o.Build.TempDir)
	if h.cache == nil {
		res, err := builder.Convert(ctx, from, o.Build)
		report.finish()
		return res, err
	}
	o.Build.Records = true
	reused := h.cache.apply(ctx, &from, o.Build, h.stored)
	res, err := builder.Convert(ctx, from, o.Build)
	if reused > 0 && errors.Is(err, builder.ErrReuse) && ctx.Err() == nil {
		h.cache.warn("it is not used: %v", err)
		h.cache.forget(reused)
		report.again()
		res, err = builder.Convert(ctx, builderSource(src, img, o.Build.TempDir), o.Build)
	}
	report.finish()
	return res, err
}

// blobs returns the files of res as what is pushed.
func (h *helpers) blobs(files []builder.File) ([]remote.Blob, error) {
	blobs := make([]remote.Blob, 0, len(files))
	for _, f := range files {
		b := remote.Blob{Descriptor: f.Descriptor, File: f.Path, Open: func(context.Context) (io.ReadCloser, error) { return f.Open() }}
		if f.Stored {
			stored, ok := h.stored[f.Descriptor.Digest]
			if !ok {
				return nil, fmt.Errorf("blob %s is stored nowhere", f.Descriptor.Digest)
			}
			b.Open, b.MountFrom = stored.Open, stored.MountFrom
		}
		blobs = append(blobs, b)
	}
	return blobs, nil
}

// warnings returns what a person should know of the helpers, once.
func (h *helpers) warnings() []string {
	if h.cache == nil {
		out := h.notes
		h.notes = nil
		return out
	}
	out := append(h.notes, h.cache.warnings...)
	h.notes = nil
	h.cache.warnings = nil
	return out
}

// keep writes the build cache, after the image has its name. One that cannot be written
// costs a warning.
func (h *helpers) keep(ctx context.Context) {
	if h.cache == nil {
		return
	}
	if err := h.cache.write(ctx); err != nil {
		h.cache.warn("it is not written: %v", err)
	}
}
