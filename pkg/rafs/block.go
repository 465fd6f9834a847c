package rafs

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// WriteBlock writes a v6 image as one raw EROFS image: the bootstrap, and behind it the cache
// file of every blob, where the device slots then say it is. The kernel mounts it by itself, as a
// file or a block device, with no devices named (Linux 6.4 or later; fs/erofs/super.c
// erofs_scan_devices, "flatdev"). It returns the size of the image, a multiple of
// the block size of 4096 bytes.
//
// Blocks of zeros are not written, so w must read as zeros where nothing was written. open
// gives the reader of blob n and is called once for each. ErrUnsupported for v5, which is no EROFS
// image, and for more blobs than 32-bit block numbers reach; else errors are those of [Open],
// of [Image.ExpandBlob] and of w.
func WriteBlock(ctx context.Context, w io.WriterAt, bootstrap io.ReaderAt, size int64, open func(n int) (*BlobReader, error)) (int64, error) {
	img, err := Open(bootstrap, size)
	if err != nil {
		return 0, err
	}
	if img.Version == V5 {
		return 0, fmt.Errorf("%w: RAFS v5 is no EROFS image: the kernel cannot mount it", ErrUnsupported)
	}
	info, err := Inspect(bootstrap, size)
	if err != nil {
		return 0, err
	}
	if info.Superblock.FeatureCompat&disk.CompatChecksum != 0 {
		return 0, fmt.Errorf("%w: the superblock has a checksum, and device slots have to change", ErrUnsupported)
	}
	if _, err := io.Copy(io.NewOffsetWriter(w, 0), io.NewSectionReader(bootstrap, 0, size)); err != nil {
		return 0, fmt.Errorf("write bootstrap: %w", err)
	}
	end := alignUp(uint64(size), disk.BlockSize) //nolint:gosec // not negative
	for n, slot := range info.Devices {
		before, start := end, alignUp(end, disk.MappedAlign)
		if end, err = mapDevice(w, slot, start, img.Blobs[n].UncompressedSize, info.Superblock.BlockSize); err != nil {
			return 0, fmt.Errorf("device slot %d: %w", n, err)
		}
		// The image ends with a whole block, whatever the last blob ends with, which is written over this.
		if end > before {
			if _, err := w.WriteAt([]byte{0}, clampOffset(end-1)); err != nil {
				return 0, err
			}
		}
		r, err := open(n)
		if err != nil {
			return 0, err
		}
		if err := img.ExpandBlob(ctx, n, r, io.NewOffsetWriter(w, clampOffset(start))); err != nil {
			return 0, err
		}
	}
	if end > uint64(size) && len(info.Devices) == 0 { //nolint:gosec // not negative
		if _, err := w.WriteAt([]byte{0}, clampOffset(end-1)); err != nil {
			return 0, err
		}
	}
	return clampOffset(end), nil
}

// mapDevice makes slot say that its device begins at byte start of the image, and returns
// where it ends.
func mapDevice(w io.WriterAt, slot DeviceInfo, start, size uint64, blockSize int) (uint64, error) {
	block := start / uint64(blockSize) //nolint:gosec // 512 or 4096
	if block > math.MaxUint32 {
		return 0, fmt.Errorf("%w: block %d, at most %d", ErrUnsupported, block, uint32(math.MaxUint32))
	}
	field := binary.LittleEndian.AppendUint32(nil, uint32(block))
	if _, err := w.WriteAt(field, slot.Offset+disk.DeviceMappedOffset); err != nil {
		return 0, err
	}
	return start + alignUp(size, disk.BlockSize), nil
}
