package builder

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/ordinal"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// The names inside a bootstrap layer. Source: nydus-snapshotter pkg/converter/constant.go.
const (
	bootstrapDir   = "image"
	bootstrapEntry = "image/image.boot"
	prefetchEntry  = "image/prefetch.files"
)

// writeBootstrap writes the bare bootstrap file.
func (c *conversion) writeBootstrap(img *rafs.Image) error {
	c.res.BootstrapPath = c.path("image.boot")
	f, err := os.OpenFile(c.res.BootstrapPath, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, blobBuffer)
	info, err := rafs.WriteBootstrap(w, img)
	if err := errors.Join(err, w.Flush(), f.Close()); err != nil {
		return err
	}
	c.res.Stats.BootstrapBytes = info.Size
	return nil
}

// packBootstrap writes the layer that holds the bootstrap, the list as Nydus' JSON when there is a prefetch
// blob, and the tables of layers that are referred to. It returns the digest of the uncompressed tar.
func (c *conversion) packBootstrap(ctx context.Context) (_ digest.Digest, err error) {
	entries := []tarFile{{name: bootstrapEntry, mode: 0o444, path: c.res.BootstrapPath, size: c.res.Stats.BootstrapBytes}}
	annotations := map[string]string{AnnotationBootstrap: "true", AnnotationFSVersion: c.o.FSVersion.String()}
	if c.prefetch != nil {
		var b bytes.Buffer
		if _, err := c.o.List.WriteJSON(&b); err != nil {
			return "", fmt.Errorf("write %s: %w", prefetchEntry, err)
		}
		entries = append(entries, tarFile{name: prefetchEntry, mode: 0o444, data: b.Bytes(), size: int64(b.Len())})
		annotations[AnnotationPrefetchBlob] = c.prefetch.ID
	}
	tables, err := c.cachedTables(ctx)
	if err != nil {
		return "", err
	}
	entries = append(entries, tables...)
	layer, diffID, err := writeLayer(ctx, c.path("bootstrap.tar.gz"), entries)
	if err != nil {
		return "", err
	}
	layer.Annotations = annotations
	c.res.Bootstrap = File{Path: c.path("bootstrap.tar.gz"), SourceLayer: -1, Descriptor: layer}
	return diffID, nil
}

// writeLayer writes the files as a new gzip layer at name, which must not be there. It returns the layer's descriptor and the digest of the
// uncompressed tar.
func writeLayer(ctx context.Context, name string, files []tarFile) (_ ocispec.Descriptor, diffID digest.Digest, _ error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	stored, plain := sha256.New(), sha256.New()
	count := &countWriter{w: io.MultiWriter(f, stored)}
	z := gzip.NewWriter(count)
	err = writeTar(ctx, io.MultiWriter(z, plain), files)
	if err := errors.Join(err, z.Close(), f.Close()); err != nil {
		return ocispec.Descriptor{}, "", err
	}
	return ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.NewDigest(digest.SHA256, stored), Size: count.n,
	}, digest.NewDigest(digest.SHA256, plain), nil
}

// countWriter counts what it passes on.
type countWriter struct {
	w io.Writer
	n int64
}

func (c *countWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// summary is what must be the same of an image before it is written and after it is read.
type summary struct {
	entries int    // names, the root not counted
	sum     string // over every name, attribute, link and chunk record, the blobs and the prefetch table
}

// summarize digests everything that an image says.
func summarize(img *rafs.Image) summary {
	names := countNames(img.Root)
	s := summarizer{h: sha256.New(), met: make([]*rafs.Inode, 0, names)}
	s.index = ordinal.New(names, func(i int) *rafs.Inode { return s.met[i] })
	s.u64(uint64(img.ChunkSize), uint64(img.Compressor), uint64(img.Digester), uint64(len(img.Blobs)))
	for _, b := range img.Blobs {
		s.str(fmt.Sprintf("%+v", b))
	}
	s.inode(img.Root)
	s.u64(uint64(len(img.Prefetch)))
	for _, ino := range img.Prefetch {
		id, _ := s.index.Find(ino)
		s.u64(uint64(id + 1)) //nolint:gosec // not negative: directories have 0
	}
	s.flush()
	return summary{entries: s.entries, sum: hex.EncodeToString(s.h.Sum(nil))}
}

// countNames returns how many entries the directories below and with dir have.
func countNames(dir *rafs.Inode) int {
	n := len(dir.Children)
	for _, d := range dir.Children {
		n += countNames(d.Inode)
	}
	return n
}

type summarizer struct {
	h       hash.Hash
	buf     []byte
	met     []*rafs.Inode              // files, by first visit
	index   *ordinal.Index[rafs.Inode] // of met
	entries int
}

func (s *summarizer) u64(v ...uint64) {
	for _, n := range v {
		s.buf = binary.LittleEndian.AppendUint64(s.buf, n)
	}
	if len(s.buf) > blobBuffer {
		s.flush()
	}
}

func (s *summarizer) str(v string) {
	s.u64(uint64(len(v)))
	s.buf = append(s.buf, v...)
}

func (s *summarizer) flush() {
	s.h.Write(s.buf) // never fails
	s.buf = s.buf[:0]
}

func (s *summarizer) inode(ino *rafs.Inode) {
	if id, ok := s.index.Find(ino); ok {
		s.u64(uint64(id) + 1) //nolint:gosec // a place in a list
		return
	}
	if len(ino.Children) == 0 {
		s.met = append(s.met, ino)
		s.index.Add(ino)
	}
	s.u64(0, uint64(ino.Mode), uint64(ino.UID), uint64(ino.GID),
		uint64(ino.Mtime), uint64(ino.MtimeNsec), ino.Size, uint64(ino.Rdev)) //nolint:gosec // bits, not a number
	s.str(ino.Target)
	s.u64(uint64(len(ino.Xattrs)), uint64(len(ino.Chunks)), uint64(len(ino.Children)))
	for _, x := range ino.Xattrs {
		s.str(x.Name)
		s.str(string(x.Value))
	}
	for i := range ino.Chunks {
		c := &ino.Chunks[i]
		s.buf = append(s.buf, c.Digest[:]...)
		s.u64(uint64(c.Blob), uint64(c.Index), c.CompressedOffset, c.UncompressedOffset,
			uint64(c.CompressedSize), uint64(c.UncompressedSize))
	}
	for _, d := range ino.Children {
		s.entries++
		s.str(d.Name)
		s.inode(d.Inode)
	}
}
