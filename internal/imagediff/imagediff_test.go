package imagediff_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/imagediff"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

const (
	dirMode  = 0o040755
	fileMode = 0o100644
)

// image builds a tree by hand. Its one blob is data, and a chunk's place in it is where its bytes are.
type image struct {
	chunkSize uint32
	digester  rafs.Digester
	data      []byte
	img       *rafs.Image
	reads     int
}

func newImage(chunkSize uint32, d rafs.Digester) *image {
	return &image{chunkSize: chunkSize, digester: d, img: &rafs.Image{
		ChunkSize: chunkSize, Digester: d, Root: &rafs.Inode{Mode: dirMode}, Blobs: make([]rafs.Blob, 1),
	}}
}

func (i *image) file(content string) *rafs.Inode {
	ino := &rafs.Inode{Mode: fileMode, Size: uint64(len(content))}
	for off := 0; off < len(content); off += int(i.chunkSize) {
		p := []byte(content[off:min(off+int(i.chunkSize), len(content))])
		ino.Chunks = append(ino.Chunks, rafs.Chunk{
			Digest: i.digester.Sum(p), UncompressedOffset: uint64(len(i.data)), UncompressedSize: uint32(len(p)), Index: uint32(len(i.data)),
		})
		i.data = append(i.data, p...)
	}
	return ino
}

// add puts names into the root, which must come in order.
func (i *image) add(name string, ino *rafs.Inode) *image {
	i.img.Root.Children = append(i.img.Root.Children, rafs.Dirent{Name: name, Inode: ino})
	return i
}

func (i *image) side() imagediff.Side {
	return imagediff.Side{Image: i.img, Read: func(_ context.Context, c rafs.Chunk) ([]byte, error) {
		i.reads++
		return i.data[c.UncompressedOffset:][:c.UncompressedSize], nil
	}}
}

