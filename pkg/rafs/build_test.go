package rafs_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// combo is one way to make an image.
type combo struct {
	compressor rafs.Compressor
	digester   rafs.Digester
	chunkSize  uint32
	toc        bool
	level      rafs.Level
	acl        bool // with POSIX ACLs, which nydus-image 2.2.0 refuses to read
	v2         bool
	batch      uint32 // batch size, which nydus 2.2.0 refuses too
}

func (c combo) String() string {
	s := fmt.Sprintf("%v-%v-%d-toc=%v-%v", c.compressor, c.digester, c.chunkSize, c.toc, c.level)
	if c.v2 {
		s += "-v2"
	}
	if c.batch > 0 {
		s += fmt.Sprintf("-batch=%d", c.batch)
	}
	return s
}

func (c combo) blobOptions(v rafs.Version) rafs.BlobOptions {
	return rafs.BlobOptions{
		Version: v, Compressor: c.compressor, Digester: c.digester, ChunkSize: c.chunkSize,
		TOC: c.toc && v != rafs.V5, ChunkInfoV2: c.v2, BatchSize: c.batch, BatchLevel: c.level,
	}
}

// imageBuilder makes images in memory, as the builder does but simpler.
type imageBuilder struct {
	t     testing.TB
	o     combo
	enc   *rafs.Encoder
	img   *rafs.Image
	files [][]fileToStore // by blob
}

type fileToStore struct {
	inode   *rafs.Inode
	content []byte
}

func newBuilder(t testing.TB, o combo) *imageBuilder {
	enc, err := rafs.NewEncoder(o.compressor, o.level)
	must(t, err)
	return &imageBuilder{t: t, o: o, enc: enc, img: &rafs.Image{
		Root: &rafs.Inode{Mode: unix.S_IFDIR | 0o755}, ChunkSize: o.chunkSize, Compressor: o.compressor, Digester: o.digester,
	}}
}

// add puts an inode at a path whose parents exist.
func (b *imageBuilder) add(path string, ino *rafs.Inode) *rafs.Inode {
	dir, name := b.img.Root, path
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		dir, name = b.img.Lookup(path[:i]), path[i+1:]
	}
	if dir == nil {
		b.t.Fatalf("no directory for %q", path)
	}
	insert(dir, name, ino)
	return ino
}

func insert(dir *rafs.Inode, name string, ino *rafs.Inode) {
	i, ok := slices.BinarySearchFunc(dir.Children, name, func(d rafs.Dirent, n string) int { return strings.Compare(d.Name, n) })
	if ok {
		return
	}
	dir.Children = slices.Insert(dir.Children, i, rafs.Dirent{Name: name, Inode: ino})
}

func (b *imageBuilder) file(path string, blob int, content []byte) *rafs.Inode {
	ino := b.add(path, &rafs.Inode{Mode: unix.S_IFREG | 0o644, Mtime: 1700000000})
	b.fill(ino, blob, content)
	return ino
}

func (b *imageBuilder) fill(ino *rafs.Inode, blob int, content []byte) {
	ino.Size = uint64(len(content))
	for len(b.files) <= blob {
		b.files = append(b.files, nil)
	}
	b.files[blob] = append(b.files[blob], fileToStore{ino, content})
}

