package tarindex_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/tarindex"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/remote"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// plainLayers returns the uncompressed tars of an image's layers.
func plainLayers(t *testing.T, src remote.Source, img remote.Image) [][]byte {
	t.Helper()
	var out [][]byte
	for _, l := range img.Layers {
		rc, err := src.Fetch(t.Context(), l.Descriptor)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(rc)
		if err = errors.Join(err, rc.Close()); err != nil {
			t.Fatal(err)
		}
		if bytes.HasPrefix(b, []byte("\x1f\x8b")) {
			z, err := gzip.NewReader(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			if b, err = io.ReadAll(z); err != nil {
				t.Fatal(err)
			}
		}
		out = append(out, b)
	}
	return out
}

// The bytes at the extents of every file of the zoo are the file, as those who made it say.
func TestZoo(t *testing.T) {
	t.Parallel()
	fixtures := testenv.Fixtures(t)
	ref, err := remote.Parse("oci:" + filepath.Join(fixtures, "oci", "source"))
	if err != nil {
		t.Fatal(err)
	}
	src, err := remote.OpenSource(t.Context(), ref, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	img, err := remote.Select(t.Context(), src, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	x, err := tarindex.Read(t.Context(), src, img)
	if err != nil {
		t.Fatal(err)
	}
	layers := plainLayers(t, src, img)
	b, err := os.ReadFile(filepath.Join(fixtures, "expected.json"))
	if err != nil {
		t.Fatal(err)
	}
	var want []struct {
		Path, Type, SHA256 string
		Size               int64
		Hex                string `json:"path_hex"`
	}
	if err := json.Unmarshal(b, &want); err != nil {
		t.Fatal(err)
	}
	files := 0
	for _, w := range want {
		f, ok := x.Find(w.Path)
		if w.Type != "reg" {
			if ok && f.Path == w.Path {
				t.Errorf("%q is a %s and was found as a file", w.Path, w.Type)
			}
			continue
		}
		if !ok {
			t.Errorf("%q was not found", w.Path)
			continue
		}
		files++
		if f.Size != w.Size || f.Sparse {
			t.Errorf("%q: got %+v, want %d bytes", w.Path, f, w.Size)
			continue
		}
		h := sha256.New()
		for _, e := range f.Extents(nil) {
			h.Write(layers[e.Layer][e.Offset : e.Offset+e.Length])
		}
		if got := hex.EncodeToString(h.Sum(nil)); got != w.SHA256 {
			t.Errorf("%q: sha256 %s, want %s", w.Path, got, w.SHA256)
		}
	}
	if files < 10 || x.Size() == 0 {
		t.Errorf("%d files, %d bytes: the fixture should have more", files, x.Size())
	}
}

type entry struct {
	name, data, link string
	kind             byte
}

func makeTar(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Linkname: e.link, Size: int64(len(e.data)), Mode: 0o644}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// What layers do to each other, told by the content that is found.
func TestStack(t *testing.T) {
	t.Parallel()
	layers := [][]byte{
		makeTar(t,
			entry{name: "usr/lib/a", data: "lower a"}, entry{name: "usr/lib/b", data: "lower b"},
			entry{name: "lib", link: "usr/lib", kind: tar.TypeSymlink},
			entry{name: "opaque/x", data: "hidden"}, entry{name: "opaque/y/z", data: "hidden too"},
			entry{name: "gone", data: "gone"}, entry{name: "tree/one/two", data: "gone with its tree"},
			entry{name: "file", data: "will be a directory"}, entry{name: "dir/in", data: "will be a file"},
			entry{name: "circle", link: "circle", kind: tar.TypeSymlink},
			entry{name: strings.Repeat("long/", 60) + "name", data: "needs a PAX header"}),
		makeTar(t,
			entry{name: "./usr/lib/a", data: "upper a"},
			entry{name: "lib/c", data: "through a link"},
			entry{name: "opaque/new", data: "new"}, entry{name: "opaque/.wh..wh..opq"},
			entry{name: ".wh.gone"}, entry{name: ".wh.tree"}, entry{name: ".wh.never-there"},
			entry{name: "file/inside", data: "inside"}, entry{name: "dir", data: "a file now"},
			entry{name: "hard", link: "usr/lib/b", kind: tar.TypeLink}, entry{name: "hard2", link: "/hard", kind: tar.TypeLink},
			entry{name: "empty"}, entry{name: "up", link: "../../../usr/lib/a", kind: tar.TypeSymlink}),
		makeTar(t, entry{name: "again", data: "x"}, entry{name: ".wh.again"}, entry{name: "usr/lib/.wh.b"}),
	}
	x := tarindex.New()
	for i, l := range layers {
		if err := x.AddLayer(t.Context(), i, bytes.NewReader(l)); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]string{
		"/usr/lib/a": "1/1 upper a", "/lib/a": "1/1 upper a", "/usr/lib/b": "", "/hard": "1/0 lower b", "/hard2": "1/0 lower b",
		"/lib/c": "1/1 through a link", "/usr/lib/c": "1/1 through a link",
		"/opaque/x": "", "/opaque/y/z": "", "/opaque/new": "1/1 new", "/gone": "", "/tree/one/two": "",
		"/file": "", "/file/inside": "1/1 inside", "/dir": "1/1 a file now", "/dir/in": "", "/circle": "", "/circle/x": "",
		"/" + strings.Repeat("long/", 60) + "name": "0/0 needs a PAX header",
		"/empty": "1/1 ", "/up": "1/1 upper a", "/again": "2/2 x", "/": "", "/usr": "", "/nothing": "",
	} {
		got := ""
		if f, ok := x.Find(path); ok {
			got = fmt.Sprintf("%d/%d ", f.Entry, f.Layer)
			for _, e := range f.Extents(nil) {
				got += string(layers[e.Layer][e.Offset : e.Offset+e.Length])
			}
		}
		if got != want {
			t.Errorf("Find(%q) = %q, want %q", path, got, want)
		}
	}
	if f, _ := x.Find("/lib/a"); f.Path != "/usr/lib/a" {
		t.Errorf("path of /lib/a: %q", f.Path)
	}
	if got, want := x.Size(), int64(len("lower b")+len("upper a")+len("through a link")+len("new")+len("inside")+len("a file now")+len("needs a PAX header")+len("x")); got != want {
		t.Errorf("Size = %d, want %d", got, want)
	}
}

func TestExtents(t *testing.T) {
	t.Parallel()
	f := tarindex.File{Layer: 2, Offset: 1000, Stored: 100, Size: 100}
	sparse := tarindex.File{Layer: 1, Offset: 512, Stored: 10, Size: 1 << 40, Sparse: true}
	r := func(off, n int64) trace.Range { return trace.Range{Offset: off, Length: n} }
	for name, c := range map[string]struct {
		f    tarindex.File
		in   []trace.Range
		want []tarindex.Extent
	}{
		"whole":       {f, nil, []tarindex.Extent{{Layer: 2, Offset: 1000, Length: 100}}},
		"none":        {f, []trace.Range{}, nil},
		"empty file":  {tarindex.File{}, nil, nil},
		"in order":    {f, []trace.Range{r(50, 10), r(0, 1)}, []tarindex.Extent{{Layer: 2, Offset: 1050, Length: 10}, {Layer: 2, Offset: 1000, Length: 1}}},
		"cut off":     {f, []trace.Range{r(96, 4096), r(100, 1), r(4096, 4096)}, []tarindex.Extent{{Layer: 2, Offset: 1096, Length: 4}}},
		"overflow":    {f, []trace.Range{r(1, 1<<62), r(0, 1<<63-1)}, []tarindex.Extent{{Layer: 2, Offset: 1001, Length: 99}, {Layer: 2, Offset: 1000, Length: 100}}},
		"nonsense":    {f, []trace.Range{r(-1, 5), r(0, 0), r(0, -1)}, nil},
		"sparse":      {sparse, []trace.Range{r(1<<30, 1), r(0, 1)}, []tarindex.Extent{{Layer: 1, Offset: 512, Length: 10}}},
		"sparse none": {sparse, []trace.Range{}, nil},
	} {
		if d := cmp.Diff(c.want, c.f.Extents(c.in)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

// GNU tar's forms of sparse files: the stored bytes are found, and are marked as such.
func TestSparse(t *testing.T) {
	t.Parallel()
	tool := testenv.Tool(t, "tar")
	dir := t.TempDir()
	f, err := os.OpenFile(filepath.Join(dir, "sparse"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(8) {
		if _, err := f.WriteAt([]byte("stored bytes"), i<<20); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(16<<20), f.Close(), os.WriteFile(filepath.Join(dir, "after"), []byte("after"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"--format=gnu", "--format=posix --sparse-version=0.0", "--format=posix --sparse-version=0.1", "--format=posix --sparse-version=1.0"} {
		args := append(strings.Fields(format), "--sparse", "-C", dir, "-cf", "-", "sparse", "after")
		b, err := exec.CommandContext(t.Context(), tool, args...).Output()
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > 1<<20 {
			t.Skipf("skipped: the file system of %s keeps no holes", dir)
		}
		x := tarindex.New()
		if err := x.AddLayer(t.Context(), 0, bytes.NewReader(b)); err != nil {
			t.Fatalf("%s: %v", format, err)
		}
		s, ok := x.Find("/sparse")
		if !ok || !s.Sparse || s.Size != 16<<20 || s.Stored < 8*12 || s.Stored > 100<<10 {
			t.Errorf("%s: %+v, %v", format, s, ok)
			continue
		}
		if n := bytes.Count(b[s.Offset:s.Offset+s.Stored], []byte("stored bytes")); n != 8 {
			t.Errorf("%s: %d of 8 pieces between %d and %d", format, n, s.Offset, s.Offset+s.Stored)
		}
		if a, ok := x.Find("/after"); !ok || a.Sparse || string(b[a.Offset:a.Offset+a.Stored]) != "after" {
			t.Errorf("%s: after: %+v", format, a)
		}
	}
}

func TestBadLayers(t *testing.T) {
	t.Parallel()
	good := makeTar(t, entry{name: "a", data: strings.Repeat("x", 5000)})
	for name, c := range map[string]struct {
		in   []byte
		want string
	}{
		"no tar":         {bytes.Repeat([]byte("nonsense"), 200), "invalid layer: at byte 512 of its tar"},
		"cut off":        {good[:1024], "invalid layer: at byte 1024 of its tar"},
		"gzip":           {[]byte("\x1f\x8b\x08nonsense"), "invalid layer: gzip"},
		"link nowhere":   {makeTar(t, entry{name: "l", link: "nowhere", kind: tar.TypeLink}), `"l": invalid layer: hard link to "nowhere", which is not there`},
		"nothing at all": {nil, ""},
	} {
		err := tarindex.New().AddLayer(t.Context(), 0, bytes.NewReader(c.in))
		if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, tarindex.ErrInvalid) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: AddLayer = %v, want %q", name, err, c.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := tarindex.New().AddLayer(ctx, 0, bytes.NewReader(good)); !errors.Is(err, context.Canceled) {
		t.Errorf("AddLayer after the end of its context = %v", err)
	}
}

func FuzzAddLayer(f *testing.F) {
	f.Add(makeTar(f, entry{name: "a/b", data: "x"}, entry{name: "a/.wh.b"}, entry{name: "l", link: "a", kind: tar.TypeSymlink}, entry{name: "l/c"}))
	f.Fuzz(func(t *testing.T, in []byte) {
		x := tarindex.New()
		for i := range 2 {
			if err := x.AddLayer(t.Context(), i, bytes.NewReader(in)); err != nil {
				return
			}
		}
		_ = x.Size()
		_, _ = x.Find("/l/c")
	})
}