func compare(t *testing.T, a, b *image) (imagediff.Summary, []imagediff.Change) {
	t.Helper()
	var changes []imagediff.Change
	sum, err := imagediff.Compare(t.Context(), a.side(), b.side(), func(c imagediff.Change) error {
		changes = append(changes, c)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum, changes
}

func TestCompare(t *testing.T) {
	t.Parallel()
	a, b := newImage(4, rafs.DigesterBLAKE3), newImage(4, rafs.DigesterBLAKE3)
	for n, i := range []*image{a, b} {
		shared := i.file("linked")
		owner := i.file("owner")
		owner.UID, owner.GID, owner.Mode = uint32(n), uint32(n), fileMode|uint32(n)
		attrs := i.file("x")
		attrs.Xattrs = []rafs.Xattr{{Name: "user.a", Value: []byte("1")}, {Name: "user.b", Value: []byte{byte(n)}}}
		order := i.file("x")
		order.Xattrs = []rafs.Xattr{{Name: "user.a"}, {Name: "user.b"}}
		if n == 1 {
			order.Xattrs[0], order.Xattrs[1] = order.Xattrs[1], order.Xattrs[0]
		}
		i.add("attrs", attrs)
		i.add("content", i.file("same size"[:8]+string(rune('a'+n))))
		i.add("link1", shared)
		if n == 0 {
			i.add("link2", shared)
			i.add("old", &rafs.Inode{Mode: dirMode, Children: []rafs.Dirent{{Name: "below", Inode: i.file("gone")}}})
		} else {
			i.add("link2", i.file("linked"))
			i.add("new\n", i.file("came"))
		}
		i.add("order", order)
		i.add("owner", owner)
		i.add("size", i.file("longer"[:4+n]))
		if n == 0 {
			i.add("type", i.file("a"))
		} else {
			i.add("type", &rafs.Inode{Mode: 0o120777, Target: "a", Size: 1})
		}
		i.add("untouched", i.file("the same of both"))
	}
	sum, changes := compare(t, a, b)
	want := []imagediff.Change{
		{Kind: imagediff.Changed, Path: "/attrs", Fields: []string{"xattrs"}, Bytes: 1},
		{Kind: imagediff.Changed, Path: "/content", Fields: []string{"content"}, Bytes: 9},
		{Kind: imagediff.Changed, Path: "/link1", Fields: []string{"links"}, Bytes: 6},
		{Kind: imagediff.Changed, Path: "/link2", Fields: []string{"links"}, Bytes: 6},
		{Kind: imagediff.Added, Path: "/new\n", Bytes: 4},
		{Kind: imagediff.Removed, Path: "/old"},
		{Kind: imagediff.Removed, Path: "/old/below", Bytes: 4},
		{Kind: imagediff.Changed, Path: "/owner", Fields: []string{"mode", "uid", "gid"}, Bytes: 5},
		{Kind: imagediff.Changed, Path: "/size", Fields: []string{"size"}, Bytes: 5},
		{Kind: imagediff.Changed, Path: "/type", Fields: []string{"type", "mode", "target"}, Bytes: 1},
	}
	if diff := cmp.Diff(want, changes); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
	if sum.Added != 1 || sum.Removed != 2 || sum.Changed != 7 || sum.Same != 3 || sum.Equal() {
		t.Errorf("summary %+v, want 1 added, 2 removed, 7 changed, 3 the same", sum)
	}
	if a.reads+b.reads != 0 {
		t.Errorf("%d chunks were read: digests tell", a.reads+b.reads)
	}
}

// TestCompareByBytes compares images whose digests say nothing of each other.
func TestCompareByBytes(t *testing.T) {
	t.Parallel()
	text := "twelve bytes and some more"
	for name, other := range map[string]string{"equal": text, "first": "T" + text[1:], "last": text[:len(text)-1] + "E"} {
		a := newImage(4, rafs.DigesterBLAKE3)
		a.add("f", a.file(text))
		b := newImage(7, rafs.DigesterSHA256)
		b.add("f", b.file(other))
		sum, changes := compare(t, a, b)
		if same := len(changes) == 0; same != (other == text) || same != sum.Equal() {
			t.Errorf("%s: changes %+v, summary %+v", name, changes, sum)
		}
	}
}

// TestCompareWithoutDigests compares images whose chunks have no digests, as those of tarfs images:
// only the bytes tell, also against an image that has digests.
func TestCompareWithoutDigests(t *testing.T) {
	t.Parallel()
	tarfs := func(content string) *image {
		i := newImage(4, rafs.DigesterSHA256)
		ino := i.file(content)
		for n := range ino.Chunks {
			ino.Chunks[n].Digest = rafs.Digest{}
		}
		return i.add("f", ino)
	}
	digests := func(content string) *image {
		i := newImage(4, rafs.DigesterSHA256)
		return i.add("f", i.file(content))
	}
	const text = "twelve bytes"
	for name, other := range map[string]struct {
		*image
		same bool
	}{
		"tarfs, equal":           {tarfs(text), true},
		"tarfs, other bytes":     {tarfs("twelve BYTES"), false},
		"with digests, equal":    {digests(text), true},
		"with digests, other":    {digests("twelve BYTES"), false},
		"with digests, one byte": {digests("twelve byteS"), false},
	} {
		sum, changes := compare(t, tarfs(text), other.image)
		if same := len(changes) == 0; same != other.same || same != sum.Equal() {
			t.Errorf("%s: changes %+v, summary %+v", name, changes, sum)
		}
		if sum.ABytes != uint64(len(text)) || sum.BBytes != uint64(len(text)) || sum.SharedBytes != 0 {
			t.Errorf("%s: %d of %d and %d bytes shared, want 0 of %d", name, sum.SharedBytes, sum.ABytes, sum.BBytes, len(text))
		}
	}
}

func TestCompareErrors(t *testing.T) {
	t.Parallel()
	a, b := newImage(4, rafs.DigesterBLAKE3), newImage(8, rafs.DigesterBLAKE3)
	a.add("f", a.file("content"))
	b.add("f", b.file("content"))
	fault := errors.New("fault")
	broken := imagediff.Side{Image: b.img, Read: func(context.Context, rafs.Chunk) ([]byte, error) { return nil, fault }}
	if _, err := imagediff.Compare(t.Context(), a.side(), broken, nil); !errors.Is(err, fault) || !bytes.Contains([]byte(err.Error()), []byte(`"/f"`)) {
		t.Errorf("Compare = %v, want the fault with the path", err)
	}
	b.add("g", b.file("g"))
	if _, err := imagediff.Compare(t.Context(), b.side(), a.side(), func(imagediff.Change) error { return fault }); !errors.Is(err, fault) {
		t.Errorf("Compare = %v, want the error of report", err)
	}
}
