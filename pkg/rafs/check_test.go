package rafs_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// loadOCIFixture reads the image that the real nydusify made: blobs with inlined bootstrap and TOC.
func loadOCIFixture(t testing.TB, name string) *stored {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), "oci", name)
	read := func(name string) []byte {
		p, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		return p
	}
	var index ocispec.Index
	must(t, json.Unmarshal(read("index.json"), &index))
	blob := func(d ocispec.Descriptor) []byte { return read("blobs/sha256/" + d.Digest.Encoded()) }
	p := blob(index.Manifests[0])
	var manifest ocispec.Manifest
	must(t, json.Unmarshal(p, &manifest))
	if len(manifest.Layers) == 0 { // an index in the index
		must(t, json.Unmarshal(p, &index))
		must(t, json.Unmarshal(blob(index.Manifests[len(index.Manifests)-1]), &manifest))
	}
	s := &stored{blobs: map[string][]byte{}}
	for _, l := range manifest.Layers[:len(manifest.Layers)-1] {
		s.blobs[l.Digest.Encoded()] = blob(l)
	}
	z, err := gzip.NewReader(bytes.NewReader(blob(manifest.Layers[len(manifest.Layers)-1])))
	must(t, err)
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		if h.Name == "image/image.boot" {
			s.bootstrap, err = io.ReadAll(r)
			must(t, err)
		}
	}
	return s
}

func TestOCIFixture(t *testing.T) {
	t.Parallel()
	s := loadOCIFixture(t, "nydus-v6")
	report, err := s.check(rafs.CheckOptions{Data: true})
	if err != nil {
		t.Error(err)
	}
	t.Logf("%+v", report)
	img := s.open(t)
	for i, b := range img.Blobs {
		if b.Features&rafs.FeatureTOC == 0 {
			t.Errorf("blob %d has no TOC: features %#x", i, b.Features)
		}
	}
	twin := loadFixture(t, "v6-zstd")
	other := twin.open(t)
	got, want := flatten(t, img, img.FS(s.reader)), flatten(t, other, other.FS(twin.reader))
	got[0].Mtime, want[0].Mtime = 0, 0
	diff(t, "tree", got, want)
	// Every byte in front of the bootstrap is covered by some digest; one of each section is tried.
	for id, good := range s.blobs {
		for _, at := range []int{0, len(good) / 2, len(good) - 1, len(good) - 513, len(good) - 513 - 5*128, len(good) - 700} {
			p := bytes.Clone(good)
			p[at] ^= 0x10
			s.blobs[id] = p
			if _, err := s.check(rafs.CheckOptions{Data: true}); err == nil {
				t.Errorf("byte %d of %d of blob %s changed: Check sees nothing", at, len(good), id)
			}
		}
		s.blobs[id] = good
	}
}

// TestCheckFaults breaks what opening does not look at.
func TestCheckFaults(t *testing.T) {
	t.Parallel()
	le := binary.LittleEndian
	for name, c := range map[string]struct {
		want   string
		change func(s *stored, blob []byte) []byte
	}{
		"reserved bytes": {"reserved bytes", func(s *stored, b []byte) []byte { s.bootstrap[1130] = 1; return b }},
		"dirblkbits":     {"reserved bytes", func(s *stored, b []byte) []byte { s.bootstrap[1114] = 1; return b }},
		"checksum bit":   {"feature_compat", func(s *stored, b []byte) []byte { s.bootstrap[1032] = 1; return b }},
		"ext reserved":   {"reserved bytes", func(s *stored, b []byte) []byte { s.bootstrap[1300] = 1; return b }},
		"slot reserved":  {"reserved bytes", func(s *stored, b []byte) []byte { s.bootstrap[1408+100] = 1; return b }},
		"blob reserved":  {"reserved bytes", func(s *stored, b []byte) []byte { s.bootstrap[4096+240] = 1; return b }},
		"slot tag":       {"tag", func(s *stored, b []byte) []byte { s.bootstrap[1408] ^= 1; return b }},
		"slot blocks":    {"blocks", func(s *stored, b []byte) []byte { s.bootstrap[1472]++; return b }},
		"blocks":         {"blocks", func(s *stored, b []byte) []byte { s.bootstrap[1060]++; return b }},
		"nlink":          {"nlink", func(s *stored, b []byte) []byte { s.bootstrap[2*4096+4096+44]++; return b }},
		"blob digester":  {"digest_algo", func(s *stored, b []byte) []byte { s.bootstrap[4096+80] = 1; return b }},
		"missing blob":   {"no blob", func(_ *stored, _ []byte) []byte { return nil }},
		"short blob":     {"file size", func(_ *stored, b []byte) []byte { return b[:len(b)-1] }},
		"TOC name":       {"section name", func(_ *stored, b []byte) []byte { b[len(b)-512] = 'x'; return b }},
		"TOC size":       {"TOC", func(_ *stored, b []byte) []byte { b[len(b)-512+124] = '7'; return b }},
		"TOC entry":      {"sha256", func(_ *stored, b []byte) []byte { b[len(b)-513]++; return b }},
		"meta magic":     {"magic", func(_ *stored, b []byte) []byte { le.PutUint32(b[metaHeader(b):], 7); return b }},
		"meta entries":   {"ci_entries", func(_ *stored, b []byte) []byte { b[metaHeader(b)+12]++; return b }},
		"meta record":    {"blob.meta record", func(_ *stored, b []byte) []byte { b[metaHeader(b)-16*3]++; return b }},
		"chunk table": {"blob.meta record", func(s *stored, b []byte) []byte {
			s.bootstrap[le.Uint64(s.bootstrap[1176:])+48]++
			return b
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, _ := smallImage(t, combo{chunkSize: 4096, toc: true})
			s := b.build()
			id := b.img.Blobs[0].ID
			if p := c.change(s, s.blobs[id]); p != nil {
				s.blobs[id] = p
			} else {
				delete(s.blobs, id)
			}
			if _, err := s.check(rafs.CheckOptions{}); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Check = %v, want a fault about %q", err, c.want)
			}
		})
	}
}

