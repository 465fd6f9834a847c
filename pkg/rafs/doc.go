// Package rafs reads, writes and checks Nydus images: bootstraps of RAFS v5 and v6, and their data
// blobs. It knows bytes only: it opens no file, socket or process.
//
// Five terms carry it. A bootstrap is the metadata of a whole image; in v6 it is an EROFS
// image with private tables. A blob holds the chunks of one layer, compressed, and a
// table of them, blob.meta. A chunk is the unit of compression and digest: a piece of a file of at most the
// image's chunk size. The cache file of a blob is its uncompressed form, whose offsets are
// what the bootstrap's block addresses mean. The prefetch table lists inodes that a reader should fetch first.
//
// An [Image] holds everything that a bootstrap says. [Open] reads one, [WriteBootstrap] writes one:
//
//	img, err := rafs.Open(bootstrap, size)
//	…
//	fsys := img.FS(func(b rafs.Blob) (*rafs.BlobReader, error) {
//		return rafs.OpenBlobFrom(func(b rafs.Blob) (io.ReaderAt, error) { return files[b.ID], nil }, b)
//	})
//	data, err := fs.ReadFile(fsys, "etc/os-release") // every chunk verified
//
// Blobs are read in all kinds that nydus-image makes, but encrypted and external ones ([ErrUnsupported]): chunks stored one by
// one or in batches, inside the gzip or tar layers of another image (ZRAN, OCI-ref: [RefBuilder] makes such blobs), and
// plain tars (tarfs, whose chunks have no digests). [BlobWriter] makes the first two.
//
// Limits: bytes are written for little-endian readers of block size 4096, so no tarfs images.
// The layout was learned from the sources of dragonflyoss/nydus and the kernel's fs/erofs; WriteBootstrap
// gives the bytes that nydus-image 2.4 gives, but for the CRCs of chunks and the order of xattrs.
package rafs
