package rafs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestRandomImagesV5 writes a tree of everything in each way and asks our reader and nydus-image 2.2.0.
func TestRandomImagesV5(t *testing.T) {
	for i, o := range combos {
		if o.v2 || o.batch > 0 {
			continue // v6 only
		}
		if raceEnabled && i%4 != 0 {
			continue
		}
		t.Run(o.String(), func(t *testing.T) {
			b := randomImage(t, uint64(500+i), o)
			b.img.Version = rafs.V5
			s := b.build()
			img := s.open(t)
			if img.Version != rafs.V5 {
				t.Fatalf("Open gives version %v", img.Version)
			}
			want := flatten(t, b.img, b.img.FS(s.reader))
			diff(t, "tree read back", flatten(t, img, img.FS(s.reader)), want)
			if got, want := len(img.Prefetch), len(b.img.Prefetch); got != want || got == 0 {
				t.Errorf("%d prefetch entries, want %d", got, want)
			}
			features := uint32(0x4000_0000)
			if o.compressor == rafs.CompressorGzip {
				features |= 0x4 // else nydusd takes the blob for an old stargz one
			}
			for i, b := range img.Blobs {
				if end := lastChunkEnd(img, i); b.UncompressedSize < end || b.Features != features || b.MetaUncompressed != 0 {
					t.Errorf("blob %d = %+v, want one of at least %d uncompressed bytes and features %#x", i, b, end, features)
				}
			}
			if _, err := s.check(rafs.CheckOptions{Data: true}); err != nil {
				t.Error(err)
			}
			var again bytes.Buffer
			_, err := rafs.WriteBootstrap(&again, img)
			must(t, err)
			if !bytes.Equal(again.Bytes(), s.bootstrap) {
				t.Error("an opened image writes other bytes than it was read from")
			}
			t.Run("nydus-image", func(t *testing.T) {
				if o.acl {
					t.Skip("nydus-image 2.2.0 refuses every image with a POSIX ACL: its prefix test wants longer names")
				}
				s.checkNydus(t)
			})
		})
	}
}

// lastChunkEnd is where the last chunk of a blob ends in its cache file.
func lastChunkEnd(img *rafs.Image, blob int) (end uint64) {
	for _, c := range img.BlobChunks(blob) {
		end = max(end, c.UncompressedOffset+uint64(c.UncompressedSize))
	}
	return end
}

// TestFixtureRewriteV5 holds that our bootstrap is upstream's byte for byte, but for the CRCs of chunks, the order of
// xattrs and the device numbers that files which are none have there.
func TestFixtureRewriteV5(t *testing.T) {
	t.Parallel()
	for _, name := range v5Fixtures {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := loadFixture(t, name)
			again := rewritten(t, s)
			again.checkNydus(t)
			sameBytesV5(t, again.bootstrap, s.bootstrap)
		})
	}
}

func sameBytesV5(t *testing.T, got, want []byte) {
	t.Helper()
	got, want = normalV5(got), normalV5(want)
	if len(got) != len(want) {
		t.Fatalf("%d bytes, want %d", len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %d is %#x, want %#x", i, got[i], want[i])
		}
	}
}

// normalV5 returns a bootstrap without what may differ, found by the offsets of rafs-format.md.
func normalV5(p []byte) []byte {
	p = bytes.Clone(p)
	le := binary.LittleEndian
	pad := func(n int) int { return (n + 7) &^ 7 }
	for i := range int(le.Uint32(p[56:])) {
		r := p[le.Uint32(p[8192+4*i:])<<3:]
		mode := le.Uint32(r[60:])
		if kind := mode & unix.S_IFMT; kind != unix.S_IFCHR && kind != unix.S_IFBLK {
			le.PutUint32(r[104:], 0)
		}
		at := 128 + pad(int(le.Uint16(r[100:]))) + pad(int(le.Uint16(r[102:])))
		if r[80]&4 != 0 {
			n := int(le.Uint64(r[at:]))
			slices.Sort(r[at+8 : at+8+n])
			at += 8 + pad(n)
		}
		for j := range int(le.Uint32(r[96:])) {
			if mode&unix.S_IFMT == unix.S_IFREG {
				r[at+80*j+36] &^= 0x10
				le.PutUint32(r[at+80*j+76:], 0)
			}
		}
	}
	return p
}

