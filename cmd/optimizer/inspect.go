package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/progress"
	"github.com/headstart-oci/headstart/internal/unpack"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

type inspectOptions struct {
	*global
	image  imageFlags
	output string
	files  bool
	tables bool
	blob   string
}

func newInspect(g *global) *cobra.Command {
	o := &inspectOptions{global: g}
	cmd := &cobra.Command{
		Use:   "inspect IMAGE",
		Short: "Show what a Nydus image consists of",
		Long: `inspect shows the tables of a Nydus image: how it was made, its blobs, how many entries its
tree has, and what the prefetch blob holds. Only manifest, config and bootstrap are read.`,
		Example: `  optimizer inspect oci:images:nginx-optimized
  optimizer inspect registry.example/nginx:optimized -o json
  optimizer inspect --bootstrap image.boot --prefetch-files
  optimizer inspect --blob blobs/sha256/5d71395cfaf5`,
		Args: atMost(1, "one image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.blob != "" {
				if len(args) > 0 || o.output != "text" && o.output != "json" {
					return usagef(cmd, "--blob stands for an image, and --output is text or json: got %q and %q", args, o.output)
				}
				return o.runBlob(o.blob)
			}
			ref, rest, err := o.image.image(cmd, args)
			switch {
			case err != nil:
				return err
			case len(rest) > 0:
				return usagef(cmd, "--bootstrap stands for an image, and there is one more: %q", rest[0])
			case o.output != "text" && o.output != "json":
				return usagef(cmd, "--output: got %q, want text or json", o.output)
			}
			return o.run(cmd.Context(), ref)
		},
	}
	o.image.addFlags(cmd)
	f := cmd.Flags()
	f.StringVarP(&o.output, "output", "o", "text", "what standard output gets: text or json")
	f.BoolVar(&o.tables, "tables", false, "show where in the bootstrap each table is")
	f.StringVar(&o.blob, "blob", "", "show the sections of this bare blob file instead of an image")
	f.BoolVar(&o.files, "prefetch-files", false, "list the files in the prefetch blob, in its order")
	return cmd
}

// inspected is what inspect says of an image.
type inspected struct {
	Image      string          `json:"image"`
	Digest     digest.Digest   `json:"digest,omitempty"`
	Platform   string          `json:"platform,omitempty"`
	FSVersion  int             `json:"fs_version"`
	ChunkSize  uint32          `json:"chunk_size"`
	Compressor rafs.Compressor `json:"compressor"`
	Digester   rafs.Digester   `json:"digester"`
	Bootstrap  int64           `json:"bootstrap_bytes"`
	Tree       treeCounts      `json:"tree"`
	Blobs      []blobInfo      `json:"blobs"`
	// PrefetchTable are the paths of the prefetch table, in order; one for each inode.
	PrefetchTable []string `json:"prefetch_table,omitempty"`
	// PrefetchFiles are the files whose first chunk in the prefetch blob is there, in the blob's order.
	PrefetchFiles []string `json:"prefetch_files,omitempty"`
	// Tables are the bootstrap's tables, every field with its place.
	Tables *rafs.Info `json:"tables,omitempty"`
}

type treeCounts struct {
	Directories int   `json:"directories"`
	Files       int   `json:"files"`
	Symlinks    int   `json:"symlinks"`
	Others      int   `json:"others"`
	HardLinks   int   `json:"hard_links"` // names beyond the first of a file
	Bytes       int64 `json:"file_bytes"`
}

type blobInfo struct {
	ID           string          `json:"id"`
	Prefetch     bool            `json:"prefetch"`
	Chunks       uint32          `json:"chunks"`
	Compressed   uint64          `json:"bytes"`
	Uncompressed uint64          `json:"uncompressed_bytes"`
	Compressor   rafs.Compressor `json:"compressor"`
	Digester     rafs.Digester   `json:"digester"`
	Features     []string        `json:"features"`
	Files        int             `json:"files"` // files with a chunk in this blob
}