// build writes blobs and bootstrap.
func (b *imageBuilder) build() *stored {
	s := &stored{blobs: map[string][]byte{}}
	for _, files := range b.files {
		var out bytes.Buffer
		w, err := rafs.NewBlobWriter(&out, b.o.blobOptions(b.img.Version))
		must(b.t, err)
		index := uint16(len(b.img.Blobs))
		for _, f := range files {
			for p := range slices.Chunk(f.content, int(b.o.chunkSize)) {
				data, compressed, err := b.enc.Encode(nil, p)
				must(b.t, err)
				if w.Batches(uint32(len(p))) {
					data, compressed = p, false
				}
				c, err := w.Append(rafs.EncodedChunk{Digest: b.o.digester.Sum(p), Data: data, Compressed: compressed, UncompressedSize: uint32(len(p))})
				must(b.t, err)
				c.Blob = index
				f.inode.Chunks = append(f.inode.Chunks, c)
			}
		}
		blob, err := w.Close()
		if err != nil && len(out.Bytes()) == 0 {
			continue // no chunks
		}
		must(b.t, err)
		if _, ok := s.blobs[blob.ID]; ok {
			b.t.Fatal("two equal blobs")
		}
		b.img.Blobs = append(b.img.Blobs, blob)
		s.blobs[blob.ID] = out.Bytes()
	}
	var out bytes.Buffer
	info, err := rafs.WriteBootstrap(&out, b.img)
	must(b.t, err)
	if info.Size != int64(out.Len()) {
		b.t.Errorf("WriteBootstrap says %d bytes and wrote %d", info.Size, out.Len())
	}
	s.bootstrap = out.Bytes()
	return s
}

// content makes n bytes of one of several kinds.
func content(r *rand.Rand, n int) []byte {
	p := make([]byte, n)
	switch r.IntN(4) {
	case 0: // zeros
	case 1: // incompressible
		for i := range p {
			p[i] = byte(r.Uint32())
		}
	case 2: // words
		words := []string{"alpha ", "beta ", "gamma\n", "delta ", "epsilon "}
		for i := 0; i < n; {
			i += copy(p[i:], words[r.IntN(len(words))])
		}
	default: // zeros with islands
		for range n/5000 + 1 {
			if n > 0 {
				p[r.IntN(n)] = byte(r.Uint32())
			}
		}
	}
	return p
}

// posixACL is a valid value of system.posix_acl_access: u::rwx, u:7:r--, g::r-x, m::r-x, o::r--.
const posixACL = "\x02\x00\x00\x00" +
	"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\x07\x00\x00\x00" + "\x04\x00\x05\x00\xff\xff\xff\xff" +
	"\x10\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x04\x00\xff\xff\xff\xff"

func randomXattrs(r *rand.Rand, mode uint32, acl bool) []rafs.Xattr {
	var list []rafs.Xattr
	plain := mode&unix.S_IFMT == unix.S_IFREG || mode&unix.S_IFMT == unix.S_IFDIR
	for i := range r.IntN(5) {
		prefix := []string{"trusted.", "security.", "user."}[r.IntN(3)]
		if prefix == "user." && !plain {
			prefix = "trusted."
		}
		list = append(list, rafs.Xattr{Name: fmt.Sprintf("%sn%d%s", prefix, i, strings.Repeat("x", r.IntN(30))), Value: content(r, r.IntN(200))})
	}
	if acl && plain && r.IntN(3) == 0 {
		list = append(list, rafs.Xattr{Name: "system.posix_acl_access", Value: []byte(posixACL)})
	}
	if acl && mode&unix.S_IFMT == unix.S_IFDIR && r.IntN(3) == 0 {
		list = append(list, rafs.Xattr{Name: "system.posix_acl_default", Value: []byte(posixACL)})
	}
	if r.IntN(8) == 0 { // the inode cannot share its block any more
		list = append(list, rafs.Xattr{Name: "trusted.big", Value: content(r, 3000+r.IntN(9000))})
	}
	return list
}

var randomTimes = []int64{0, 1, -1, -2208988800, 1700000000, 1<<31 - 1, 1 << 31, 1 << 33, 1<<34 + 7}

func randomName(r *rand.Rand) string {
	alphabet := []string{"a", "b", "Z", ".", "-", "!", "+", "~", " ", "\n", "\\", "é", "文", "\x01", "\xff", "0"}
	for {
		var b strings.Builder
		n := 1 + r.IntN(12)
		if r.IntN(20) == 0 {
			n = 300
		}
		for range n {
			b.WriteString(alphabet[r.IntN(len(alphabet))])
		}
		s := b.String()
		if len(s) > rafs.MaxName {
			s = s[:rafs.MaxName]
		}
		if s != "." && s != ".." {
			return s
		}
	}
}

