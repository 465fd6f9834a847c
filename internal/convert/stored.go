package convert

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// helpers are what a conversion may take blobs from instead of making them.
type helpers struct {
	dicts []*nydusimage.Image // those of of, in its order
	of    *builder.Dict       // the chunk dictionary; nil: none
	notes []string            // of the dictionary, for a person
	cache *cache              // nil: none
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
	switch o.ChunkDict {
	case "":
	case DictAuto:
		err = h.openSeeds(ctx, o, source, target)
	default:
		err = h.openDict(ctx, o, target)
	}
	if err != nil {
		return nil, fmt.Errorf("chunk dictionary: %w", err)
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
	for _, d := range h.dicts {
		errs = append(errs, d.Close())
	}
	if h.cache != nil {
		errs = append(errs, h.cache.Close())
	}
	return errors.Join(errs...)
}

// build converts img with what the helpers have. When that fails on account of the cache, or of a dictionary that was
// found and not named, it is done once more without.
func (h *helpers) build(ctx context.Context, o Options, src remote.Source, img remote.Image, report *reporter) (*builder.Result, error) {
	defer report.finish()
	o.Build.List, o.Build.Progress, o.Build.Dict = o.List, report.build, h.of
	from, reused := builderSource(src, img, o.Build.TempDir), 0
	if h.cache != nil {
		o.Build.Records = true
		reused = h.cache.apply(ctx, &from, o.Build, h.stored)
	}
	for {
		res, err := h.convert(ctx, from, o.Build)
		switch {
		case err == nil || ctx.Err() != nil:
			return res, err
		case reused > 0 && errors.Is(err, builder.ErrReuse):
			h.cache.warn("it is not used: %v", err)
			h.cache.forget(reused)
		case o.ChunkDict == DictAuto && o.Build.Dict != nil && errors.Is(err, builder.ErrDict):
			// What was found by itself must not stand in the way, as when one of its blobs is damaged.
			h.notes = append(h.notes, fmt.Sprintf("the images at the target are not referred to: %v", err))
			o.Build.Dict = nil
		default:
			return nil, err
		}
		report.again()
		from, reused = builderSource(src, img, o.Build.TempDir), 0
	}
}

// convert builds once, and verifies the stored blobs that the result refers to.
func (h *helpers) convert(ctx context.Context, from builder.Source, o builder.Options) (*builder.Result, error) {
	res, err := builder.Convert(ctx, from, o)
	if err != nil {
		return nil, err
	}
	if err := h.verify(ctx, res); err != nil {
		return nil, errors.Join(err, res.Close())
	}
	return res, nil
}

// verify reads the stored blobs of res that are files of a layout: who may write there may have damaged them, and the image would be
// as damaged. Registries and containerd have verified what they were given.
func (h *helpers) verify(ctx context.Context, res *builder.Result) error {
	for _, f := range res.Blobs {
		b := h.stored[f.Descriptor.Digest]
		if !f.Stored || !b.Verify {
			continue
		}
		r, err := b.Open(ctx)
		if err == nil {
			_, err = io.Copy(io.Discard, r)
			err = errors.Join(err, r.Close())
		}
		if err == nil {
			continue
		}
		fault := builder.ErrDict
		if h.cache != nil && h.cache.has(f.Descriptor.Digest) {
			fault = builder.ErrReuse
		}
		return fmt.Errorf("%w: stored blob %s: %w", fault, f.Descriptor.Digest, err)
	}
	return nil
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
			b.Open, b.MountFrom, b.Verify = stored.Open, stored.MountFrom, true // what the target has by its name may be damaged
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
