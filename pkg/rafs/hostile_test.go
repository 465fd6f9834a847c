package rafs_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// openErr opens changed bytes, and checks that failure leaves nothing behind.
func openErr(t testing.TB, p []byte) error {
	t.Helper()
	img, err := rafs.Open(bytes.NewReader(p), int64(len(p)))
	if err == nil {
		return nil
	}
	if img != nil {
		t.Error("Open returns an image beside an error")
	}
	if !errors.Is(err, rafs.ErrInvalid) && !errors.Is(err, rafs.ErrUnsupported) {
		t.Errorf("Open = %v: neither ErrInvalid nor ErrUnsupported", err)
	}
	return err
}

// TestOpenRefuses changes one field of a good image at a time. Places are those of rafs-format, sections 1.2 to 1.8.
func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	b, _ := smallImage(t, smallCombo)
	b.img.Prefetch = []*rafs.Inode{b.img.Lookup("dir/one")}
	good := b.build().bootstrap
	must(t, openErr(t, good))
	u16, u32, u64 := binary.LittleEndian.PutUint16, binary.LittleEndian.PutUint32, binary.LittleEndian.PutUint64
	meta := int(binary.LittleEndian.Uint32(good[1064:])) * 4096
	chunks := int(binary.LittleEndian.Uint64(good[1176:]))
	root := meta + 4096
	blobs, prefetch := 4096, 4096+256
	for name, c := range map[string]struct {
		want   string // part of the message
		change func(p []byte)
	}{
		"magic":                   {"magic", func(p []byte) { p[1024]++ }},
		"checksum":                {"checksum", func(p []byte) { p[1028]++ }},
		"no rafs bit":             {"feature_compat", func(p []byte) { u32(p[1032:], 1) }},
		"block bits 13":           {"blkszbits", func(p []byte) { p[1036] = 13 }},
		"block bits 9":            {"tarfs", func(p []byte) { p[1036] = 9 }},
		"extslots":                {"sb_extslots", func(p []byte) { p[1037] = 1 }},
		"root nid 0":              {"root", func(p []byte) { u16(p[1038:], 0) }},
		"root nid far":            {"root", func(p []byte) { u16(p[1038:], 65535) }},
		"inos":                    {"inos", func(p []byte) { u64(p[1040:], 0) }},
		"meta block":              {"meta_blkaddr", func(p []byte) { u32(p[1064:], 1<<31) }},
		"xattr block":             {"xattr_blkaddr", func(p []byte) { p[1068] = 1 }},
		"incompat":                {"feature_incompat", func(p []byte) { p[1104] = 0xd }},
		"union":                   {"compression", func(p []byte) { p[1108] = 1 }},
		"devices":                 {"blob_table_size", func(p []byte) { p[1110] = 2 }},
		"many devices":            {"blob_table", func(p []byte) { u16(p[1110:], 65535) }},
		"slot offset":             {"devt_slotoff", func(p []byte) { p[1112] = 12 }},
		"two compressors":         {"one compressor", func(p []byte) { p[1152] |= 1 }},
		"no hash":                 {"one digester", func(p []byte) { p[1152] &^= 0xc }},
		"unknown flag":            {"known bits", func(p []byte) { p[1153] |= 4 }},
		"encrypted":               {"no encryption", func(p []byte) { p[1155] |= 2 }},
		"blob table offset":       {"blob_table_offset", func(p []byte) { u64(p[1160:], 4097) }},
		"blob table at 0":         {"blob_table_offset", func(p []byte) { u64(p[1160:], 0) }},
		"blob table outside":      {"blob table", func(p []byte) { u64(p[1160:], 1<<40) }},
		"blob table wraps":        {"blob table", func(p []byte) { u64(p[1160:], ^uint64(4095)) }},
		"blob table size":         {"blob_table_size", func(p []byte) { u32(p[1168:], 255) }},
		"chunk size 0":            {"chunk_size", func(p []byte) { u32(p[1172:], 0) }},
		"chunk size odd":          {"chunk_size", func(p []byte) { u32(p[1172:], 4097) }},
		"chunk size other":        {"chunk_size", func(p []byte) { u32(p[1172:], 8192) }},
		"chunk table offset":      {"chunk_table_offset", func(p []byte) { u64(p[1176:], 8) }},
		"chunk table outside":     {"chunk table", func(p []byte) { u64(p[1184:], 80<<40) }},
		"chunk table size":        {"chunk_table_size", func(p []byte) { u64(p[1184:], 81) }},
		"chunk table on blobs":    {"chunk table", func(p []byte) { u64(p[1176:], 4096) }},
		"no chunk table":          {"chunk table", func(p []byte) { u64(p[1184:], 0) }},
		"chunk table short":       {"chunk table", func(p []byte) { u64(p[1184:], 80) }},
		"prefetch offset":         {"prefetch_table_offset", func(p []byte) { u64(p[1192:], 4100) }},
		"prefetch outside":        {"prefetch table", func(p []byte) { u64(p[1192:], 1<<40) }},
		"prefetch on blobs":       {"prefetch table", func(p []byte) { u64(p[1192:], 4096) }},
		"prefetch size":           {"prefetch_table_size", func(p []byte) { u32(p[1200:], 3) }},
		"prefetch nid":            {"prefetch entry 0", func(p []byte) { u32(p[prefetch:], 5) }},
		"slot tag not UTF-8":      {"tag", func(p []byte) { p[1408] = 0xff }},
		"slot blocks 0":           {"blocks", func(p []byte) { u32(p[1472:], 0) }},
		"blob id not UTF-8":       {"blob_id", func(p []byte) { p[blobs] = 0xff }},
		"blob index":              {"blob_index", func(p []byte) { u32(p[blobs+64:], 1) }},
		"blob chunk size":         {"chunk_size", func(p []byte) { u32(p[blobs+68:], 8192) }},
		"blob chunk count":        {"chunk_count", func(p []byte) { u32(p[blobs+72:], 1<<24+1) }},
		"blob compressor":         {"compression_algo", func(p []byte) { u32(p[blobs+76:], 4) }},
		"blob digester":           {"digest_algo", func(p []byte) { u32(p[blobs+80:], 2) }},
		"blob bit 31":             {"features", func(p []byte) { p[blobs+87] |= 0x80 }},
		"blob bit 0x1000":         {"features", func(p []byte) { p[blobs+85] |= 0x10 }},
		"blob not aligned":        {"ALIGNED", func(p []byte) { p[blobs+84] &^= 1 }},
		"blob batch without V2":   {"CHUNK_INFO_V2", func(p []byte) { p[blobs+84] |= 0x80 }},
		"blob V2 sizes":           {"ci_uncompressed_size", func(p []byte) { p[blobs+84] |= 4 }},
		"blob size":               {"compressed_size", func(p []byte) { u64(p[blobs+88:], 1<<41) }},
		"blob uncompressed size":  {"uncompressed_size", func(p []byte) { u64(p[blobs+96:], 1<<45) }},
		"ci offset wraps":         {"overflow", func(p []byte) { u64(p[blobs+112:], ^uint64(0)) }},
		"ci compressed size":      {"ci_compressed_size", func(p []byte) { u64(p[blobs+120:], 1<<30) }},
		"ci 24 bytes per chunk":   {"ci_uncompressed_size", func(p []byte) { u64(p[blobs+128:], 24*7) }},
		"cipher":                  {"encryption", func(p []byte) { p[blobs+216] = 1 }},
		"chunk blob":              {"blob_index", func(p []byte) { p[chunks+32] = 9 }},
		"chunk index":             {"index", func(p []byte) { u32(p[chunks+72:], 1<<25) }},
		"chunk index above count": {"index", func(p []byte) { u32(p[chunks+72:], 1<<20) }},
		"chunk size 0 bytes":      {"uncompressed_size", func(p []byte) { u32(p[chunks+44:], 0) }},
		"chunk of 1 GiB":          {"uncompressed_size", func(p []byte) { u32(p[chunks+44:], 1<<30) }},
		"chunk stored outside":    {"compressed end", func(p []byte) { u64(p[chunks+48:], 1<<39) }},
		"chunk wraps":             {"compressed end", func(p []byte) { u64(p[chunks+48:], ^uint64(0)) }},
		"chunk outside":           {"uncompressed end", func(p []byte) { u64(p[chunks+56:], 1<<43) }},
		"chunk not aligned":       {"uncompressed offset", func(p []byte) { p[chunks+56]++ }},
		"chunk encrypted":         {"encryption", func(p []byte) { p[chunks+36] |= 4 }},
		"inode format":            {"i_format", func(p []byte) { p[root] |= 0x10 }},
		"root layout":             {"layout", func(p []byte) { p[root] = 1 | 1<<1 }},
		"root a file":             {"root", func(p []byte) { u16(p[root+4:], 0o100644) }},
		"root of no type":         {"mode", func(p []byte) { u16(p[root+4:], 0o644) }},
		"root xattrs":             {"inode 128", func(p []byte) { u16(p[root+2:], 65535) }},
		"root size":               {"size", func(p []byte) { u64(p[root+8:], 1<<60) }},
		"root data outside":       {"inode", func(p []byte) { u64(p[root+8:], 8192); u32(p[root+16:], 1<<30); p[root] = 1 }},
		"root nanoseconds":        {"nanoseconds", func(p []byte) { u32(p[root+40:], 1e9) }},
		"dot elsewhere":           {"dirent .", func(p []byte) { p[root+64]++ }},
		"dot dot elsewhere":       {"dirent ..", func(p []byte) { p[root+64+12]++ }},
		"entry is the root":       {"no other entry", func(p []byte) { u64(p[root+64+24:], 128) }},
		"entry far away":          {"nid", func(p []byte) { u64(p[root+64+24:], 1<<62) }},
		"entry of other type":     {"file type", func(p []byte) { p[root+64+24+10] = 6 }},
		"file size":               {"bootstrap", func(p []byte) {}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := bytes.Clone(good)
			c.change(p)
			if name == "file size" {
				p = p[:4095]
			}
			err := openErr(t, p)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Open = %v, want an error about %q", err, c.want)
			}
		})
	}
}