func (o *inspectOptions) run(ctx context.Context, ref string) (err error) {
	img, err := o.image.open(ctx, ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	out, err := describe(img, o.files, o.tables)
	if err != nil {
		return err
	}
	if o.output == "json" {
		return printJSON(o.out, out)
	}
	return out.print(o.out)
}

func describe(img *nydusimage.Image, files, tables bool) (inspected, error) {
	r := img.RAFS
	boot, size := img.Bootstrap()
	info, err := rafs.Inspect(boot, size)
	if err != nil {
		return inspected{}, err
	}
	out := inspected{
		Image: img.Reference, Digest: img.Digest(), FSVersion: int(r.Version), ChunkSize: r.ChunkSize,
		Compressor: r.Compressor, Digester: r.Digester, Bootstrap: size,
	}
	if img.Source != nil {
		out.Platform = convert.PlatformOf(*img.Source)
	}
	prefetch, has := img.PrefetchBlob()
	for i, b := range r.Blobs {
		out.Blobs = append(out.Blobs, blobInfo{
			ID: b.ID, Prefetch: has && i == prefetch, Chunks: b.ChunkCount, Compressed: b.CompressedSize,
			Uncompressed: b.UncompressedSize, Compressor: b.Compressor, Digester: b.Digester,
			Features: info.Blobs[i].FeatureNames,
		})
	}
	names := out.walk(r)
	for _, ino := range r.Prefetch {
		out.PrefetchTable = append(out.PrefetchTable, names[ino])
	}
	if files && has {
		out.PrefetchFiles = inBlob(names, prefetch)
	}
	if tables {
		out.Tables = info
	}
	return out, nil
}

// walk counts the tree and returns the first name of every inode.
func (out *inspected) walk(r *rafs.Image) map[*rafs.Inode]string {
	names := map[*rafs.Inode]string{}
	for path, ino := range unpack.Entries(r) {
		if _, ok := names[ino]; ok {
			out.Tree.HardLinks++
			continue
		}
		names[ino] = path
		switch ino.Mode & 0o170000 {
		case 0o040000:
			out.Tree.Directories++
		case 0o100000:
			out.Tree.Files++
			out.Tree.Bytes += int64(min(ino.Size, 1<<62))
		case 0o120000:
			out.Tree.Symlinks++
		default:
			out.Tree.Others++
		}
		counted := map[uint16]bool{}
		for _, c := range ino.Chunks {
			if int(c.Blob) < len(out.Blobs) && !counted[c.Blob] {
				counted[c.Blob] = true
				out.Blobs[c.Blob].Files++
			}
		}
	}
	return names
}

// inBlob returns the files with a chunk in a blob, by the place of their first one there.
func inBlob(names map[*rafs.Inode]string, blob int) []string {
	type place struct {
		path string
		at   uint32
	}
	var found []place
	for ino, path := range names {
		for _, c := range ino.Chunks {
			if int(c.Blob) == blob {
				found = append(found, place{path, c.Index})
				break
			}
		}
	}
	slices.SortFunc(found, func(a, b place) int {
		return cmp.Or(cmp.Compare(a.at, b.at), strings.Compare(a.path, b.path))
	})
	out := make([]string, 0, len(found))
	for _, f := range found {
		out = append(out, f.path)
	}
	return out
}

func (out *inspected) print(to io.Writer) error {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("image       %s", out.Image)
	if out.Digest != "" {
		line("digest      %s", out.Digest)
		line("platform    %s", out.Platform)
	}
	line("format      RAFS v%d, chunks of %s, %s, %s", out.FSVersion, progress.Bytes(int64(out.ChunkSize)), out.Compressor, out.Digester)
	line("bootstrap   %s", progress.Bytes(out.Bootstrap))
	t := out.Tree
	line("tree        %d directories, %d files (%s), %d symbolic links, %d others, %d further names of files",
		t.Directories, t.Files, progress.Bytes(t.Bytes), t.Symlinks, t.Others, t.HardLinks)
	line("prefetch    %d entries in the prefetch table", len(out.PrefetchTable))
	line("")
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "BLOB\tCHUNKS\tFILES\tSIZE\tUNCOMPRESSED\tROLE\tFEATURES")
	for _, x := range out.Blobs {
		role := "layer"
		if x.Prefetch {
			role = "prefetch"
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%s\t%s\t%s\n", x.ID, x.Chunks, x.Files, progress.Bytes(x.Compressed), progress.Bytes(x.Uncompressed), role, strings.Join(x.Features, "|"))
	}
	if t := out.Tables; t != nil {
		fmt.Fprintln(w, "\nTABLE\tOFFSET\tSIZE\tENTRIES")
		for _, s := range t.Sections {
			fmt.Fprintf(w, "%s\t%#x\t%d\t%d\n", s.Name, s.Offset, s.Size, s.Entries)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(out.PrefetchFiles) > 0 {
		line("")
	}
	for _, f := range out.PrefetchFiles {
		// A name that would disturb the terminal or the next line is quoted.
		if q := strconv.Quote(f); q != `"`+f+`"` {
			f = q
		}
		line("%s", f)
	}
	_, err := io.WriteString(to, b.String())
	return err
}
