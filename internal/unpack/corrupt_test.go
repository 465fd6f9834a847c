package unpack_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/unpack"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// files are the files of an image in memory; the bootstrap has the name "".
type files map[string][]byte

func loadFiles(t *testing.T, name string) files {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), "nydus", name)
	boot, err := os.ReadFile(filepath.Join(dir, "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	f := files{"": boot}
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs", "*"))
	if err != nil || len(blobs) == 0 {
		t.Fatalf("%d blobs, %v", len(blobs), err)
	}
	for _, b := range blobs {
		if f[filepath.Base(b)], err = os.ReadFile(b); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func (f files) open(b rafs.Blob) (io.ReaderAt, error) {
	p, ok := f[b.ID]
	if !ok {
		return nil, fmt.Errorf("blob %q: %w", b.ID, os.ErrNotExist)
	}
	return bytes.NewReader(p), nil
}

// tar unpacks the image.
func (f files) tar(ctx context.Context) ([]byte, error) {
	img, err := rafs.OpenStrict(bytes.NewReader(f[""]), int64(len(f[""])))
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	readers := make([]*rafs.BlobReader, len(img.Blobs))
	read := func(ctx context.Context, c rafs.Chunk, buf *rafs.ChunkBuffer) error {
		mu.Lock()
		if int(c.Blob) >= len(readers) {
			mu.Unlock()
			return errors.New("a chunk of no blob")
		}
		r := readers[c.Blob]
		if r == nil {
			var err error
			if r, err = rafs.OpenBlobFrom(f.open, img.Blobs[c.Blob]); err != nil {
				mu.Unlock()
				return err
			}
			readers[c.Blob] = r
		}
		mu.Unlock()
		return r.ReadInto(ctx, c, buf)
	}
	var b bytes.Buffer
	if _, err := unpack.Tar(ctx, unpack.Source{Image: img, Read: read}, &b); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// check checks the image with all its data.
func (f files) check(ctx context.Context) error {
	_, err := rafs.Check(ctx, bytes.NewReader(f[""]), int64(len(f[""])), f.open, rafs.CheckOptions{Data: true, Workers: 1})
	return err
}

// corrupt returns a copy of f in which one file has a fault such as disks, networks and people make.
func (f files) corrupt(r *rand.Rand, names []string) (files, string) {
	out := maps.Clone(f)
	name := names[r.IntN(len(names))]
	p := bytes.Clone(f[name])
	at := r.IntN(len(p))
	what := ""
	switch kind := r.IntN(6); kind {
	case 0, 1:
		bit := r.UintN(8)
		p[at] ^= 1 << bit
		what = fmt.Sprintf("bit %d of byte %#x flipped", bit, at)
	case 2:
		old := p[at]
		p[at] = byte(r.Uint32())
		what = fmt.Sprintf("byte %#x: %#x instead of %#x", at, p[at], old)
	case 3:
		n := min(1<<r.UintN(13), len(p)-at)
		clear(p[at : at+n])
		what = fmt.Sprintf("%d bytes from %#x zeroed", n, at)
	case 4:
		n := min(1<<r.UintN(10), len(p)-at)
		from := r.IntN(len(p) - n + 1)
		copy(p[at:at+n], bytes.Clone(p[from:from+n]))
		what = fmt.Sprintf("%d bytes from %#x instead of those at %#x", n, from, at)
	default:
		p = p[:at]
		what = fmt.Sprintf("cut after %#x bytes", at)
	}
	out[name] = p
	return out, fmt.Sprintf("%q: %s", name, what)
}

// TestCorruptionsThatUnpack corrupts images of the real nydus-image at random. What Check refuses may be
// unpacked all the same, when the fault is in bytes that unpacking does not need; the tree is the right one then.
func TestCorruptionsThatUnpack(t *testing.T) {
	t.Parallel()
	dirs, err := filepath.Glob(filepath.Join(testenv.Fixtures(t), "nydus", "*"))
	if err != nil || len(dirs) < 6 {
		t.Fatalf("%d fixtures, %v", len(dirs), err)
	}
	trials := 60
	if testing.Short() {
		trials = 15
	}
	for i, dir := range dirs {
		name := filepath.Base(dir)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			good := loadFiles(t, name)
			want, err := good.tar(t.Context())
			if err == nil {
				err = good.check(t.Context())
			}
			if err != nil {
				t.Fatal(err)
			}
			names := append([]string{"", ""}, slices.Sorted(maps.Keys(good))...) // mostly the bootstrap
			r := rand.New(rand.NewPCG(uint64(i), 150))
			var refused, silent, accepted int
			for range trials {
				bad, what := good.corrupt(r, names)
				if bad.check(t.Context()) == nil {
					// Nothing but a digest of the whole would tell a bit of a name or mode from another.
					if got, err := bad.tar(t.Context()); err != nil || bytes.Equal(bad[""], good[""]) && !bytes.Equal(got, want) {
						t.Errorf("%s: Check finds nothing, and Tar fails or gives another tree: %v", what, err)
					}
					silent++
					continue
				}
				got, err := bad.tar(t.Context())
				if err != nil {
					refused++
					continue
				}
				accepted++
				if !bytes.Equal(got, want) {
					t.Errorf("%s: Check refuses it (%v), and Tar gives another tree", what, bad.check(t.Context()))
				}
			}
			t.Logf("of %d: both refuse %d, only Check %d, neither %d", trials, refused, accepted, silent)
		})
	}
}

// TestNameOfAnotherFile has a directory entry name another file of the image. A reader has no objection, and the
// tree is wrong; the link counts tell.
func TestNameOfAnotherFile(t *testing.T) {
	t.Parallel()
	for _, name := range variants {
		bad := loadFiles(t, name)
		boot := bytes.Clone(bad[""])
		bad[""] = boot
		// A dirent of EROFS: nid of 8 bytes, offset of the name, type (1: regular file), 0.
		const size, regular = 12, 1
		file := func(at int) bool {
			return boot[at+10] == regular && boot[at+11] == 0 && bytes.Equal(boot[at+3:at+8], make([]byte, 5))
		}
		at := 0x1000
		for ; at+2*size < len(boot); at += 4 {
			next := at + size
			if a, b := binary.LittleEndian.Uint16(boot[at+8:]), binary.LittleEndian.Uint16(boot[next+8:]); file(at) && file(next) && a < b && b < a+256 {
				break
			}
		}
		copy(boot[at:at+8], boot[at+size:at+size+8])
		if _, err := rafs.Open(bytes.NewReader(boot), int64(len(boot))); err != nil {
			t.Errorf("%s: bytes %#x: Open = %v, want no error: this tests something else", name, at, err)
		}
		if got, err := bad.tar(t.Context()); !errors.Is(err, rafs.ErrInvalid) || !strings.Contains(fmt.Sprint(err), "nlink") {
			t.Errorf("%s: bytes %#x: Tar = %d bytes, %v, want ErrInvalid and the link counts", name, at, len(got), err)
		}
	}
}
