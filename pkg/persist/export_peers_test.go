package persist_test

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/recorder"
	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func pathsOf(paths ...string) *persist.List {
	l := &persist.List{Digest: "sha256:4c1d"}
	for _, p := range paths {
		l.Accesses = append(l.Accesses, trace.Access{Path: p})
	}
	return l
}

func peerList() *persist.List {
	l := pathsOf("/", "/usr/bin/app", "/etc/a b", "/bytes/\xff", "/usr/bin/app", "/never/read", "/<&>", "/trailing ")
	l.Accesses[5].Ranges = []trace.Range{}
	return l
}

// The record goes through stargz-snapshotter's own type, and its builder puts the files of
// the record first in the layer, in the record's order.
func TestWriteStargz(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	omitted, err := peerList().WriteStargz(&b, nil)
	if err != nil || omitted != 1 {
		t.Fatalf("WriteStargz = %d, %v, want 1, nil", omitted, err)
	}
	var paths []string
	for d := json.NewDecoder(bytes.NewReader(b.Bytes())); d.More(); {
		var e recorder.Entry
		if err := d.Decode(&e); err != nil {
			t.Fatal(err)
		}
		if e.LayerIndex != nil || e.ManifestDigest != "" {
			t.Errorf("entry %+v: want no layer", e)
		}
		paths = append(paths, e.Path)
	}
	if d := cmp.Diff([]string{"usr/bin/app", "etc/a b", "<&>", "trailing "}, paths); d != "" {
		t.Fatalf("paths (-want +got):\n%s", d)
	}

	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, name := range []string{"etc/", "etc/a b", "etc/other", "usr/", "usr/bin/", "usr/bin/app"} {
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: 3}
		if strings.HasSuffix(name, "/") {
			h.Typeflag, h.Size = tar.TypeDir, 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := io.WriteString(w, "abc"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var notFound []string
	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(layer.Bytes()), 0, int64(layer.Len())),
		estargz.WithPrioritizedFiles(paths), estargz.WithAllowPrioritizeNotFound(&notFound))
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	built, err := io.ReadAll(blob)
	if err != nil {
		t.Fatal(err)
	}
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(built), 0, int64(len(built))))
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string) int64 {
		e, ok := r.Lookup(name)
		if !ok {
			t.Fatalf("%s is not in the built layer", name)
		}
		return e.Offset
	}
	if app, ab, mark, other := at("usr/bin/app"), at("etc/a b"), at(estargz.PrefetchLandmark), at("etc/other"); app >= ab || ab >= mark || mark >= other {
		t.Errorf("offsets: app %d, a b %d, landmark %d, other %d; want them to rise", app, ab, mark, other)
	}
	if d := cmp.Diff([]string{"<&>", "trailing "}, notFound); d != "" {
		t.Errorf("not found (-want +got):\n%s", d)
	}
}

func TestWriteStargzWithLayers(t *testing.T) {
	t.Parallel()
	var got, want bytes.Buffer
	omitted, err := peerList().WriteStargz(&got, func(p string) (persist.Place, bool) {
		return persist.Place{Path: "/real" + p, Layer: len(p) % 3}, p != "/etc/a b"
	})
	if err != nil || omitted != 2 {
		t.Fatalf("WriteStargz = %d, %v, want 2, nil", omitted, err)
	}
	// What their recorder writes for the same.
	rec := recorder.New(&want)
	for _, p := range []string{"/usr/bin/app", "/<&>", "/trailing "} {
		layer := len(p) % 3
		if err := rec.Record(&recorder.Entry{Path: "real" + p, ManifestDigest: "sha256:4c1d", LayerIndex: &layer}); err != nil {
			t.Fatal(err)
		}
	}
	decode := func(b *bytes.Buffer) (out []recorder.Entry) {
		for d := json.NewDecoder(b); d.More(); {
			var e recorder.Entry
			if err := d.Decode(&e); err != nil {
				t.Fatal(err)
			}
			out = append(out, e)
		}
		return out
	}
	if d := cmp.Diff(decode(&want), decode(&got)); d != "" {
		t.Errorf("record (-theirs +ours):\n%s", d)
	}
}

