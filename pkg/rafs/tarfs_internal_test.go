package rafs

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// tarfsImage lays a tarfs bootstrap over a tar by hand: no tool at hand makes them (nydus-image 2.2.0 does not).
// Every file is in the root directory.
func tarfsImage(t *testing.T, files map[string][]byte) (bootstrap, data []byte) {
	t.Helper()
	const chunkSize, block, meta = 1 << 20, 512, 8192
	names := []string{}
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	inodes := make([]byte, block)
	entries := []v6Entry{{".", disk.RootNid, disk.TypeDir}, {"..", disk.RootNid, disk.TypeDir}}
	chunks := uint32(0)
	for _, name := range names {
		p := files[name]
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(p))}); err != nil {
			t.Fatal(err)
		}
		at := out.Len()
		if _, err := w.Write(p); err != nil {
			t.Fatal(err)
		}
		inodes = append(inodes, make([]byte, -len(inodes)&31)...)
		entries = append(entries, v6Entry{name, uint64(disk.RootNid + len(inodes)/disk.NidSize), disk.TypeRegular})
		inodes = appendRecord(inodes, &disk.InodeExtended{
			Format: 1 | disk.LayoutChunk<<disk.FormatLayoutShift, Mode: modeRegular | 0o644, Size: uint64(len(p)), Nlink: 1,
			Union: disk.ChunkFormatIndexes | (20 - disk.TarfsBlockBits),
		})
		for i := 0; i < len(p); i += chunkSize {
			inodes = appendRecord(inodes, &disk.ChunkIndex{IndexLow: uint16(chunks), Device: 1, Block: uint32((at + i) / block)})
			chunks++
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	data = out.Bytes()
	sum := sha256.Sum256(data)
	dirents := appendDirBlock(nil, entries)
	if len(dirents) > block-disk.SizeInodeExtended {
		t.Fatal("too many files")
	}
	copy(inodes, append(appendRecord(nil, &disk.InodeExtended{
		Format: 1 | disk.LayoutInline<<disk.FormatLayoutShift, Mode: modeDir | 0o755, Size: uint64(len(dirents)), Nlink: 2,
	}), dirents...))
	slot := disk.DeviceSlot{Blocks: uint32(len(data) / block), MappedBlock: 1 << 20}
	entry := disk.BlobEntry{
		ChunkSize: chunkSize, ChunkCount: chunks, Digester: uint32(DigesterSHA256), Features: disk.FeatureTarfs | disk.FeatureCapTOC,
		CompressedSize: uint64(len(data)), UncompressedSize: uint64(len(data)),
	}
	hex.Encode(entry.ID[:], sum[:])
	slot.Tag = entry.ID
	p := make([]byte, meta+disk.BlockSize, 1<<20)
	copy(p[disk.SuperOffset:], appendRecord(nil, &disk.Super{
		Magic: disk.SuperMagic, FeatureCompat: disk.CompatRafsV6, BlockBits: disk.TarfsBlockBits, RootNid: disk.RootNid, Inos: uint64(len(names) + 1),
		Blocks: slot.Blocks, MetaBlock: meta / block, FeatureIncompat: disk.IncompatRequired, ExtraDevices: 1, DeviceSlotOff: disk.DeviceSlotNumber,
	}))
	copy(p[disk.ExtSuperOffset:], appendRecord(nil, &disk.ExtSuper{
		Flags:           disk.FlagCompressNone | disk.FlagHashSHA256 | disk.FlagExplicitIDs | disk.FlagTarfs,
		BlobTableOffset: disk.BlockSize, BlobTableSize: disk.SizeBlobEntry, ChunkSize: chunkSize,
	}))
	copy(p[disk.DeviceSlotOffset:], appendRecord(nil, &slot))
	copy(p[disk.BlockSize:], appendRecord(nil, &entry))
	p = append(p, inodes...)
	return append(p, make([]byte, -len(p)&(disk.BlockSize-1))...), data
}

