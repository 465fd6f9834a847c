package rafs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// v5File is a small v5 bootstrap of three entries of which the place of every field is known: "/", "/a" of one chunk
// with an xattr, and its second name "/b".
func v5File(t testing.TB) []byte {
	t.Helper()
	b := newBuilder(t, combo{chunkSize: 4096})
	b.img.Version = rafs.V5
	a := b.file("a", 0, bytes.Repeat([]byte("x"), 3000))
	a.Xattrs = []rafs.Xattr{{Name: "user.k", Value: []byte("v")}}
	insert(b.img.Root, "b", a)
	b.img.Prefetch = []*rafs.Inode{a}
	return b.build().bootstrap
}

// Places in a v5File. The tables: 3 numbers padded to 16 bytes, one prefetch entry padded to 8, one blob id behind 8 bytes, one
// extended entry; records: root of 128+8, files of 128+8 + 8+16 + 80.
const (
	v5Inodes   = 8192
	v5Prefetch = v5Inodes + 16
	v5Blobs    = v5Prefetch + 8
	v5Ext      = v5Blobs + 72
	v5Root     = v5Ext + 64
	v5A        = v5Root + 136
	v5B        = v5A + 136 + 24 + 80
	v5Size     = v5B + 136 + 24 + 80
)

func TestOpenRefusesV5(t *testing.T) {
	t.Parallel()
	good := v5File(t)
	must(t, openErr(t, good))
	if len(good) != v5Size {
		t.Fatalf("%d bytes, want %d", len(good), v5Size)
	}
	u16, u32, u64 := binary.LittleEndian.PutUint16, binary.LittleEndian.PutUint32, binary.LittleEndian.PutUint64
	for name, c := range map[string]struct {
		want   string // part of the message
		change func(p []byte)
	}{
		"version":               {"version", func(p []byte) { u32(p[4:], 0x400) }},
		"superblock size":       {"sb_size", func(p []byte) { u32(p[8:], 4096) }},
		"chunk size 0":          {"block_size", func(p []byte) { u32(p[12:], 0) }},
		"chunk size odd":        {"block_size", func(p []byte) { u32(p[12:], 4097) }},
		"chunk size other":      {"uncompressed_size", func(p []byte) { u32(p[12:], 8192); u64(p[v5A+64:], 4000) }},
		"two compressors":       {"one compressor", func(p []byte) { p[16] |= 2 }},
		"no hash":               {"one digester", func(p []byte) { p[16] &^= 0xc }},
		"v6 flag":               {"known bits", func(p []byte) { p[17] |= 1 }},
		"encrypted":             {"known bits", func(p []byte) { p[19] |= 2 }},
		"inodes":                {"inodes_count", func(p []byte) { u64(p[24:], 4) }},
		"inode table outside":   {"inode table", func(p []byte) { u64(p[32:], 1<<40) }},
		"inode table wraps":     {"inode table", func(p []byte) { u64(p[32:], ^uint64(7)) }},
		"inode table at 0":      {"behind the superblock", func(p []byte) { u64(p[32:], 0) }},
		"inode table unaligned": {"multiple of 8", func(p []byte) { u64(p[32:], v5Inodes+4) }},
		"no inodes":             {"inode_table_entries", func(p []byte) { u32(p[56:], 0); u64(p[24:], 0) }},
		"many inodes":           {"inode table", func(p []byte) { u32(p[56:], ^uint32(0)) }},
		"one inode":             {"children", func(p []byte) { u32(p[56:], 1); u64(p[24:], 1) }},
		"prefetch on inodes":    {"apart from the inode table", func(p []byte) { u64(p[40:], v5Inodes) }},
		"prefetch outside":      {"prefetch table", func(p []byte) { u32(p[60:], 1<<30) }},
		"prefetch ino":          {"prefetch entry 0", func(p []byte) { u32(p[v5Prefetch:], 9) }},
		"prefetch of a link":    {"prefetch entry 0", func(p []byte) { u32(p[v5Prefetch:], 3) }},
		"blobs on inodes":       {"apart from the inode table", func(p []byte) { u64(p[48:], v5Inodes) }},
		"blobs outside":         {"blob table", func(p []byte) { u32(p[64:], 1<<31) }},
		"no blobs":              {"blob_index", func(p []byte) { u32(p[64:], 0) }},
		"blob id empty":         {"blob_id", func(p []byte) { p[v5Blobs+8] = 0 }},
		"blob id not UTF-8":     {"blob_id", func(p []byte) { p[v5Blobs+8] = 0xff }},
		"ids without entries":   {"an entry for every blob", func(p []byte) { p[v5Blobs+40] = 0 }},
		"extended on blobs":     {"apart from the blob table", func(p []byte) { u64(p[72:], v5Blobs) }},
		"extended outside":      {"extended blob table", func(p []byte) { u32(p[68:], 1<<20) }},
		"chunk count":           {"chunk_count", func(p []byte) { u32(p[v5Ext:], 1<<24+1) }},
		"chunk count 0":         {"index", func(p []byte) { u32(p[v5Ext:], 0) }},
		"features bit 31":       {"features", func(p []byte) { p[v5Ext+7] |= 0x80 }},
		"features batch":        {"features", func(p []byte) { p[v5Ext+4] |= 0x80 }},
		"uncompressed size":     {"uncompressed end", func(p []byte) { u64(p[v5Ext+8:], 100) }},
		"uncompressed 2^45":     {"uncompressed_size", func(p []byte) { u64(p[v5Ext+8:], 1<<45) }},
		"compressed size":       {"compressed end", func(p []byte) { u64(p[v5Ext+16:], 100) }},
		"root nowhere":          {"inode table entry 1", func(p []byte) { u32(p[v5Inodes:], 0) }},
		"root in the tables":    {"inode table entry 1", func(p []byte) { u32(p[v5Inodes:], 1024) }},
		"root outside":          {"inode 1", func(p []byte) { u32(p[v5Inodes:], 1<<28) }},
		"root a file":           {"root", func(p []byte) { u32(p[v5Root+60:], 0o100644); u32(p[v5Root+96:], 0) }},
		"root of no type":       {"mode", func(p []byte) { u32(p[v5Root+60:], 0o644); u32(p[v5Root+96:], 0) }},
		"root with a parent":    {"parent", func(p []byte) { u64(p[v5Root+32:], 1) }},
		"root ino":              {"ino", func(p []byte) { u64(p[v5Root+40:], 2) }},
		"root its own child":    {"children", func(p []byte) { u32(p[v5Root+92:], 1) }},
		"children outside":      {"children", func(p []byte) { u32(p[v5Root+96:], 3) }},
		"children of 2^32":      {"children", func(p []byte) { u32(p[v5Root+96:], ^uint32(0)) }},
		"record twice":          {"file \"/", func(p []byte) { copy(p[v5Inodes+8:], p[v5Inodes+4:v5Inodes+8]) }},
		"child is the root":     {"file \"/", func(p []byte) { copy(p[v5Inodes+4:], p[v5Inodes:v5Inodes+4]) }},
		"name of 0":             {"name_size", func(p []byte) { u16(p[v5A+100:], 0) }},
		"name of 257":           {"name_size", func(p []byte) { u16(p[v5A+100:], 257) }},
		"name with a slash":     {"name", func(p []byte) { p[v5A+128] = '/' }},
		"name with NUL":         {"name", func(p []byte) { u16(p[v5A+100:], 2) }},
		"name .":                {"name", func(p []byte) { p[v5A+128] = '.' }},
		"unsorted":              {"sorted names", func(p []byte) { p[v5A+128] = 'c' }},
		"name twice":            {"sorted names", func(p []byte) { p[v5A+128] = 'b' }},
		"parent":                {"parent", func(p []byte) { u64(p[v5A+32:], 2) }},
		"no links":              {"nlink", func(p []byte) { u32(p[v5A+88:], 0) }},
		"ino 0":                 {"ino", func(p []byte) { u64(p[v5A+40:], 0) }},
		"ino far":               {"ino", func(p []byte) { u64(p[v5A+40:], 1<<32+2) }},
		"link of nobody":        {"number of the file", func(p []byte) { u64(p[v5A+40:], 1); u64(p[v5B+40:], 1) }},
		"links disagree":        {"other names", func(p []byte) { u32(p[v5B+104:], 7) }},
		"links of other chunks": {"again, differing", func(p []byte) { p[v5B+160]++ }},
		"linked directory":      {"hard links", func(p []byte) { u32(p[v5B+60:], 0o40755); u32(p[v5B+96:], 0) }},
		"fifo with chunks":      {"child_count", func(p []byte) { u32(p[v5A+60:], 0o10644) }},
		"symlink of nothing":    {"symlink_size", func(p []byte) { u32(p[v5A+60:], 0o120777); u32(p[v5A+96:], 0) }},
		"file with a target":    {"symlink_size", func(p []byte) { u16(p[v5A+102:], 8) }},
		"holes":                 {"no holes", func(p []byte) { p[v5A+80] |= 8 }},
		"unknown flag":          {"known bits", func(p []byte) { p[v5A+81] |= 1 }},
		"nanoseconds":           {"nanoseconds", func(p []byte) { u32(p[v5A+108:], 1e9) }},
		"size":                  {"child_count", func(p []byte) { u64(p[v5A+64:], 5000) }},
		"size of 2^60":          {"child_count", func(p []byte) { u64(p[v5A+64:], 1<<60) }},
		"chunks missing":        {"child_count", func(p []byte) { u32(p[v5A+96:], 0) }},
		"chunks outside":        {"inode 2", func(p []byte) { u64(p[v5A+64:], 4096<<20); u32(p[v5A+96:], 1<<20) }},
		"xattrs of 2^63":        {"xattrs", func(p []byte) { u64(p[v5A+136:], 1<<63) }},
		"xattrs outside":        {"inode 2", func(p []byte) { u64(p[v5A+136:], 4096) }},
		"xattr pair":            {"xattr", func(p []byte) { u32(p[v5A+144:], 500) }},
		"xattr without NUL":     {"xattr", func(p []byte) { p[v5A+154] = 'x' }},
		"xattr without name":    {"xattr", func(p []byte) { p[v5A+148] = 0 }},
		"chunk blob":            {"blob_index", func(p []byte) { u32(p[v5A+160+32:], 1) }},
		"chunk encrypted":       {"encryption", func(p []byte) { p[v5A+160+36] |= 4 }},
		"chunk size":            {"uncompressed_size", func(p []byte) { u32(p[v5A+160+44:], 2999) }},
		"chunk stored outside":  {"compressed end", func(p []byte) { u64(p[v5A+160+48:], 1<<39) }},
		"chunk wraps":           {"compressed end", func(p []byte) { u64(p[v5A+160+48:], ^uint64(0)) }},
		"chunk of 1 GiB":        {"compressed_size", func(p []byte) { u32(p[v5A+160+40:], 1<<30) }},
		"chunk elsewhere":       {"file_offset", func(p []byte) { u64(p[v5A+160+64:], 4096) }},
		"chunk index":           {"index", func(p []byte) { u32(p[v5A+160+72:], 1<<25) }},
		"odd length":            {"file size", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := bytes.Clone(good)
			if c.change == nil {
				p = append(p, 0)
			} else {
				c.change(p)
			}
			err := openErr(t, p)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Open = %v, want an error about %q", err, c.want)
			}
		})
	}
}

