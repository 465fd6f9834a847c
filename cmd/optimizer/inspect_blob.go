package main

import (
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// runBlob shows what a bare blob file says of itself.
func (o *inspectOptions) runBlob(name string) (err error) {
	f, size, err := nydusimage.OpenRegular(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := rafs.InspectBlob(f, size)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if o.output == "json" {
		return printJSON(o.out, info)
	}
	w := tabwriter.NewWriter(o.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "section\toffset\tbytes\tentries")
	for _, s := range info.Sections {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\n", s.Name, s.Offset, s.Size, s.Entries)
	}
	if m := info.Meta; m != nil {
		fmt.Fprintf(w, "\nchunks\t%d\nfeatures\t%v\ntable\t%d bytes at %d, %v, %d uncompressed\ncontexts\t%d\n",
			m.Chunks, m.FeatureNames, m.TableSize, m.TableOffset, m.Compressor, m.UncompressedSize, m.Contexts)
	}
	if len(info.TOC) > 0 {
		fmt.Fprintln(w, "\nTOC\toffset\tbytes\tuncompressed\tcompressor\tsha256")
	}
	for _, e := range info.TOC {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%v\t%v\n", e.Name, e.Offset, e.CompressedSize, e.UncompressedSize, e.Compressor, e.Digest)
	}
	return w.Flush()
}
