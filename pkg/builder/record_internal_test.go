package builder

import (
	"bytes"
	"errors"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// recordSeed is the record of a tree with every kind of entry.
func recordSeed(f *testing.F) []byte {
	f.Helper()
	t := newTree()
	shared := &rafs.Inode{Mode: 0o100644, Size: 5000, Xattrs: []rafs.Xattr{{Name: "user.a", Value: []byte("1")}}, Chunks: []rafs.Chunk{{Digest: rafs.Digest{1}, CompressedSize: 3, UncompressedSize: 5000}, {Blob: 2}}}
	low := &lowerLink{name: "d/low", target: "gone", attrs: attrs{perm: 0o600, mtime: -5}}
	t.links = append(t.links, low)
	t.shared[shared] = struct{}{}
	d := newDir(inventedDir())
	d.dir.opaque = true
	d.dir.whiteout("w")
	d.dir.put("again", entry{ino: shared})
	d.dir.put("low", entry{link: low})
	t.root.dir.put("d", d)
	t.root.dir.put("s", entry{ino: shared})
	t.root.dir.put("link", entry{ino: &rafs.Inode{Mode: 0o120777, Target: "d", Size: 1}})
	var b bytes.Buffer
	h := recordHeader{Key: "k", DiffID: digest.FromString("x"), Blob: &rafs.Blob{ID: "id"}}
	if err := encodeRecord(&b, h, t, 1); err != nil {
		f.Fatal(err)
	}
	return b.Bytes()
}

// FuzzRecord reads records of anything: what is read writes and reads as the same.
func FuzzRecord(f *testing.F) {
	seed := recordSeed(f)
	plain, err := zstdDecode(seed)
	if err != nil {
		f.Fatal(err)
	}
	d := &dict{blobs: make([]StoredBlob, 3)}
	if _, _, err := decodeRecord(bytes.NewReader(seed), 0, 1, d); err != nil {
		f.Fatal(err)
	}
	f.Add(plain)
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(1<<16))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, plain []byte) {
		h, got, err := decodeRecord(bytes.NewReader(z.EncodeAll(plain, nil)), 0, 1, d)
		if err != nil {
			if !errors.Is(err, ErrInvalid) || got != nil {
				t.Fatalf("%v, %v", got, err)
			}
			return
		}
		var b, again bytes.Buffer
		if err := encodeRecord(&b, h, got, 1); err != nil {
			t.Fatal(err)
		}
		h, got, err = decodeRecord(bytes.NewReader(b.Bytes()), 0, 1, d)
		if err != nil {
			t.Fatal(err)
		}
		if err := encodeRecord(&again, h, got, 1); err != nil || !bytes.Equal(b.Bytes(), again.Bytes()) {
			t.Fatalf("written and read it differs: %v", err)
		}
	})
}

func zstdDecode(b []byte) ([]byte, error) {
	r, err := zstd.NewReader(nil)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return r.DecodeAll(b, nil)
}
