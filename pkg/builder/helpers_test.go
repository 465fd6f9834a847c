package builder_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// file is a tar entry in short: a header and its data. Zero times are second 1000.
type file struct {
	tar.Header
	data string
}

func reg(name, data string) file {
	return file{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data}
}

func dir(name string, mode int64) file {
	return file{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}, ""}
}

func sym(name, target string) file {
	return file{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func link(name, target string) file {
	return file{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, ""}
}

func xattr(f file, name, value string) file {
	f.PAXRecords = map[string]string{"SCHILY.xattr." + name: value}
	return f
}

// makeTar writes entries as a tar.
func makeTar(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		f.Size = int64(len(f.data))
		if f.ModTime.IsZero() {
			f.ModTime = time.Unix(1000, 0)
		}
		if err := w.WriteHeader(&f.Header); err != nil {
			t.Fatalf("tar entry %q: %v", f.Name, err)
		}
		if _, err := io.WriteString(w, f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zst(t testing.TB, b []byte) []byte {
	t.Helper()
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return e.EncodeAll(b, nil)
}

// stored is a layer as a registry would have it.
func stored(mediaType string, plain, blob []byte) builder.Layer {
	return builder.Layer{
		Descriptor: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))},
		DiffID:     digest.FromBytes(plain),
		Open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(blob)), nil
		},
	}
}

func tarLayer(b []byte) builder.Layer { return stored(ocispec.MediaTypeImageLayer, b, b) }

// source makes an image of layers with a config that fits.
func source(t testing.TB, layers ...builder.Layer) builder.Source {
	t.Helper()
	var ids []digest.Digest
	var history []ocispec.History
	for _, l := range layers {
		ids = append(ids, l.DiffID)
		history = append(history, ocispec.History{CreatedBy: "layer"})
	}
	cfg, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{Architecture: "amd64", OS: "linux"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: ids},
		History:  history,
	})
	if err != nil {
		t.Fatal(err)
	}
	return builder.Source{Config: cfg, Layers: layers}
}

// tars makes an image of uncompressed layers.
func tars(t testing.TB, layers ...[]byte) builder.Source {
	t.Helper()
	var ls []builder.Layer
	for _, b := range layers {
		ls = append(ls, tarLayer(b))
	}
	return source(t, ls...)
}

// convert converts src in a directory of the test, and closes the result with it.
func convert(t testing.TB, src builder.Source, o builder.Options) *builder.Result {
	t.Helper()
	if o.TempDir == "" {
		o.TempDir = t.TempDir()
	}
	res, err := builder.Convert(t.Context(), src, o)
	if err != nil {
		t.Fatalf("Convert: %v", err)
	}
	t.Cleanup(func() {
		if err := res.Close(); err != nil {
			t.Error(err)
		}
	})
	return res
}

// openImage opens the bootstrap of res.
func openImage(t testing.TB, res *builder.Result) *rafs.Image {
	t.Helper()
	b, err := os.ReadFile(res.BootstrapPath)
	if err != nil {
		t.Fatal(err)
	}
	img, err := rafs.Open(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatalf("rafs.Open: %v", err)
	}
	return img
}

// openBlob opens the blob of res that b describes, for the time of the test.
func openBlob(t testing.TB, res *builder.Result, b rafs.Blob) (*rafs.BlobReader, error) {
	t.Helper()
	for _, f := range res.Blobs {
		if f.Descriptor.Digest.Encoded() != b.ID {
			continue
		}
		r, err := os.Open(f.Path)
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { r.Close() })
		return rafs.OpenBlob(r, b)
	}
	return nil, fmt.Errorf("no blob %s in the result", b.ID)
}

// item is what is compared of one name of a tree.
type item struct {
	Mode     uint32
	UID, GID uint32
	Mtime    int64 // nanoseconds
	Size     int64 // not of directories
	Rdev     uint64
	Data     string // sha256, or a symlink's target
	Xattrs   map[string]string
	Link     string // the first name of the same file
}

// dumpImage walks the image of res. Its io/fs cannot name files whose names are not UTF-8,
// so inodes are opened directly.
func dumpImage(t testing.TB, res *builder.Result) map[string]item {
	t.Helper()
	return dumpRAFS(t, openImage(t, res), func(b rafs.Blob) (*rafs.BlobReader, error) { return openBlob(t, res, b) })
}