// unpackNydus lets nydus-image 2.2.0 unpack an image of one blob into a tar.
func (s *stored) unpackNydus(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	bootstrap, blobDir, _ := s.write(t, dir)
	img := s.open(t)
	output := filepath.Join(dir, "out.tar")
	args := []string{"unpack", "--bootstrap", bootstrap, "--output", output}
	if len(img.Blobs) > 0 {
		args = append(args, "--blob", filepath.Join(blobDir, img.Blobs[0].ID))
	}
	if out, err := exec.Command(testenv.Tool(t, "nydus-image"), args...).CombinedOutput(); err != nil {
		t.Errorf("nydus-image unpack: %v\n%s", err, out)
	}
	if _, err := os.Stat(output); err != nil {
		t.Error(err)
	}
	return output
}

// TestV6ToV5 writes v5 bootstraps over the blobs of v6 images: the same tree for our reader and for both real tools.
func TestV6ToV5(t *testing.T) {
	for i, o := range []combo{
		{compressor: rafs.CompressorZstd, chunkSize: 1 << 20},
		{compressor: rafs.CompressorLZ4, chunkSize: 64 << 10, digester: rafs.DigesterSHA256, toc: true},
		{compressor: rafs.CompressorNone, chunkSize: 4096},
	} {
		if raceEnabled && i > 0 {
			break
		}
		t.Run(o.String(), func(t *testing.T) {
			six := randomImage(t, uint64(700+i), o).build()
			img := six.open(t)
			want := flatten(t, img, img.FS(six.reader))
			img.Version = rafs.V5
			var out bytes.Buffer
			_, err := rafs.WriteBootstrap(&out, img)
			must(t, err)
			five := &stored{bootstrap: out.Bytes(), blobs: six.blobs}
			if _, err := five.check(rafs.CheckOptions{Data: true}); err != nil {
				t.Error(err)
			}
			again := five.open(t)
			diff(t, "v5 tree", flatten(t, again, again.FS(five.reader)), want)
			five.checkNydus(t)
			five.compareNydusd(t)
			again.Version = rafs.V6
			if _, err := rafs.WriteBootstrap(discard{}, again); !errors.Is(err, rafs.ErrInvalid) {
				t.Errorf("WriteBootstrap of v5 blobs as v6 = %v, want ErrInvalid: they have no blob.meta", err)
			}
		})
	}
	t.Run("batch", func(t *testing.T) {
		img := loadFixture(t, "v6-zstd-batch").open(t)
		img.Version = rafs.V5
		if _, err := rafs.WriteBootstrap(discard{}, img); !errors.Is(err, rafs.ErrUnsupported) {
			t.Errorf("WriteBootstrap = %v, want ErrUnsupported", err)
		}
	})
}

// TestUnpackNydusV5 lets nydus-image 2.2.0 unpack images of one blob, which is what its unpack can do, and compares the tar.
func TestUnpackNydusV5(t *testing.T) {
	testenv.Root(t)
	for _, o := range []combo{{compressor: rafs.CompressorZstd, chunkSize: 4096}, {compressor: rafs.CompressorLZ4, chunkSize: 1 << 20, digester: rafs.DigesterSHA256}} {
		t.Run(o.String(), func(t *testing.T) {
			b, files := smallImage(t, o)
			b.img.Version = rafs.V5
			hard := b.img.Lookup("dir/one")
			insert(b.img.Root, "zz-hard", hard)
			b.add("fifo", &rafs.Inode{Mode: unix.S_IFIFO | 0o600, Mtime: 7})
			s := b.build()
			dir := t.TempDir()
			if out, err := exec.Command("tar", "-C", dir, "-xpf", s.unpackNydus(t)).CombinedOutput(); err != nil {
				t.Fatalf("tar: %v\n%s", err, out)
			}
			for name, want := range files {
				if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
				}
			}
			if got, err := os.Readlink(filepath.Join(dir, "dir/absolute")); err != nil || got != "/dir/sub" {
				t.Errorf("dir/absolute -> %q, %v", got, err)
			}
			if got, err := os.ReadFile(filepath.Join(dir, "zz-hard")); err != nil || string(got) != "x" {
				t.Errorf("zz-hard holds %q, %v", got, err)
			}
			out, err := exec.Command(testenv.Tool(t, "nydus-image"), "inspect", "--bootstrap", writeFile(t, s.bootstrap), "--request", "stats").CombinedOutput()
			if err != nil || !bytes.Contains(out, []byte(`{"inodes_count":13}`)) {
				t.Errorf("nydus-image inspect: %v\n%s", err, out)
			}
		})
	}
}