func TestOpenTruncated(t *testing.T) {
	t.Parallel()
	b, _ := smallImage(t, smallCombo)
	good := b.build().bootstrap
	for n := 0; n < len(good); n += 8 {
		if openErr(t, good[:n]) == nil {
			t.Errorf("Open of %d of %d bytes succeeded", n, len(good))
		}
	}
	// A file that is shorter than it says is no format error, but an error all the same.
	if _, err := rafs.Open(bytes.NewReader(good[:5000]), int64(len(good))); err == nil {
		t.Error("Open of a short file succeeded")
	}
}

// TestMutations changes a few bytes of small images in many ways: each result is refused or read without harm.
func TestMutations(t *testing.T) {
	t.Parallel()
	b, _ := smallImage(t, smallCombo)
	b.img.Root.Xattrs = []rafs.Xattr{{Name: "user.a", Value: []byte("b")}}
	s := b.build()
	interesting := interestingPlaces(s.bootstrap)
	r := rand.New(rand.NewPCG(11, 12))
	start := time.Now()
	accepted := 0
	mutations := 6000
	if raceEnabled {
		mutations = 600
	}
	for range mutations {
		p := bytes.Clone(s.bootstrap)
		for range 1 + r.IntN(3) {
			at := interesting[r.IntN(len(interesting))]
			switch r.IntN(4) {
			case 0:
				p[at] ^= 1 << r.UintN(8)
			case 1:
				p[at] = byte(r.Uint32())
			case 2:
				copy(p[at:], []byte{0xff, 0xff, 0xff, 0xff})
			default:
				copy(p[at:], p[interesting[r.IntN(len(interesting))]:][:min(8, len(p)-at)])
			}
		}
		if openErr(t, p) != nil {
			continue
		}
		accepted++
		m := &stored{bootstrap: p, blobs: s.blobs}
		_, _ = m.check(rafs.CheckOptions{Data: true, Workers: 1})
		img := m.open(t)
		fsys := img.FS(m.reader)
		must(t, img.Walk(func(_ string, ino *rafs.Inode) error {
			if ino.IsRegular() && len(ino.Chunks) < 100 {
				_ = fsys.CopyFile(context.Background(), discard{}, ino)
			}
			return nil
		}))
		_, _ = rafs.WriteBootstrap(discard{}, img)
	}
	t.Logf("%d of %d accepted in %v", accepted, mutations, time.Since(start))
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// interestingPlaces are the bytes that are not padding, and a few that are.
func interestingPlaces(p []byte) []int {
	var at []int
	for i := range p {
		if p[i] != 0 || i%61 == 0 || i >= 1024 && i < 1408 {
			at = append(at, i)
		}
	}
	return at
}

// TestOverlapIsBounded opens an image in which thousands of inodes claim the same chunk entries.
func TestOverlapIsBounded(t *testing.T) {
	t.Parallel()
	b := newBuilder(t, smallCombo)
	big := b.file("a", 0, make([]byte, 4096*20000))
	for i := range 2000 {
		b.add(fmt.Sprintf("f%05d", i), &rafs.Inode{Mode: unix.S_IFREG | 0o644})
	}
	p := b.build().bootstrap
	le := binary.LittleEndian
	meta := int(le.Uint32(p[1064:])) * 4096
	changed := 0
	for at := meta + 4096; at+64 < len(p); at += 32 {
		// The empty files get the size of the big one: their entries would be what follows.
		if le.Uint16(p[at:]) == 1|4<<1 && le.Uint16(p[at+4:]) == 0o100644 && le.Uint64(p[at+8:]) == 0 {
			le.PutUint64(p[at+8:], big.Size)
			changed++
		}
	}
	if changed != 2000 {
		t.Fatalf("%d inodes changed", changed)
	}
	if err := openErr(t, p); err == nil {
		t.Error("Open succeeded")
	}
}

// TestMoreNamesThanLinks opens an image whose file has two names and says it has one, which no reader minds.
func TestMoreNamesThanLinks(t *testing.T) {
	t.Parallel()
	for _, prefetched := range []bool{false, true} { // inodes of the prefetch table are kept in another way
		testMoreNames(t, prefetched)
	}
}

func testMoreNames(t *testing.T, prefetched bool) {
	b := newBuilder(t, smallCombo)
	f := b.file("a", 0, []byte("data"))
	b.add("b", f)
	b.file("c", 0, []byte("other"))
	if prefetched {
		b.img.Prefetch = []*rafs.Inode{f}
	}
	s := b.build()
	le := binary.LittleEndian
	changed := 0
	for at := int(le.Uint32(s.bootstrap[1064:]))*4096 + 4096; at+64 < len(s.bootstrap); at += 32 {
		if p := s.bootstrap[at:]; le.Uint16(p) == 1|4<<1 && le.Uint16(p[4:]) == 0o100644 && le.Uint64(p[8:]) == 4 && le.Uint32(p[44:]) == 2 {
			le.PutUint32(p[44:], 1)
			changed++
		}
	}
	if changed != 1 {
		t.Fatalf("%d inodes changed", changed)
	}
	img := s.open(t)
	if a := img.Lookup("a"); a == nil || a != img.Lookup("b") || len(img.Root.Children) != 3 || prefetched && !slices.Equal(img.Prefetch, []*rafs.Inode{a}) {
		t.Errorf("a is %p, b %p, %d entries, prefetch %v", a, img.Lookup("b"), len(img.Root.Children), img.Prefetch)
	}
	if _, err := s.check(rafs.CheckOptions{}); !errors.Is(err, rafs.ErrInvalid) || !strings.Contains(err.Error(), "nlink is 1, want 2") || count(err) != 1 {
		t.Errorf("Check = %v, want one fault: nlink", err)
	}
}

func TestDeepTree(t *testing.T) {
	t.Parallel()
	const depth = 10000
	b := newBuilder(t, smallCombo)
	at := b.img.Root
	for range depth {
		next := &rafs.Inode{Mode: unix.S_IFDIR | 0o755}
		at.Children = []rafs.Dirent{{Name: "d", Inode: next}}
		at = next
	}
	leaf := &rafs.Inode{Mode: unix.S_IFREG | 0o644}
	b.fill(leaf, 0, []byte("deep"))
	at.Children = []rafs.Dirent{{Name: "leaf", Inode: leaf}}
	s := b.build()
	img := s.open(t)
	n := 0
	must(t, img.Walk(func(path string, ino *rafs.Inode) error {
		n++
		if ino.IsRegular() && len(path) != 2*depth+5 {
			t.Errorf("leaf at a path of %d bytes", len(path))
		}
		return nil
	}))
	if n != depth+2 {
		t.Errorf("%d entries, want %d", n, depth+2)
	}
	if _, err := s.check(rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	if got := img.Lookup(strings.Repeat("d/", depth) + "leaf"); got == nil || got.Size != 4 {
		t.Errorf("Lookup of the leaf = %+v", got)
	}
	// An error at the bottom names a path, but not all of it.
	leaf.Chunks = nil
	if _, err := rafs.WriteBootstrap(discard{}, b.img); err == nil || len(err.Error()) > 2000 || !strings.Contains(err.Error(), "d/leaf") {
		t.Errorf("WriteBootstrap = %.2500v, want a short error that names the leaf", err)
	}
}

// TestManyFilesMemory bounds what a file costs while a bootstrap is written.
func TestManyFilesMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a while")
	}
	const files = 200_000
	defer debug.SetGCPercent(debug.SetGCPercent(10)) // the peak shall be data, not garbage
	var before runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	img := manyFiles(files)
	var out counter
	peak := watchHeap(func() {
		_, err := rafs.WriteBootstrap(&out, img)
		must(t, err)
	})
	perFile := int64(peak-before.HeapAlloc) / files
	t.Logf("peak %d bytes of heap per file, %d bytes of bootstrap per file", perFile, int64(out)/files)
	if perFile > 600 {
		t.Errorf("%d bytes of heap per file, want at most 600", perFile)
	}
	runtime.KeepAlive(img)
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// manyFiles makes an image of n files of one chunk each, a hundred in a directory.
func manyFiles(n int) *rafs.Image {
	img := &rafs.Image{Root: &rafs.Inode{Mode: unix.S_IFDIR | 0o755}, ChunkSize: 1 << 20, Compressor: rafs.CompressorZstd}
	var dir *rafs.Inode
	for i := range n {
		if i%100 == 0 {
			dir = &rafs.Inode{Mode: unix.S_IFDIR | 0o755}
			img.Root.Children = append(img.Root.Children, rafs.Dirent{Name: fmt.Sprintf("dir%08d", i), Inode: dir})
		}
		c := rafs.Chunk{
			Index: uint32(i), Compressed: true, CompressedOffset: uint64(i) * 1000, CompressedSize: 1000,
			UncompressedOffset: uint64(i) * 4096, UncompressedSize: 3000,
		}
		binary.LittleEndian.PutUint64(c.Digest[:], uint64(i)*0x9e3779b97f4a7c15)
		dir.Children = append(dir.Children, rafs.Dirent{
			Name:  fmt.Sprintf("file-with-a-name-%08d", i),
			Inode: &rafs.Inode{Mode: unix.S_IFREG | 0o644, Size: 3000, Chunks: []rafs.Chunk{c}},
		})
	}
	meta := uint64(n) * 16
	img.Blobs = []rafs.Blob{{
		ID: strings.Repeat("a", 64), ChunkSize: 1 << 20, ChunkCount: uint32(n), Compressor: rafs.CompressorZstd,
		Features: 0x50000001, UncompressedSize: uint64(n) * 4096, CompressedSize: uint64(n)*1000 + 512 + meta + 4096 + 512,
		MetaOffset: uint64(n)*1000 + 512, MetaCompressed: meta, MetaUncompressed: meta,
	}}
	return img
}

// watchHeap returns the most heap seen in use while f ran; garbage counts until it is collected, so it
// is collected often.
func watchHeap(f func()) uint64 {
	done := make(chan struct{})
	peak := make(chan uint64)
	go func() {
		var most uint64
		var m runtime.MemStats
		for {
			runtime.GC()
			runtime.ReadMemStats(&m)
			most = max(most, m.HeapAlloc)
			select {
			case <-done:
				peak <- most
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	f()
	close(done)
	return <-peak
}