// TestWriteBlockTarfs writes tarfs images as one raw image: it has the size that is returned, whether the
// tar ends with a whole block of 4096 bytes or not, and no byte of the file is lost.
func TestWriteBlockTarfs(t *testing.T) {
	t.Parallel()
	whole := false
	for n := range 8 { // the tar grows by a block of 512
		content := append(bytes.Repeat([]byte("x"), n*512+511), 'e')
		boot, data := tarfsImage(t, map[string][]byte{"f": content})
		whole = whole || len(data)%disk.BlockSize == 0
		name := filepath.Join(t.TempDir(), "image.erofs")
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		size, err := WriteBlock(t.Context(), f, bytes.NewReader(boot), int64(len(boot)), func(int) (*BlobReader, error) {
			img, err := Open(bytes.NewReader(boot), int64(len(boot)))
			if err != nil {
				return nil, err
			}
			return OpenBlob(bytes.NewReader(data), img.Blobs[0])
		})
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if int64(len(got)) != size || size%disk.BlockSize != 0 {
			t.Errorf("tar of %d bytes: the file has %d bytes, WriteBlock says %d; want the same, a multiple of %d", len(data), len(got), size, disk.BlockSize)
		}
		if !bytes.Contains(got, content) {
			t.Errorf("tar of %d bytes: the file's bytes are not in the image", len(data))
		}
	}
	if !whole {
		t.Error("no tar was a multiple of 4096 bytes")
	}
}

// TestTarfs reads an image whose blob is a plain tar with 512-byte blocks; the kernel says the same of it.
func TestTarfs(t *testing.T) {
	files := map[string][]byte{"empty": {}, "one": []byte("x"), "block": bytes.Repeat([]byte("b"), 512)}
	for i, n := range []int{513, 4096, 70000, 1 << 20, 1<<20 + 1, 3<<20 - 7} {
		p := make([]byte, n)
		for j := range p {
			p[j] = byte(j>>8) ^ byte(j*(i+3))
		}
		files[fmt.Sprintf("f%d", n)] = p
	}
	boot, data := tarfsImage(t, files)
	img, err := Open(bytes.NewReader(boot), int64(len(boot)))
	if err != nil {
		t.Fatal(err)
	}
	fsys := img.FS(func(b Blob) (*BlobReader, error) { return OpenBlob(bytes.NewReader(data), b) })
	for name, want := range files {
		if got, err := fsys.ReadFile(name); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v, want %d", name, len(got), err, len(want))
		}
	}
	check := func(data []byte) error {
		open := func(Blob) (io.ReaderAt, error) { return bytes.NewReader(data), nil }
		_, err := Check(context.Background(), bytes.NewReader(boot), int64(len(boot)), open, CheckOptions{Data: true})
		return err
	}
	if err := check(data); err != nil {
		t.Error(err)
	}
	bad := bytes.Clone(data)
	bad[len(bad)/2] ^= 1
	if err := check(bad); !errors.Is(err, ErrDigest) { // only the blob's id tells: chunks have no digests
		t.Errorf("Check of a changed tar = %v, want ErrDigest", err)
	}
	{ // nothing outside the tar
		boot[disk.BlockSize+96], boot[disk.BlockSize+97], boot[disk.BlockSize+98] = 0, 2, 0
		if img, err := Open(bytes.NewReader(boot), int64(len(boot))); !errors.Is(err, ErrInvalid) || img != nil {
			t.Errorf("Open with a tar of 512 bytes = %v, want ErrInvalid", err)
		}
	}

	boot, _ = tarfsImage(t, files)
	dir := t.TempDir()
	device, file := filepath.Join(dir, "layer.tar"), filepath.Join(dir, "image.boot")
	for name, p := range map[string][]byte{device: data, file: boot} {
		if err := os.WriteFile(name, p, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mounted := os.DirFS(testenv.MountEROFS(t, file, device))
	list, err := fs.ReadDir(mounted, ".")
	if err != nil || len(list) != len(files) {
		t.Fatalf("%d files mounted, %v, want %d", len(list), err, len(files))
	}
	for name, want := range files {
		if got, err := fs.ReadFile(mounted, name); err != nil || !bytes.Equal(got, want) {
			t.Errorf("mounted %s: %d bytes, %v, want %d", name, len(got), err, len(want))
		}
	}
}