// dumpRAFS reads a whole image.
func dumpRAFS(t testing.TB, img *rafs.Image, open func(rafs.Blob) (*rafs.BlobReader, error)) map[string]item {
	t.Helper()
	fsys := img.FS(open)
	first := map[*rafs.Inode]string{}
	out := map[string]item{}
	err := img.Walk(func(p string, ino *rafs.Inode) error {
		it := item{Mode: ino.Mode, UID: ino.UID, GID: ino.GID, Mtime: ino.Mtime*1e9 + int64(ino.MtimeNsec), Xattrs: map[string]string{}}
		for _, x := range ino.Xattrs {
			it.Xattrs[x.Name] = hex.EncodeToString(x.Value)
		}
		switch ino.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			h := sha256.New()
			if err := fsys.CopyFile(t.Context(), h, ino); err != nil {
				return err
			}
			it.Size, it.Data = int64(ino.Size), hex.EncodeToString(h.Sum(nil))
			if first[ino] == "" {
				first[ino] = strings.TrimPrefix(p, "/")
			}
			it.Link = first[ino]
		case unix.S_IFLNK:
			it.Size, it.Data = int64(ino.Size), ino.Target
		case unix.S_IFCHR, unix.S_IFBLK:
			major, minor := ino.Device()
			it.Rdev = unix.Mkdev(major, minor)
		}
		out[p] = it
		return nil
	})
	if err != nil {
		t.Fatalf("walk the image: %v", err)
	}
	return out
}

// dumpDir walks a directory of this machine.
func dumpDir(t testing.TB, root string) map[string]item {
	t.Helper()
	first := map[uint64]string{}
	out := map[string]item{}
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); errors.Is(err, unix.ENOENT) {
			return nil // an overlay lists whiteouts in directories that only one layer has
		} else if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		it := item{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: st.Mtim.Nano(), Xattrs: listXattrs(t, p)}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			it.Size, it.Data = st.Size, fmt.Sprintf("%x", sha256.Sum256(b))
			if first[st.Ino] == "" {
				first[st.Ino] = rel
			}
			it.Link = first[st.Ino]
		case unix.S_IFLNK:
			it.Size = st.Size
			it.Data, err = os.Readlink(p)
		case unix.S_IFCHR, unix.S_IFBLK:
			it.Rdev = st.Rdev
		}
		out[path.Join("/", rel)] = it
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func listXattrs(t testing.TB, p string) map[string]string {
	t.Helper()
	out := map[string]string{}
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		return out
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = hex.EncodeToString(value[:n])
	}
	return out
}

func sum(data string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(data))) }

// listOf makes an access list of whole files.
func listOf(paths ...string) *persist.List {
	l := &persist.List{Reference: "test", Platform: "linux/amd64", Engine: "fanotify", Grade: "file"}
	for _, p := range paths {
		l.Accesses = append(l.Accesses, trace.Access{Path: p, How: trace.Opened})
	}
	return l
}

// fixture opens the image of shared/fixtures that says what it means in expected.json.
func fixture(t testing.TB) builder.Source {
	t.Helper()
	return layout(t, filepath.Join(testenv.Fixtures(t), "oci", "source"))
}

// layout opens the first image of an OCI layout.
func layout(t testing.TB, root string) builder.Source {
	t.Helper()
	read := func(d digest.Digest, v any) []byte {
		b, err := os.ReadFile(filepath.Join(root, "blobs", "sha256", d.Encoded()))
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
		return b
	}
	b, err := os.ReadFile(filepath.Join(root, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(b, &index); err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	var cfg ocispec.Image
	read(index.Manifests[0].Digest, &m)
	src := builder.Source{Manifest: index.Manifests[0], Annotations: m.Annotations, Config: read(m.Config.Digest, &cfg)}
	for i, l := range m.Layers {
		src.Layers = append(src.Layers, builder.Layer{
			Descriptor: l, DiffID: cfg.RootFS.DiffIDs[i],
			Open: func(context.Context) (io.ReadCloser, error) {
				return os.Open(filepath.Join(root, "blobs", "sha256", l.Digest.Encoded()))
			},
		})
	}
	return src
}
