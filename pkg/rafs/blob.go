package rafs

import (
	"fmt"
	"math/bits"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// Feature flags of [Blob.Features] that a caller may want to look at.
const (
	FeatureAligned  = disk.FeatureAligned
	FeatureBatch    = disk.FeatureBatch
	FeatureZran     = disk.FeatureZran
	FeatureSeparate = disk.FeatureSeparate
	FeaturePrefetch = disk.FeaturePrefetch // a prefetch blob, marked
	FeatureTOC      = disk.FeatureTOC
	// FeatureInlinedBootstrap is on blobs that also hold the bootstrap of their layer.
	FeatureInlinedBootstrap = disk.FeatureInlinedMeta
)

// dataEnd is where the chunk data ends inside the blob file. Source: rafs-format, how
// readers derive the end from the blob table.
func (b *Blob) dataEnd() uint64 {
	if b.bare() {
		return b.bareDataEnd()
	}
	if b.Features&disk.FeatureSeparate != 0 || b.Features&disk.FeatureCapTOC == 0 || b.MetaUncompressed == 0 {
		return b.CompressedSize
	}
	if b.Features&disk.FeatureTarHeader != 0 && b.MetaOffset >= disk.TarHeaderSize {
		return b.MetaOffset - disk.TarHeaderSize
	}
	return b.MetaOffset
}

// placedByMeta tells whether blob.meta says where chunks are, and not the chunk table.
func (b *Blob) placedByMeta() bool {
	return b.Features&(disk.FeatureBatch|disk.FeatureZran) != 0
}

// hasMeta tells whether there is a blob.meta table; tarfs blobs have none.
func (b *Blob) hasMeta() bool { return b.MetaUncompressed != 0 }

// metaRecordSize is the size of one record of the blob's meta table.
func (b *Blob) metaRecordSize() uint64 {
	if b.Features&disk.FeatureV2 != 0 {
		return disk.SizeMetaV2
	}
	return disk.SizeMetaV1
}

// checkMetaSize applies the readers' rule for ci_uncompressed_size.
func (b *Blob) checkMetaSize(section string, at int64) error {
	const contexts = disk.FeatureBatch | disk.FeatureZran | disk.FeatureEncrypted
	want := uint64(b.ChunkCount) * b.metaRecordSize()
	switch v2 := b.Features&disk.FeatureV2 != 0; {
	case !v2 && b.Features&contexts != 0:
		return invalid(section, at, "features", fmt.Sprintf("%#x", b.Features), "CHUNK_INFO_V2 with batch, zran or encryption")
	case v2 && b.Features&contexts != 0:
		if b.MetaUncompressed < want {
			return invalid(section, at, "ci_uncompressed_size", b.MetaUncompressed, fmt.Sprintf("at least %d", want))
		}
	case !v2 && b.Features&(disk.FeatureChunkDict|disk.FeatureTarfs) != 0:
	default:
		if b.MetaUncompressed != want {
			return invalid(section, at, "ci_uncompressed_size", b.MetaUncompressed, want)
		}
	}
	return nil
}

// check applies the rules of a v6 blob table entry; chunkSize is the superblock's.
func (b *Blob) check(section string, at int64, chunkSize uint32) error {
	if err := b.checkFields(section, at, chunkSize); err != nil {
		return err
	}
	if b.Features&(disk.FeatureAligned|disk.FeatureTarfs) == 0 {
		return invalid(section, at, "features", fmt.Sprintf("%#x", b.Features), "ALIGNED")
	}
	return b.checkMetaSize(section, at)
}

// checkFields applies the rules that hold for every blob.
func (b *Blob) checkFields(section string, at int64, chunkSize uint32) error {
	bad := func(field string, got, want any) error { return invalid(section, at, field, got, want) }
	end, carry := bits.Add64(b.MetaOffset, b.MetaCompressed, 0)
	switch {
	case !validChunkSize(b.ChunkSize) || b.ChunkSize != chunkSize:
		return bad("chunk_size", b.ChunkSize, chunkSize)
	case b.ChunkCount > maxReadChunks:
		return bad("chunk_count", b.ChunkCount, fmt.Sprintf("at most %d", maxReadChunks))
	case b.Compressor > CompressorZstd:
		return bad("compression_algo", b.Compressor, nil)
	case b.Digester > DigesterSHA256:
		return bad("digest_algo", b.Digester, nil)
	case b.MetaCompressor > CompressorZstd:
		return bad("ci_compressor", b.MetaCompressor, nil)
	case b.Features&disk.FeatureRefused != 0:
		return bad("features", fmt.Sprintf("%#x", b.Features), fmt.Sprintf("no bit of %#x", uint32(disk.FeatureRefused)))
	case b.CompressedSize > disk.MaxBlobStored:
		return bad("compressed_size", b.CompressedSize, fmt.Sprintf("at most %d", uint64(disk.MaxBlobStored)))
	case b.UncompressedSize > disk.MaxBlobExpanded:
		return bad("uncompressed_size", b.UncompressedSize, fmt.Sprintf("at most %d", uint64(disk.MaxBlobExpanded)))
	case b.MetaCompressed > b.MetaUncompressed:
		return bad("ci_compressed_size", b.MetaCompressed, fmt.Sprintf("at most %d", b.MetaUncompressed))
	case carry != 0 || end > 1<<63-1:
		return bad("ci_offset + ci_compressed_size", "overflowing", nil)
	}
	return nil
}

// maxReadChunks bounds the chunks of a blob we read; writers stop one short.
const maxReadChunks = 0x1000000

func validChunkSize(n uint32) bool {
	return n >= MinChunkSize && n <= MaxChunkSize && bits.OnesCount32(n) == 1
}

// alignUp rounds x up to a multiple of a, a power of two; x must be far from overflow.
func alignUp(x, a uint64) uint64 { return (x + a - 1) &^ (a - 1) }

// short abbreviates a blob id for messages.
func short(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}