// randomImage makes a tree that has every type of file and every awkward size.
func randomImage(t testing.TB, seed uint64, o combo) *imageBuilder {
	r := rand.New(rand.NewPCG(seed, 1))
	b := newBuilder(t, o)
	attributes := func(ino *rafs.Inode) *rafs.Inode {
		ino.UID, ino.GID = r.Uint32()>>(r.Uint32()%32), r.Uint32()>>(r.Uint32()%32)
		ino.Mtime, ino.MtimeNsec = randomTimes[r.IntN(len(randomTimes))], r.Uint32()%1e9
		if r.IntN(3) == 0 {
			ino.Xattrs = randomXattrs(r, ino.Mode, o.acl)
		}
		return ino
	}
	attributes(b.img.Root)
	dirs, files := []*rafs.Inode{b.img.Root}, []*rafs.Inode{}
	unit := int(o.chunkSize)
	sizes := []int{0, 1, 100, 4095, 4096, 4097, unit - 1, unit, unit + 1, 2*unit - 1, 2 * unit, 2*unit + 1, 3*unit + 17}
	big := 0
	for i := range 150 {
		dir := dirs[r.IntN(len(dirs))]
		if i%7 == 0 {
			dir = dirs[len(dirs)-1] // some depth
		}
		perm := r.Uint32() & 0o7777
		switch kind := r.IntN(12); kind {
		case 0, 1, 2:
			d := attributes(&rafs.Inode{Mode: unix.S_IFDIR | perm})
			insert(dir, randomName(r), d)
			if dir.Children != nil {
				dirs = append(dirs, d)
			}
		case 3:
			n := []int{1, 7, 60, 255, 1000, 3950, 4031, 4032, 4033, 4095}[r.IntN(10)]
			target := strings.Repeat("t/", n)[:n]
			insert(dir, randomName(r), attributes(&rafs.Inode{Mode: unix.S_IFLNK | 0o777, Target: target, Size: uint64(n)}))
		case 4:
			kinds := []uint32{unix.S_IFCHR, unix.S_IFBLK}
			insert(dir, randomName(r), attributes(&rafs.Inode{Mode: kinds[r.IntN(2)] | perm, Rdev: rafs.EncodeDevice(r.Uint32()%4096, r.Uint32()%(1<<20))}))
		case 5:
			kinds := []uint32{unix.S_IFIFO, unix.S_IFSOCK}
			insert(dir, randomName(r), attributes(&rafs.Inode{Mode: kinds[r.IntN(2)] | perm}))
		case 6:
			if len(files) > 0 {
				insert(dir, randomName(r), files[r.IntN(len(files))])
			}
		default:
			n := sizes[r.IntN(len(sizes))]
			if big += n; unit > 1<<20 && n > 1<<20 && big > 4*unit {
				n = unit / 1000
			}
			f := attributes(&rafs.Inode{Mode: unix.S_IFREG | perm})
			before := len(dir.Children)
			insert(dir, randomName(r), f)
			if len(dir.Children) > before {
				b.fill(f, r.IntN(3), content(r, n))
				files = append(files, f)
			}
		}
	}
	// A directory of several blocks, one of exactly a block and one entry more.
	for _, count := range []int{1500, 100} {
		d := attributes(&rafs.Inode{Mode: unix.S_IFDIR | 0o700})
		insert(b.img.Root, fmt.Sprintf("many%d", count), d)
		for i := range count {
			insert(d, fmt.Sprintf("entry-%05d%s", i, strings.Repeat("n", i%60)), attributes(&rafs.Inode{Mode: unix.S_IFREG | 0o600}))
		}
	}
	for _, f := range files {
		if r.IntN(3) == 0 {
			b.img.Prefetch = append(b.img.Prefetch, f)
		}
	}
	return b
}
