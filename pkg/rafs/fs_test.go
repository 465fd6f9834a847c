package rafs_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"testing/iotest"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// smallImage has a file of several chunks, links and directories.
func smallImage(t testing.TB, o combo) (*imageBuilder, map[string][]byte) {
	b := newBuilder(t, o)
	b.add("dir", &rafs.Inode{Mode: unix.S_IFDIR | 0o755})
	b.add("dir/sub", &rafs.Inode{Mode: unix.S_IFDIR | 0o700})
	r := rand.New(rand.NewPCG(7, 7))
	files := map[string][]byte{
		"empty":      {},
		"dir/one":    []byte("x"),
		"dir/chunk":  content(r, int(o.chunkSize)),
		"dir/sub/3":  content(r, 2*int(o.chunkSize)+5),
		"dir/zeros":  make([]byte, int(o.chunkSize)+1),
		"dir/random": randomBytes(r, 2*int(o.chunkSize)+1),
	}
	for _, name := range []string{"empty", "dir/one", "dir/chunk", "dir/sub/3", "dir/zeros", "dir/random"} {
		b.file(name, 0, files[name])
	}
	b.add("link", &rafs.Inode{Mode: unix.S_IFLNK | 0o777, Target: "dir/one"})
	b.add("dir/absolute", &rafs.Inode{Mode: unix.S_IFLNK | 0o777, Target: "/dir/sub"})
	b.add("dir/up", &rafs.Inode{Mode: unix.S_IFLNK | 0o777, Target: "../../../dir/one"})
	return b, files
}

func randomBytes(r *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}

var smallCombo = combo{compressor: rafs.CompressorZstd, chunkSize: 4096}

func TestFS(t *testing.T) {
	t.Parallel()
	b, files := smallImage(t, smallCombo)
	s := b.build()
	fsys := s.open(t).FS(s.reader)
	names := []string{"dir/sub/3", "dir/absolute", "link"}
	for name := range files {
		names = append(names, name)
	}
	if err := fstest.TestFS(fsys, names...); err != nil {
		t.Error(err)
	}
	for name, want := range files {
		got, err := fs.ReadFile(fsys, name)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("ReadFile(%s) = %d bytes, %v, want %d", name, len(got), err, len(want))
		}
		f, err := fsys.Open(name)
		must(t, err)
		if err := iotest.TestReader(f, want); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		must(t, f.Close())
		must(t, f.Close())
		if _, err := f.Read(make([]byte, 1)); len(want) > 0 && !errors.Is(err, fs.ErrClosed) {
			t.Errorf("Read of closed %s = %v, want ErrClosed", name, err)
		}
	}
}

func TestFSFollowsLinksInsideTheImage(t *testing.T) {
	t.Parallel()
	b, _ := smallImage(t, smallCombo)
	b.add("loop", &rafs.Inode{Mode: unix.S_IFLNK | 0o777, Target: "loop"})
	b.add("dangling", &rafs.Inode{Mode: unix.S_IFLNK | 0o777, Target: "/nowhere"})
	s := b.build()
	fsys := s.open(t).FS(s.reader)
	for _, name := range []string{"link", "dir/up"} {
		if got, err := fs.ReadFile(fsys, name); err != nil || string(got) != "x" {
			t.Errorf("ReadFile(%s) = %q, %v, want x", name, got, err)
		}
	}
	if got, err := fs.ReadFile(fsys, "dir/absolute/3"); err != nil || len(got) != 2*4096+5 {
		t.Errorf("ReadFile through an absolute link = %d bytes, %v", len(got), err)
	}
	if _, err := fsys.Stat("loop"); err == nil || !strings.Contains(err.Error(), "too many levels") {
		t.Errorf("Stat(loop) = %v, want too many levels", err)
	}
	if _, err := fsys.Stat("dangling"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Stat(dangling) = %v, want ErrNotExist", err)
	}
	if target, err := fsys.ReadLink("dangling"); err != nil || target != "/nowhere" {
		t.Errorf("ReadLink(dangling) = %q, %v", target, err)
	}
	for _, name := range []string{"dir/one/x", "link/x", "", "/dir", "dir/../dir", "dir/none"} {
		if _, err := fsys.Open(name); err == nil {
			t.Errorf("Open(%q) succeeded", name)
		}
	}
}

func TestFSConcurrentReadAt(t *testing.T) {
	t.Parallel()
	b, files := smallImage(t, smallCombo)
	s := b.build()
	f, err := s.open(t).FS(s.reader).Open("dir/random")
	must(t, err)
	want := files["dir/random"]
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 0))
			for range 200 {
				at := r.IntN(len(want))
				p := make([]byte, r.IntN(6000))
				n, err := f.(io.ReaderAt).ReadAt(p, int64(at))
				if n < len(p) && !errors.Is(err, io.EOF) || !bytes.Equal(p[:n], want[at:at+n]) {
					t.Errorf("ReadAt(%d at %d) = %d, %v", len(p), at, n, err)
				}
			}
		})
	}
	wg.Wait()
	must(t, f.Close())
}

func TestFSWithoutBlobs(t *testing.T) {
	t.Parallel()
	b, _ := smallImage(t, smallCombo)
	s := b.build()
	fsys := s.open(t).FS(nil)
	if _, err := fs.ReadFile(fsys, "dir/one"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ReadFile without blobs = %v, want ErrNotExist", err)
	}
	info, err := fsys.Stat("dir/one")
	must(t, err)
	if ino, ok := info.Sys().(*rafs.Inode); !ok || ino.Size != 1 || len(ino.Chunks) != 1 {
		t.Errorf("Sys() = %+v", info.Sys())
	}
}