// TestCheckFindsV5 changes what opening does not look at.
func TestCheckFindsV5(t *testing.T) {
	t.Parallel()
	good := v5File(t)
	u32, u64 := binary.LittleEndian.PutUint32, binary.LittleEndian.PutUint64
	for name, c := range map[string]struct {
		class  error
		want   string
		change func(p []byte)
	}{
		"reserved":              {rafs.ErrInvalid, "reserved", func(p []byte) { p[100] = 1 }},
		"extended reserved":     {rafs.ErrInvalid, "reserved", func(p []byte) { p[v5Ext+30] = 1 }},
		"extended table gone":   {rafs.ErrInvalid, "extended_blob_table_entries", func(p []byte) { u32(p[68:], 0) }},
		"inodes":                {rafs.ErrInvalid, "inodes_count", func(p []byte) { u64(p[24:], 0) }},
		"file digest":           {rafs.ErrDigest, "\"/a\"", func(p []byte) { p[v5A]++; p[v5B]++ }},
		"directory digest":      {rafs.ErrDigest, "directory \"/\"", func(p []byte) { p[v5Root]++ }},
		"chunk digest":          {rafs.ErrDigest, "\"/a\"", func(p []byte) { p[v5A+160]++; p[v5B+160]++ }},
		"directory links":       {rafs.ErrInvalid, "nlink", func(p []byte) { u32(p[v5Root+88:], 3) }},
		"file links":            {rafs.ErrInvalid, "nlink", func(p []byte) { u32(p[v5A+88:], 3); u32(p[v5B+88:], 3) }},
		"entry in no directory": {rafs.ErrInvalid, "nlink", func(p []byte) { u32(p[v5Root+96:], 1) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := bytes.Clone(good)
			c.change(p)
			must(t, openErr(t, p))
			_, err := rafs.Check(t.Context(), bytes.NewReader(p), int64(len(p)), nil, rafs.CheckOptions{})
			if !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Check = %v, want %v about %q", err, c.class, c.want)
			}
		})
	}
	_, err := rafs.Check(t.Context(), bytes.NewReader(good), int64(len(good)), nil, rafs.CheckOptions{})
	must(t, err)
}

