package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

type mergeOptions struct {
	*global
	bootstrap string
	parent    string
	chunkDict string
	prefetch  []string
}

func newMerge(g *global) *cobra.Command {
	o := &mergeOptions{global: g}
	cmd := &cobra.Command{
		Use:   "merge --bootstrap FILE LAYER...",
		Short: "Merge the layers' blobs into the bootstrap of an image",
		Long: `merge reads the bootstraps that the blobs of layers hold, as "nydus-image create
--blob-inline-meta" and pkg/builder/converter make them, and writes the bootstrap of the
image. Bare bootstraps are taken too; one that does not know the id of its blob must have it
for a file name, up to the first dot. The lowest layer comes first; whiteouts are applied. Without --prefetch, what the layers'
own prefetch tables name stays. With --chunk-dict, a layer may refer to the blobs of that image
and to one of its own. Standard output gets the digest of each blob that the image refers to.
When it fails, no file is written.`,
		Example: `  optimizer merge --bootstrap image.boot layer0.blob layer1.blob
  optimizer merge --bootstrap image.boot --parent-bootstrap base.boot app.blob --prefetch /usr/bin/app
  optimizer merge --bootstrap image.boot --chunk-dict bootstrap=common.boot layer0.blob layer1.blob`,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case o.bootstrap == "":
				return usagef(cmd, "want --bootstrap FILE, what to write")
			case len(args) == 0:
				return usagef(cmd, "want the blobs of the layers, the lowest first")
			}
			return o.run(cmd.Context(), args)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.bootstrap, "bootstrap", "", "the bootstrap to write")
	f.StringVar(&o.parent, "parent-bootstrap", "", "bootstrap of the image below the layers")
	f.StringVar(&o.chunkDict, "chunk-dict", "", "bootstrap of the image that the layers were packed with as chunk dictionary; also as bootstrap=FILE")
	f.StringArrayVar(&o.prefetch, "prefetch", nil, "path for the prefetch table; may be repeated")
	return cmd
}

func (o *mergeOptions) run(ctx context.Context, files []string) (err error) {
	m := builder.MergeOptions{Prefetch: o.prefetch}
	if o.parent != "" {
		if m.Parent, err = openBootstrap(o.parent); err != nil {
			return fmt.Errorf("merge: %s: %w", o.parent, err)
		}
	}
	if o.chunkDict != "" {
		name := strings.TrimPrefix(o.chunkDict, "bootstrap=")
		if m.Dict, err = openBootstrap(name); err != nil {
			return fmt.Errorf("merge: chunk dictionary %s: %w", name, err)
		}
	}
	layers := make([]builder.PackedLayer, 0, len(files))
	for _, name := range files {
		f, _, err := nydusimage.OpenRegular(name)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }() // only read
		l, err := packedLayer(f)
		if err != nil {
			return fmt.Errorf("merge: %s: %w", name, err)
		}
		layers = append(layers, l)
	}
	var blobs []digest.Digest
	err = writeFile(o.bootstrap, func(w io.Writer) error {
		blobs, err = builder.MergeLayers(ctx, w, layers, m)
		return err
	})
	if err != nil {
		return fmt.Errorf("merge: %w", err)
	}
	for _, b := range blobs {
		if _, err := fmt.Fprintln(o.out, b); err != nil {
			return err
		}
	}
	return nil
}

// packedLayer takes a layer's blob, which it hashes, or a bare bootstrap, whose blob has the file's name up to the
// first dot for an id, as for nydus-image.
func packedLayer(f *os.File) (builder.PackedLayer, error) {
	info, err := f.Stat()
	if err != nil {
		return builder.PackedLayer{}, err
	}
	if _, err := rafs.ReadInline(f, info.Size()); errors.Is(err, rafs.ErrNoBootstrap) {
		img, oerr := rafs.Open(f, info.Size())
		if oerr != nil {
			return builder.PackedLayer{}, fmt.Errorf("%w, and it is no bare bootstrap: %w", err, oerr)
		}
		l := builder.PackedLayer{Bootstrap: img}
		id, _, _ := strings.Cut(filepath.Base(f.Name()), ".")
		if d := digest.NewDigestFromEncoded(digest.SHA256, id); d.Validate() == nil {
			l.Digest = d
		}
		return l, nil
	}
	d, err := digest.FromReader(f)
	return builder.PackedLayer{Digest: d, Blob: f, Size: info.Size()}, err
}

func openBootstrap(name string) (_ *rafs.Image, err error) {
	f, size, err := nydusimage.OpenRegular(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return rafs.Open(f, size)
}
