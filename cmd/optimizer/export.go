package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/progress"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

type exportOptions struct {
	*global
	image imageFlags
	block bool
}

func newExport(g *global) *cobra.Command {
	o := &exportOptions{global: g}
	cmd := &cobra.Command{
		Use:   "export --block IMAGE FILE",
		Short: "Make one raw disk image that the kernel mounts",
		Long: `export --block writes a RAFS v6 image as one raw EROFS image: the bootstrap and the
uncompressed data of every blob in one file, every chunk verified. The kernel mounts it
from the file or from a block device (Linux 6.4; files without a loop device: 6.12).
The file is sparse where the image has zeros. When it fails, nothing is left.`,
		Example: `  optimizer export --block oci:images:nginx-optimized nginx.erofs
  mount -t erofs -o ro nginx.erofs /mnt
  optimizer export --block --bootstrap image.boot --blob-dir blobs image.erofs`,
		Args: atMost(2, "an image and a file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, rest, err := o.image.image(cmd, args)
			switch {
			case err != nil:
				return err
			case !o.block:
				return usagef(cmd, "want --block: there is no other form yet")
			case len(rest) != 1:
				return usagef(cmd, "want one file to write, got %d", len(rest))
			case o.image.bootstrap != "" && o.image.blobDir == "":
				return usagef(cmd, "--bootstrap needs --blob-dir")
			}
			return o.run(cmd.Context(), ref, rest[0])
		},
	}
	o.image.addFlags(cmd)
	cmd.Flags().BoolVar(&o.block, "block", false, "a raw EROFS image")
	return cmd
}

func (o *exportOptions) run(ctx context.Context, ref, file string) (err error) {
	o.image.read = rafs.OpenStrict
	img, err := o.image.open(ctx, ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	chunks := img.Chunks()
	defer func() { err = errors.Join(err, chunks.Close()) }()
	boot, bootSize := img.Bootstrap()
	var size int64
	err = writeFile(file, func(w io.Writer) error {
		f, ok := w.(*os.File)
		if !ok || !regular(f) {
			return fmt.Errorf("%s: want a regular file: holes of an image are not written", file)
		}
		size, err = rafs.WriteBlock(ctx, f, boot, bootSize, func(n int) (*rafs.BlobReader, error) {
			b := img.RAFS.Blobs[n]
			o.note("reading blob %s (%s)", b.ID, progress.Bytes(b.CompressedSize))
			return chunks.Blob(ctx, n)
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("export %s: %w", img.Reference, err)
	}
	_, err = fmt.Fprintf(o.out, "%s: %d bytes, %d blobs\n", file, size, len(img.RAFS.Blobs))
	return err
}

// regular reports whether f is a file, which is empty and reads as zeros where it is not written.
func regular(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular()
}