// soci's parser needs cgo, so this holds to what cmd/soci/commands/internal/prefetch.go does:
// json.Unmarshal into []string, and strings.TrimSpace of each.
func TestWriteSOCI(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		l       *persist.List
		want    []string
		omitted int
	}{
		"some": {peerList(), []string{"/usr/bin/app", "/etc/a b", "/<&>"}, 2},
		"none": {pathsOf(), []string{}, 0},
		"odd":  {pathsOf("/x\u00a0", "/\u2028", "/y\n", "/z\ny", "/\"\\"), []string{"/z\ny", "/\"\\"}, 3},
	} {
		var b bytes.Buffer
		omitted, err := c.l.WriteSOCI(&b)
		if err != nil || omitted != c.omitted {
			t.Errorf("%s: WriteSOCI = %d, %v, want %d", name, omitted, err, c.omitted)
		}
		var files []string
		if err := json.Unmarshal(b.Bytes(), &files); err != nil {
			t.Fatalf("%s: %v in %s", name, err, b.Bytes())
		}
		for i := range files {
			if strings.TrimSpace(files[i]) != files[i] {
				t.Errorf("%s: %q would be cut", name, files[i])
			}
		}
		if d := cmp.Diff(c.want, files); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

// overlaybd has no Go module that parses the list: these are the rules of its
// src/prefetch.cpp (DynamicPrefetcher::reload).
func TestWriteOverlayBDFiles(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	l := pathsOf("/", "/usr/bin/app-1.0_x", "/etc/a b", "/b\xff", "/c++", "/ünicode", "/star*", "/.hidden/x")
	omitted, err := l.WriteOverlayBDFiles(&b)
	if want := "/usr/bin/app-1.0_x\n/.hidden/x\n"; err != nil || omitted != 5 || b.String() != want {
		t.Errorf("WriteOverlayBDFiles = %d, %v, %q, want 5, nil, %q", omitted, err, b.String(), want)
	}
	l = pathsOf()
	for i := range 5000 {
		l.Accesses = append(l.Accesses, trace.Access{Path: fmt.Sprintf("/usr/lib/python3/dist-packages/%04d", i)})
	}
	b.Reset()
	if omitted, err = l.WriteOverlayBDFiles(&b); err != nil || b.Len() > 65536 || b.Len() < 65536-100 || strings.Count(b.String(), "\n")+omitted != 5000 || !strings.HasPrefix(b.String(), "/usr/lib/python3/dist-packages/0000\n") {
		t.Errorf("WriteOverlayBDFiles of 5000 = %d, %v, %d bytes", omitted, err, b.Len())
	}
	b.Reset()
	if _, err = pathsOf("/", "/ü").WriteOverlayBDFiles(&b); !errors.Is(err, persist.ErrInvalid) || b.Len() != 0 {
		t.Errorf("WriteOverlayBDFiles of nothing = %v, %d bytes, want ErrInvalid and none", err, b.Len())
	}
}

// nydus-image cuts white space, in Unicode's sense, off a line and reads UTF-8 only; nydusify takes nothing for "/".
func TestWritePatterns(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	l := pathsOf("/b c", "/", "/end ", "/end\t", "/end\r", "/end\u00a0", "/end\u2028", "/a\nb", "/\xff", "/ in/[x]", "/ünicode", "/b c")
	omitted, err := l.WritePatterns(&b)
	if want := "/b c\n/ in/[x]\n/ünicode\n/b c\n"; err != nil || omitted != 8 || b.String() != want {
		t.Errorf("WritePatterns = %d, %v, %q, want 8, nil, %q", omitted, err, b.String(), want)
	}
	for _, l := range []*persist.List{pathsOf(), pathsOf("/", "/x ")} {
		b.Reset()
		if _, err := l.WritePatterns(&b); !errors.Is(err, persist.ErrInvalid) || b.Len() != 0 {
			t.Errorf("WritePatterns of nothing = %v, %d bytes, want ErrInvalid and none", err, b.Len())
		}
	}
}

// overlaybdReload reads a trace as src/prefetch.cpp (PrefetcherImpl::reload) does, with a
// checksum computed bit by bit.
func overlaybdReload(t *testing.T, b []byte) (frames []persist.TraceFrame) {
	t.Helper()
	if len(b) < 24 || binary.LittleEndian.Uint32(b) != 3270449184 || binary.LittleEndian.Uint64(b[8:])+24 != uint64(len(b)) {
		t.Fatalf("header %x of %d bytes", b[:min(24, len(b))], len(b))
	}
	var sum uint32
	for _, c := range b[24:] {
		sum ^= uint32(c)
		for range 8 {
			sum = sum>>1 ^ 0x82f63b78&-(sum&1)
		}
	}
	if got := binary.LittleEndian.Uint32(b[16:]); got != sum {
		t.Fatalf("checksum %#x, want %#x", got, sum)
	}
	for b = b[24:]; len(b) > 0; b = b[24:] {
		f := persist.TraceFrame{Layer: binary.LittleEndian.Uint32(b[4:]), Length: int64(binary.LittleEndian.Uint64(b[8:])), Offset: int64(binary.LittleEndian.Uint64(b[16:]))}
		if b[0] != 'R' || f.Length > 1<<20 || f.Length <= 0 {
			t.Fatalf("frame %x", b[:24])
		}
		frames = append(frames, f)
	}
	return frames
}

func TestWriteOverlayBDTrace(t *testing.T) {
	t.Parallel()
	// Their magic is the checksum of the format's name.
	if got := crc32.ChecksumIEEE([]byte("Container Image Trace Format")); got != 3270449184 {
		t.Errorf("magic: %d", got)
	}
	var b bytes.Buffer
	in := []persist.TraceFrame{{Layer: 3, Offset: 512, Length: 5}, {Layer: 0, Offset: 1 << 40, Length: 1<<20 + 7}, {Layer: 3, Offset: 0, Length: 1 << 20}}
	if err := persist.WriteOverlayBDTrace(&b, in); err != nil {
		t.Fatal(err)
	}
	want := []persist.TraceFrame{in[0], {Layer: 0, Offset: 1 << 40, Length: 1 << 20}, {Layer: 0, Offset: 1<<40 + 1<<20, Length: 7}, in[2]}
	if d := cmp.Diff(want, overlaybdReload(t, b.Bytes())); d != "" {
		t.Errorf("frames (-want +got):\n%s", d)
	}
	for _, bad := range [][]persist.TraceFrame{nil, {{Length: 0}}, {{Offset: -1, Length: 1}}, {{Offset: 1, Length: math.MaxInt64}}} {
		b.Reset()
		if err := persist.WriteOverlayBDTrace(&b, bad); !errors.Is(err, persist.ErrInvalid) || b.Len() != 0 {
			t.Errorf("WriteOverlayBDTrace(%v) = %v, %d bytes, want ErrInvalid and none", bad, err, b.Len())
		}
	}
}

func TestTouches(t *testing.T) {
	t.Parallel()
	l := &persist.List{Trace: trace.Trace{Accesses: []trace.Access{
		{Path: "/a", Elapsed: 5, Size: 9, Ranges: []trace.Range{rng(0, 1, 0, false), rng(1, 1, 30, true)}},
		{Path: "/b", Elapsed: 6, Size: 7},
		{Path: "/c", Elapsed: 7, Ranges: []trace.Range{}},
		{Path: "/d", Elapsed: 8, Ranges: []trace.Range{rng(4, 4, 9, true)}},
	}}}
	type touch struct {
		path  string
		r     trace.Range
		whole bool
	}
	want := []touch{
		{"/a", rng(0, 1, 5, false), false},
		{"/b", rng(0, 7, 6, false), true},
		{"/d", rng(4, 4, 9, true), false},
		{"/a", rng(1, 1, 30, true), false},
	}
	var got []touch
	for _, x := range l.Touches() {
		got = append(got, touch{x.Access.Path, x.Range, x.Whole})
	}
	if !slices.Equal(got, want) {
		t.Errorf("Touches = %v, want %v", got, want)
	}
}
