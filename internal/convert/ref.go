package convert

import (
	"context"
	"fmt"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// checkRef refuses what an image over the source's own layers cannot be combined with, before anything is read.
func checkRef(o Options) error {
	switch {
	case !o.Build.OCIRef:
		return nil
	case o.ChunkDict != "":
		return fmt.Errorf("%w: references to the source's layers (OCI-ref) with a chunk dictionary", builder.ErrUnsupported)
	case o.BuildCache != "":
		return fmt.Errorf("%w: references to the source's layers (OCI-ref) with a build cache, which keeps built layers", builder.ErrUnsupported)
	}
	return nil
}

// origin is where an image comes from and goes to.
type origin struct {
	src            remote.Source
	source, target remote.Reference
}

// referenced returns the layers that res refers to and its manifest does not list, to be brought to the target: who
// runs the image looks for them there.
func (o origin) referenced(res *builder.Result) []remote.Blob {
	var out []remote.Blob
	for _, l := range res.Layers {
		out = append(out, remote.Blob{
			Descriptor: l, MountFrom: mountFrom(o.source, o.target), Verify: apart(o.source, o.target),
			Open: func(ctx context.Context) (io.ReadCloser, error) { return o.src.Fetch(ctx, l) },
		})
	}
	return out
}

// refWarnings says what keeps the layers of an image that only refers to them: registries delete what no
// manifest of the repository lists.
func refWarnings(o Options, source, target remote.Reference, sum Summary) []string {
	if sum.Referenced == 0 || o.MergePlatform || target.Kind != remote.KindRegistry {
		return nil
	}
	if source.Kind == target.Kind && source.Host == target.Host && source.Repository == target.Repository {
		return nil
	}
	return []string{fmt.Sprintf("%d layers of the source are in the target's repository and no manifest there lists them: "+
		"the registry's garbage collection may delete them, unless the plain image is kept there too (--merge-platform does)", sum.Referenced)}
}

// layerRanges reads a layer by ranges, for [builder.Layer].OpenAt.
type layerRanges struct{ *remote.RangeCache }

func openRanges(ctx context.Context, src remote.Source, d ocispec.Descriptor, tempDir string) (io.ReaderAt, error) {
	c, err := remote.NewRangeCache(ctx, src, d, tempDir)
	if err != nil {
		return nil, err
	}
	return layerRanges{c}, nil
}

// Fetch gets ranges with few requests.
func (l layerRanges) Fetch(ctx context.Context, ranges []builder.StoredRange) error {
	list := make([]remote.Range, len(ranges))
	for i, r := range ranges {
		list[i] = remote.Range(r)
	}
	return l.RangeCache.Fetch(ctx, list)
}