// metaHeader finds the header of an uncompressed blob.meta.
func metaHeader(b []byte) int { return bytes.Index(b, []byte{0x0b, 0xb1, 0x0b, 0xb1}) }

func TestCheckGathersFaults(t *testing.T) {
	t.Parallel()
	b, _ := smallImage(t, combo{chunkSize: 4096})
	s := b.build()
	blob := s.blobs[b.img.Blobs[0].ID]
	for i := range b.img.Blobs[0].MetaOffset - 512 {
		blob[i] ^= 0xff
	}
	_, all := s.check(rafs.CheckOptions{Data: true})
	_, three := s.check(rafs.CheckOptions{Data: true, MaxFaults: 3, Workers: 1})
	if n := count(all); n < 6 {
		t.Errorf("%d faults of 8 bad chunks and an id: %v", n, all)
	}
	if n := count(three); n != 3 {
		t.Errorf("MaxFaults 3 gives %d: %v", n, three)
	}
	if !errors.Is(all, rafs.ErrDigest) {
		t.Errorf("Check = %v, want ErrDigest", all)
	}
	var f *rafs.FormatError
	if !errors.As(all, &f) || f.Got == nil || f.Want == nil {
		t.Errorf("no FormatError with got and want: %+v", f)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := rafs.Check(ctx, bytes.NewReader(s.bootstrap), int64(len(s.bootstrap)), s.file, rafs.CheckOptions{Data: true}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled Check = %v", err)
	}
	if _, err := rafs.Check(context.Background(), bytes.NewReader(s.bootstrap), int64(len(s.bootstrap)), nil, rafs.CheckOptions{Data: true}); err != nil {
		t.Errorf("Check of the bootstrap alone = %v", err)
	}
}

// count counts the errors joined below err.
func count(err error) int {
	for err != nil {
		if j, ok := err.(interface{ Unwrap() []error }); ok {
			return len(j.Unwrap())
		}
		err = errors.Unwrap(err)
	}
	return 1
}

func TestInspect(t *testing.T) {
	t.Parallel()
	b, _ := smallImage(t, smallCombo)
	b.img.Prefetch = []*rafs.Inode{b.img.Lookup("dir/one")}
	s := b.build()
	info, err := rafs.Inspect(bytes.NewReader(s.bootstrap), int64(len(s.bootstrap)))
	must(t, err)
	p, err := json.Marshal(info)
	must(t, err)
	for _, want := range []string{`"version":"v6"`, `"compressor":"zstd"`, `"digester":"blake3"`, `"id":"` + b.img.Blobs[0].ID, `"name":"chunk table"`, `"ALIGNED"`, `"prefetch_nids":[`, `"mapped_blkaddr":`} {
		if !strings.Contains(string(p), want) {
			t.Errorf("JSON lacks %s: %s", want, p)
		}
	}
	var end uint64
	for _, sec := range info.Sections {
		if sec.Offset < end || sec.Offset+sec.Size > uint64(len(s.bootstrap)) {
			t.Errorf("section %+v after %d", sec, end)
		}
		end = sec.Offset + sec.Size
	}
	if _, err := rafs.Inspect(bytes.NewReader(s.bootstrap[:100]), 100); !errors.Is(err, rafs.ErrInvalid) {
		t.Errorf("Inspect of 100 bytes = %v", err)
	}
}

// ExampleImage_Walk lists an image.
func ExampleImage_Walk() {
	img := &rafs.Image{Root: &rafs.Inode{Mode: 0o040755, Children: []rafs.Dirent{
		{Name: "etc", Inode: &rafs.Inode{Mode: 0o040755, Children: []rafs.Dirent{
			{Name: "hosts", Inode: &rafs.Inode{Mode: 0o100644, Size: 20}},
		}}},
	}}}
	_ = img.Walk(func(path string, ino *rafs.Inode) error {
		fmt.Println(ino.FileMode(), path)
		return nil
	})
	// Output:
	// drwxr-xr-x /
	// drwxr-xr-x /etc
	// -rw-r--r-- /etc/hosts
}