func writeFile(t *testing.T, p []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image.boot")
	must(t, os.WriteFile(name, p, 0o600))
	return name
}

// TestMergeNydusV5 lets nydus-image 2.2.0 merge two of our v5 bootstraps, and reads what comes out.
func TestMergeNydusV5(t *testing.T) {
	layer := func(fill func(b *imageBuilder)) *stored {
		b := newBuilder(t, combo{compressor: rafs.CompressorZstd, chunkSize: 4096})
		b.img.Version = rafs.V5
		fill(b)
		return b.build()
	}
	lower := layer(func(b *imageBuilder) {
		b.add("d", &rafs.Inode{Mode: unix.S_IFDIR | 0o755})
		f := b.file("d/one", 0, bytes.Repeat([]byte("low"), 3000))
		insert(b.img.Root, "link", f)
		b.file("gone", 0, []byte("gone"))
	})
	upper := layer(func(b *imageBuilder) {
		b.add("d", &rafs.Inode{Mode: unix.S_IFDIR | 0o700})
		b.file("d/two", 0, bytes.Repeat([]byte("high"), 3000))
		b.add(".wh.gone", &rafs.Inode{Mode: unix.S_IFREG | 0o644})
	})
	dir := t.TempDir()
	args := []string{"merge", "--bootstrap", filepath.Join(dir, "merged")}
	merged := &stored{blobs: map[string][]byte{}}
	for i, s := range []*stored{lower, upper} {
		name := filepath.Join(dir, s.open(t).Blobs[0].ID)
		must(t, os.WriteFile(name, s.bootstrap, 0o600))
		args = append(args, name)
		maps.Copy(merged.blobs, s.blobs)
		if len(merged.blobs) != i+1 {
			t.Fatal("the layers have the same blob")
		}
	}
	if out, err := exec.Command(testenv.Tool(t, "nydus-image"), args...).CombinedOutput(); err != nil {
		t.Fatalf("nydus-image merge: %v\n%s", err, out)
	}
	var err error
	merged.bootstrap, err = os.ReadFile(filepath.Join(dir, "merged"))
	must(t, err)
	if _, err := merged.check(rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	img := merged.open(t)
	for path, want := range map[string]string{"d/one": strings.Repeat("low", 3000), "link": strings.Repeat("low", 3000), "d/two": strings.Repeat("high", 3000)} {
		var p bytes.Buffer
		if ino := img.Lookup(path); ino == nil || img.FS(merged.reader).CopyFile(t.Context(), &p, ino) != nil || p.String() != want {
			t.Errorf("%s holds %d bytes, want %d", path, p.Len(), len(want))
		}
	}
	if img.Lookup("gone") != nil || img.Lookup("link") != img.Lookup("d/one") || img.Version != rafs.V5 {
		t.Error("the whiteout, the hard link or the version is lost")
	}
}

// TestReadNydusImageV5 opens and checks v5 images of nydus-image 2.2.0 and compares them with their source.
func TestReadNydusImageV5(t *testing.T) {
	testenv.Root(t)
	nydus := testenv.Tool(t, "nydus-image")
	source := sourceTree(t)
	for _, args := range [][]string{
		{},
		{"--compressor", "lz4_block", "--digester", "sha256"},
		{"--compressor", "none", "--chunk-size", "0x10000", "--aligned-chunk"},
		{"--chunk-size", "0x1000", "--prefetch-policy", "blob"},
		{"--chunk-size", "0x1000000", "--prefetch-policy", "fs"},
		{"--blob-inline-meta"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			s := runNydus(t, nydus, source, append(slices.Clone(args), "--fs-version", "5"))
			if _, err := s.check(rafs.CheckOptions{Data: true}); err != nil {
				t.Error(err)
			}
			img := s.open(t)
			got := flatten(t, img, img.FS(s.reader))
			want := flattenDir(t, source, got)
			got[0].Mtime, got[0].Nsec = want[0].Mtime, want[0].Nsec // nydus-image forces the root's to 0
			diff(t, "tree", got, want)
			var out bytes.Buffer
			_, err := rafs.WriteBootstrap(&out, img)
			must(t, err)
			again := &stored{bootstrap: out.Bytes(), blobs: s.blobs}
			if err := again.sole(rafs.CheckOptions{Data: true}); err != nil {
				t.Error(err)
			}
			again.checkNydus(t)
		})
	}
}
