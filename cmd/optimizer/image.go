package main

import (
	"context"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// imageFlags are the options of commands that read a Nydus image.
type imageFlags struct {
	remote    remoteFlags
	platform  string
	bootstrap string
	blobDir   string
	tempDir   string
	// read is no flag: how the bootstrap is read; nil: rafs.Open.
	read func(bootstrap io.ReaderAt, size int64) (*rafs.Image, error)
}

func (f *imageFlags) addFlags(cmd *cobra.Command) {
	f.remote.addFlags(cmd)
	fl := cmd.Flags()
	fl.StringVar(&f.platform, "platform", "", "OS/ARCH[/VARIANT] of an image for several (default this machine's)")
	fl.StringVar(&f.bootstrap, "bootstrap", "", "read this bare bootstrap file instead of an image")
	fl.StringVar(&f.blobDir, "blob-dir", "", "directory of the bootstrap's blobs, each named by its id")
	fl.StringVar(&f.tempDir, "temp-dir", "", "where what comes over the network is put (default $TMPDIR or /tmp)")
}

// image takes the reference off the arguments, unless --bootstrap stands for it.
func (f *imageFlags) image(cmd *cobra.Command, args []string) (ref string, rest []string, err error) {
	switch {
	case f.blobDir != "" && f.bootstrap == "":
		return "", nil, usagef(cmd, "--blob-dir goes with --bootstrap")
	case f.bootstrap != "":
		return "", args, nil
	case len(args) == 0:
		return "", nil, usagef(cmd, "want an image, or --bootstrap FILE")
	}
	return args[0], args[1:], nil
}

// open opens what the command line names.
func (f *imageFlags) open(ctx context.Context, ref string) (*nydusimage.Image, error) {
	if ref == "" {
		read := f.read
		if read == nil {
			read = rafs.Open
		}
		return nydusimage.OpenFilesBy(read, f.bootstrap, f.blobDir)
	}
	return nydusimage.Open(ctx, ref, nydusimage.Options{Platform: f.platform, Remote: f.remote.options(), TempDir: f.tempDir, Read: f.read})
}

// isTerminal reports whether a stream is a terminal.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// readAtCloser is what rafs.Check wants of a blob.
type readAtCloser interface {
	io.ReaderAt
	io.Closer
}
