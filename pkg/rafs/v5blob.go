package rafs

import (
	"fmt"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// bare reports whether the blob has no blob.meta: one of a v5 image, whose chunk records are in
// the bootstrap, or a tar file used as it is.
func (b *Blob) bare() bool {
	return b.MetaUncompressed == 0 && b.MetaCompressed == 0 && b.MetaOffset == 0
}

// bareDataEnd is where the chunk data of a bare blob ends: before the tar header that names it,
// when a bootstrap follows in the same file.
func (b *Blob) bareDataEnd() uint64 {
	const headed = disk.FeatureCapTOC | disk.FeatureTarHeader
	if b.Features&headed == headed && b.CompressedSize >= disk.TarHeaderSize {
		return b.CompressedSize - disk.TarHeaderSize
	}
	return b.CompressedSize
}

// checkAny applies the rules of the version that the blob is of.
func (b *Blob) checkAny(section string, at int64, chunkSize uint32) error {
	if b.bare() {
		return b.checkV5(section, at, chunkSize)
	}
	return b.check(section, at, chunkSize)
}

// checkV5 applies the rules of a v5 blob table entry; chunkSize is the superblock's.
func (b *Blob) checkV5(section string, at int64, chunkSize uint32) error {
	const cannot = disk.FeatureBatch | disk.FeatureZran | disk.FeatureSeparate | disk.FeatureEncrypted | disk.FeatureExternal
	if err := b.checkFields(section, at, chunkSize); err != nil {
		return err
	}
	if b.Features&cannot != 0 {
		return unsupported(section, at, "features", fmt.Sprintf("%#x", b.Features), fmt.Sprintf("no bit of %#x in v5", cannot))
	}
	return nil
}
