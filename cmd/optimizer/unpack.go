package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/atomicfile"
	"github.com/headstart-oci/headstart/internal/unpack"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

type unpackOptions struct {
	*global
	image  imageFlags
	output string
}

func newUnpack(g *global) *cobra.Command {
	o := &unpackOptions{global: g}
	cmd := &cobra.Command{
		Use:   "unpack IMAGE DIR",
		Short: "Write the tree of a Nydus image to a directory or a tar archive",
		Long: `unpack writes the tree of a Nydus image: types, modes, owners, times, extended attributes,
hard links and devices as they are in the image, every chunk verified. A directory must
be empty or missing, and takes root; an archive takes no privileges. When it fails,
nothing is left.`,
		Example: `  optimizer unpack oci:images:nginx-optimized rootfs
  optimizer unpack registry.example/nginx:optimized --output nginx.tar
  optimizer unpack --bootstrap image.boot --blob-dir blobs --output - | tar -tv`,
		Args: atMost(2, "an image and a directory"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, rest, err := o.image.image(cmd, args)
			switch {
			case err != nil:
				return err
			case len(rest) > 1:
				return usagef(cmd, "--bootstrap stands for an image, and there is one more: %q", rest)
			case o.output == "" && len(rest) == 0:
				return usagef(cmd, "want a directory, or --output FILE.tar")
			case o.output != "" && len(rest) > 0:
				return usagef(cmd, "want a directory or --output, got both")
			case o.output == "-" && isTerminal(o.out):
				return usagef(cmd, "an archive is not for a terminal: --output FILE.tar")
			case o.image.bootstrap != "" && o.image.blobDir == "":
				return usagef(cmd, "--bootstrap needs --blob-dir")
			case len(rest) > 0 && meansArchive(rest[0]):
				return usagef(cmd, "%s is no directory: want --output %s for an archive, or %s/ for a directory of that name", rest[0], rest[0], rest[0])
			}
			return o.run(cmd.Context(), ref, rest)
		},
	}
	o.image.addFlags(cmd)
	cmd.Flags().StringVarP(&o.output, "output", "o", "", "write a tar archive to this file, - for standard output")
	return cmd
}

// meansArchive tells whether who gave name for the directory is likely to have meant an archive.
func meansArchive(name string) bool {
	if name == "-" {
		return true
	}
	_, err := os.Stat(name)
	return strings.HasSuffix(name, ".tar") && errors.Is(err, fs.ErrNotExist)
}

func (o *unpackOptions) run(ctx context.Context, ref string, dir []string) (err error) {
	o.image.read = rafs.OpenStrict
	img, err := o.image.open(ctx, ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	chunks := img.Chunks()
	defer func() { err = errors.Join(err, chunks.Close()) }()
	d := o.display()
	defer d.Close()
	total := unpack.Bytes(img.RAFS)
	src := unpack.Source{
		Image: img.RAFS, Read: chunks.ReadInto,
		Progress: func(done int64) { d.Update("unpack", done, total, done == total) },
	}
	if len(dir) > 0 {
		err = unpack.Dir(ctx, src, dir[0])
	} else {
		err = o.archive(ctx, src)
	}
	if err != nil {
		return fmt.Errorf("unpack %s: %w", img.Reference, err)
	}
	return nil
}

func (o *unpackOptions) archive(ctx context.Context, src unpack.Source) error {
	var skipped int
	fill := func(w io.Writer) (err error) {
		skipped, err = unpack.Tar(ctx, src, w)
		return err
	}
	var err error
	if o.output == "-" {
		err = fill(o.out)
	} else {
		err = writeFile(o.output, func(w io.Writer) error {
			f, ok := w.(*os.File)
			if !ok || !regular(f) {
				return fill(w)
			}
			behind := atomicfile.NewBehind(f)
			return errors.Join(fill(behind), behind.Close())
		})
	}
	if err == nil && skipped > 0 {
		o.warn("%d sockets were left out: tar archives have none", skipped)
	}
	return err
}

// writeFile puts a whole file in place, or nothing. What is no regular file (a pipe,
// /dev/stdout) is written to as it is; a link is followed. A file that is replaced keeps its permissions, and, where that
// is allowed, its owner.
func writeFile(name string, fill func(w io.Writer) error) error {
	root, base, old, err := openPlace(name)
	if err != nil {
		return err
	}
	if root == nil {
		return writeTo(name, fill)
	}
	_ = atomicfile.Clean(root, ".") // what another user's killed writer left there is in nobody's way
	err = atomicfile.Write(root, ".", base, 0o644, func(w io.Writer) error {
		if f, ok := w.(*os.File); ok && old != nil {
			if err := keepMode(f, old); err != nil {
				return err
			}
		}
		return fill(w)
	})
	return errors.Join(err, root.Close())
}

// keepMode gives f the owner, where that is allowed, and the permissions of another file.
func keepMode(f *os.File, old fs.FileInfo) error {
	if st, ok := old.Sys().(*syscall.Stat_t); ok {
		_ = f.Chown(int(st.Uid), int(st.Gid))
	}
	return f.Chmod(old.Mode().Perm())
}

// openPlace returns the directory in which the file called name is put in place, which the caller closes, its name there, and the file that is there,
// nil for none. A nil directory: it is written to as it is.
func openPlace(name string) (root *os.Root, base string, old fs.FileInfo, err error) {
	if info, err := os.Stat(name); err == nil {
		if !info.Mode().IsRegular() {
			return nil, "", nil, nil
		}
		old = info
		if name, err = filepath.EvalSymlinks(name); err != nil {
			return nil, "", nil, err
		}
	}
	root, err = os.OpenRoot(filepath.Dir(name))
	return root, filepath.Base(name), old, err
}

func writeTo(name string, fill func(w io.Writer) error) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(fill(f), f.Close())
}
