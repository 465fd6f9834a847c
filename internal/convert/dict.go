package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// DictAuto is the value of [Options].ChunkDict that names the images that are at the target already.
const DictAuto = "auto"

const (
	// maxSeedBlobs bounds how many blobs the images at the target may have to be referred to: each rebuild adds its own, and the
	// format counts 254 in all.
	maxSeedBlobs = 128
	// maxSeeds bounds how many images at the target are referred to: the memory of their bootstraps, and the time to get them.
	maxSeeds = 4
	// maxSeedNames bounds how many names at the target are looked at: a request each.
	maxSeedNames = 32
)

// dictReference takes nydusify's way to write a dictionary, "bootstrap:registry:REF", too.
func dictReference(s string) string {
	if rest, ok := strings.CutPrefix(s, "bootstrap:"); ok {
		return strings.TrimPrefix(rest, "registry:")
	}
	return s
}

// openDict makes the image that o names the dictionary.
func (h *helpers) openDict(ctx context.Context, o Options, target remote.Reference) error {
	name := dictReference(o.ChunkDict)
	ref, err := remote.Parse(name)
	if err != nil {
		return err
	}
	img, d, err := openDict(ctx, o, ref, name)
	if err != nil {
		return err
	}
	h.addDict(img, d, mountFrom(ref, target), ref.Kind == remote.KindLayout)
	return nil
}

// openDict opens the image called name and describes it as a dictionary.
func openDict(ctx context.Context, o Options, ref remote.Reference, name string) (_ *nydusimage.Image, _ *builder.Dict, err error) {
	img, err := nydusimage.Open(ctx, name, nydusimage.Options{Platform: o.Platform, Remote: o.TargetRemote, TempDir: o.Build.TempDir})
	if err != nil {
		return nil, nil, err
	}
	d := &builder.Dict{ID: img.Digest().String(), Image: img.RAFS}
	for _, b := range img.RAFS.Blobs {
		l, err := img.Layer(b.ID)
		if err != nil {
			return nil, nil, errors.Join(fmt.Errorf("%s: %w", ref, err), img.Close())
		}
		d.Blobs = append(d.Blobs, builder.StoredBlob{
			Descriptor: l, Blob: b,
			Open: func(ctx context.Context) (io.ReaderAt, error) { return img.ReaderAt(ctx, l), nil },
		})
	}
	return img, d, nil
}

// addDict puts an image behind those of the dictionary; from is the repository that its blobs can be mounted from, and files says
// that they are plain files, which are verified when they are referred to.
func (h *helpers) addDict(img *nydusimage.Image, d *builder.Dict, from string, files bool) {
	for i := range d.Blobs {
		l := d.Blobs[i].Descriptor
		if _, known := h.stored[l.Digest]; !known {
			h.stored[l.Digest] = remote.Blob{
				Descriptor: l, MountFrom: from, Verify: files,
				Open: func(ctx context.Context) (io.ReadCloser, error) { return img.Fetch(ctx, l) },
			}
		}
	}
	if h.dicts = append(h.dicts, img); h.of == nil {
		h.of = d
		return
	}
	// The dictionary's name is made of those of its images.
	h.of = &builder.Dict{
		ID: digest.FromString(h.of.ID + " " + d.ID).String(), Image: h.of.Image, Blobs: h.of.Blobs, More: append(h.of.More, d),
	}
}

// openSeeds makes the images at the target the dictionary, as far as they can be one: the one that target names, which is about to be
// replaced, and then others that are kept with it, from the last name on, which version numbers make the newest. Nothing that is
// wrong with them is an error, but that the target cannot be reached.
func (h *helpers) openSeeds(ctx context.Context, o Options, source, target remote.Reference) error {
	if err := h.openSeed(ctx, o, target, true); err != nil {
		return err
	}
	names, err := remote.ListNames(ctx, target, o.TargetRemote)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !missing(err) { // registries need not list tags
			h.notes = append(h.notes, fmt.Sprintf("no other images at %s are referred to: %v", target, err))
		}
		return nil
	}
	looked := 0
	for i := len(names) - 1; i >= 0 && len(h.dicts) < maxSeeds && looked < maxSeedNames; i-- {
		if names[i] == target || names[i] == source {
			continue
		}
		looked++
		if err := h.openSeed(ctx, o, names[i], false); err != nil {
			return err
		}
	}
	return nil
}

// missing tells of an error that there is no such image, or no such place.
func missing(err error) bool {
	return errors.Is(err, remote.ErrNotFound) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, remote.ErrPlatform)
}

// openSeed adds the image that ref names to the dictionary. replaced is true for the one that the target names: that it cannot be
// reached is an error, and a person is told why it cannot be referred to. Others are left out.
func (h *helpers) openSeed(ctx context.Context, o Options, ref remote.Reference, replaced bool) error {
	img, d, err := openDict(ctx, o, ref, ref.String())
	switch {
	case err == nil:
	case missing(err):
		return nil // the first one
	case ctx.Err() != nil,
		replaced && (errors.Is(err, remote.ErrUnauthorized) || errors.Is(err, remote.ErrUnavailable) || errors.Is(err, remote.ErrStalled)):
		return fmt.Errorf("%s: %w", ref, err)
	}
	if err == nil {
		err = h.fits(d, o.Build)
	}
	if err == nil {
		err = complete(ctx, d)
	}
	if err == nil {
		h.addDict(img, d, "", ref.Kind == remote.KindLayout) // the target has its blobs
		return nil
	}
	if img != nil {
		_ = img.Close() // only read
	}
	if replaced {
		h.notes = append(h.notes, fmt.Sprintf("chunks of %s are not referred to: %v", ref, err))
	}
	return nil
}

// complete says which blob of a dictionary cannot be had at its end: where some were removed, the image that refers
// to them would be as broken.
func complete(ctx context.Context, d *builder.Dict) error {
	const atOnce = 8
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for _, b := range d.Blobs {
		g.Go(func() error {
			r, err := b.Open(ctx)
			if err == nil {
				var n int
				if n, err = r.ReadAt(make([]byte, 1), b.Descriptor.Size-1); n == 1 {
					err = nil // or io.EOF
				}
			}
			if err != nil {
				return fmt.Errorf("blob %s: %w", b.Descriptor.Digest, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// fits says why an image cannot be one of the dictionary's of a conversion with b.
func (h *helpers) fits(d *builder.Dict, b builder.Options) error {
	if err := d.Check(b); err != nil {
		return err
	}
	// Who asks for another compressor wants the data in it; the dictionary would keep them as they are, from image to image.
	if got := d.Image.Compressor; got != b.Compressor {
		return fmt.Errorf("it is compressed with %v, the image is to be with %v", got, b.Compressor)
	}
	blobs := map[string]bool{}
	count := func(of []rafs.Blob) {
		for i := range of {
			blobs[of[i].ID] = true
		}
	}
	count(d.Image.Blobs)
	for _, img := range h.dicts {
		if img.Digest().String() == d.ID {
			return errors.New("it has another name, too")
		}
		count(img.RAFS.Blobs)
	}
	if len(blobs) > maxSeedBlobs {
		return fmt.Errorf("the dictionary would have %d blobs, want at most %d", len(blobs), maxSeedBlobs)
	}
	return nil
}