// TestV5WithoutExtendedTable opens images that are older than the extended blob table: the chunks tell what it would.
func TestV5WithoutExtendedTable(t *testing.T) {
	t.Parallel()
	s := loadFixture(t, "v5-zstd")
	want := s.open(t)
	le := binary.LittleEndian
	le.PutUint32(s.bootstrap[68:], 0)
	le.PutUint64(s.bootstrap[72:], 0)
	img := s.open(t)
	diff(t, "tree", flatten(t, img, img.FS(s.reader)), flatten(t, want, want.FS(s.reader)))
	for i, b := range img.Blobs {
		if w := want.Blobs[i]; b.ID != w.ID || b.ChunkCount == 0 || b.ChunkCount > w.ChunkCount || b.CompressedSize > w.CompressedSize || b.UncompressedSize > w.UncompressedSize {
			t.Errorf("blob %d = %+v, want no more than %+v", i, b, w)
		}
	}
	if err := s.sole(rafs.CheckOptions{Data: true}); err == nil || strings.Count(err.Error(), "\n") > 0 || !strings.Contains(err.Error(), "extended_blob_table") {
		t.Errorf("Check = %v, want one fault, the missing extended blob table", err)
	}
	// What is written again has it (nydus issue 1755).
	var out bytes.Buffer
	_, err := rafs.WriteBootstrap(&out, img)
	must(t, err)
	again := &stored{bootstrap: out.Bytes(), blobs: s.blobs}
	if err := again.sole(rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	again.checkNydus(t)
}

func (s *stored) sole(o rafs.CheckOptions) error {
	_, err := s.check(o)
	return err
}

// TestOverlapIsBoundedV5 opens an image whose directories all claim the same children, and one whose entries share a record.
func TestOverlapIsBoundedV5(t *testing.T) {
	t.Parallel()
	b := newBuilder(t, combo{chunkSize: 4096})
	b.img.Version = rafs.V5
	for i := range 2000 {
		b.add(fmt.Sprintf("d%05d", i), &rafs.Inode{Mode: unix.S_IFDIR | 0o755})
	}
	sub := b.img.Lookup("d00000")
	for i := range 2000 {
		insert(sub, fmt.Sprintf("f%05d", i), &rafs.Inode{Mode: unix.S_IFREG | 0o644})
	}
	good := b.build().bootstrap
	le := binary.LittleEndian
	record := func(p []byte, n int) []byte { return p[le.Uint32(p[8192+4*(n-1):])<<3:] }
	first := record(good, 2)
	claimed := bytes.Clone(good)
	for n := 2; n <= 2001; n++ {
		copy(record(claimed, n)[92:100], first[92:100])
	}
	shared := bytes.Clone(good)
	for n := 2002; n <= 4001; n++ {
		copy(shared[8192+4*(n-1):], shared[8192+4*2001:][:4])
	}
	for name, p := range map[string][]byte{"claimed": claimed, "shared": shared} {
		for _, faults := range []int{1, 1 << 20} {
			_, err := rafs.Check(t.Context(), bytes.NewReader(p), int64(len(p)), nil, rafs.CheckOptions{MaxFaults: faults})
			if !errors.Is(err, rafs.ErrInvalid) {
				t.Errorf("%s: Check = %.300v, want ErrInvalid", name, err)
			}
		}
		if openErr(t, p) == nil {
			t.Errorf("%s: Open succeeded", name)
		}
	}
}

// TestTruncatedV5 cuts a bootstrap at every 8 bytes.
func TestTruncatedV5(t *testing.T) {
	t.Parallel()
	good := v5File(t)
	for n := 0; n < len(good); n += 8 {
		if openErr(t, good[:n]) == nil {
			t.Errorf("Open of %d of %d bytes succeeded", n, len(good))
		}
	}
	if _, err := rafs.Open(bytes.NewReader(good[:8300]), int64(len(good))); err == nil {
		t.Error("Open of a short file succeeded")
	}
}

// TestOddTreesV5 writes trees that are deep, wide, empty, or all of links.
func TestOddTreesV5(t *testing.T) {
	t.Parallel()
	build := func(t *testing.T, fill func(b *imageBuilder)) *stored {
		b := newBuilder(t, combo{chunkSize: 4096, compressor: rafs.CompressorZstd})
		b.img.Version = rafs.V5
		fill(b)
		s := b.build()
		if err := s.sole(rafs.CheckOptions{Data: true}); err != nil {
			t.Error(err)
		}
		img := s.open(t)
		diff(t, "tree", flatten(t, img, img.FS(s.reader)), flatten(t, b.img, b.img.FS(s.reader)))
		return s
	}
	t.Run("empty", func(t *testing.T) {
		s := build(t, func(*imageBuilder) {})
		s.checkNydus(t)
	})
	t.Run("no data", func(t *testing.T) {
		s := build(t, func(b *imageBuilder) {
			b.img.Root.Xattrs = []rafs.Xattr{{Name: "trusted.root", Value: []byte{}}}
			b.add("empty", &rafs.Inode{Mode: unix.S_IFREG | 0o644})
			b.add("dir", &rafs.Inode{Mode: unix.S_IFDIR | 0o755})
			b.add("fifo", &rafs.Inode{Mode: unix.S_IFIFO | 0o600})
			b.add("char", &rafs.Inode{Mode: unix.S_IFCHR | 0o600, Rdev: rafs.EncodeDevice(4095, 1<<20-1)})
		})
		s.checkNydus(t)
		s.compareNydusd(t)
	})
	t.Run("names", func(t *testing.T) {
		s := build(t, func(b *imageBuilder) {
			for _, n := range []string{strings.Repeat("n", 255), "\xff\xfe", "-", "!", "..a", ".wh.x", ".wh..wh..opq", "new\nline", " ", "~"} {
				b.file(n, 0, []byte(n))
			}
			b.file("\x01", 0, []byte("\x01"))
		})
		s.checkNydus(t)
		s.compareNydusd(t)
	})
	t.Run("links", func(t *testing.T) {
		s := build(t, func(b *imageBuilder) {
			for _, d := range []string{"a", "b", "z"} {
				b.add(d, &rafs.Inode{Mode: unix.S_IFDIR | 0o755})
			}
			f := b.file("z/first-stored", 0, bytes.Repeat([]byte("data"), 5000))
			for i := range 300 { // in directories before and behind, so that parents have greater and smaller numbers
				insert(b.img.Lookup([]string{"a", "b", "z"}[i%3]), fmt.Sprintf("l%d", i), f)
			}
			insert(b.img.Root, "zz", f)
		})
		s.checkNydus(t)
		s.compareNydusd(t)
	})
	t.Run("deep", func(t *testing.T) {
		build(t, func(b *imageBuilder) {
			at := b.img.Root
			for range 1000 {
				next := &rafs.Inode{Mode: unix.S_IFDIR | 0o755}
				at.Children = []rafs.Dirent{{Name: "d", Inode: next}}
				at = next
			}
		}).checkNydus(t)
	})
	t.Run("chunks", func(t *testing.T) {
		s := build(t, func(b *imageBuilder) {
			for k := range 5 {
				b.file(fmt.Sprintf("k%d", k), k%2, bytes.Repeat([]byte{byte(k), 1, 2, 3}, 1024*k))
			}
		})
		s.checkNydus(t)
		s.compareNydusd(t)
	})
}

// TestWideDirectoryV5 has 100,000 entries in one directory.
func TestWideDirectoryV5(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a while")
	}
	b := newBuilder(t, combo{chunkSize: 4096})
	b.img.Version = rafs.V5
	dir := b.add("wide", &rafs.Inode{Mode: unix.S_IFDIR | 0o755})
	for i := range 100_000 {
		dir.Children = append(dir.Children, rafs.Dirent{Name: fmt.Sprintf("f%06d", i), Inode: &rafs.Inode{Mode: unix.S_IFREG | 0o644}})
	}
	s := b.build()
	if err := s.sole(rafs.CheckOptions{}); err != nil {
		t.Error(err)
	}
	if img := s.open(t); len(img.Lookup("wide").Children) != 100_000 || !slices.IsSortedFunc(img.Lookup("wide").Children, func(a, b rafs.Dirent) int { return strings.Compare(a.Name, b.Name) }) {
		t.Error("the directory reads back otherwise")
	}
	s.checkNydus(t)
}
