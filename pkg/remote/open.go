package remote

import (
	"context"
	"fmt"
)

// OpenSource opens the image that ref names for reading; the caller closes it. A registry or
// containerd is contacted by the first call. It returns [ErrInvalid] or [ErrUnsupported] for
// what is no layout or archive, and [ErrNotFound] for a path that does not exist. ctx is for
// opening only.
func OpenSource(ctx context.Context, ref Reference, o Options) (Source, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s := o.settle()
	switch ref.Kind {
	case KindRegistry:
		return registrySource{newRepository(ref, s)}, nil
	case KindLayout:
		return openFiles(ref, openDir)
	case KindArchive:
		return openFiles(ref, openArchive)
	case KindContainerd:
		store, err := openContainerd(ref, s)
		if err != nil {
			return nil, err
		}
		src := containerdSource{store}
		if reg, ok := ref.Registry(); ok && o.RegistryFallback {
			return Fallback(src, registrySource{newRepository(reg, s)}, o), nil
		}
		return src, nil
	}
	return nil, fmt.Errorf("%w: reference of no kind", ErrInvalid)
}

func openFiles(ref Reference, open func(string) (files, error)) (Source, error) {
	f, err := open(ref.Path)
	if err != nil {
		return nil, err
	}
	src, err := openLayout(ref, f)
	if err != nil {
		_ = f.close() // only read
		return nil, err
	}
	return src, nil
}

// OpenTarget opens ref for writing an image; the caller closes it. A layout directory is
// made when it is missing and keeps its other entries; an archive replaces the file, whole,
// when it is tagged. A registry or containerd is contacted by the first call. Errors are
// those of the file system, and [ErrUnsupported] for a layout of another version.
func OpenTarget(ctx context.Context, ref Reference, o Options) (Target, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s := o.settle()
	switch ref.Kind {
	case KindRegistry:
		return registryTarget{newRepository(ref, s)}, nil
	case KindLayout:
		return openLayoutTarget(ctx, ref)
	case KindArchive:
		return openArchiveTarget(ref)
	case KindContainerd:
		if ref.Host == "" {
			return nil, fmt.Errorf("%w: target %s: an image ID cannot be written to", ErrInvalid, ref)
		}
		store, err := openContainerd(ref, s)
		if err != nil {
			return nil, err
		}
		return &containerdTarget{contentStore: store}, nil
	}
	return nil, fmt.Errorf("%w: reference of no kind", ErrInvalid)
}
