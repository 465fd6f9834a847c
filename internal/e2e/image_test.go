package e2e_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// What Nydus' tools look for in an image; docs/rafs-format.md section 5.
const (
	mediaTypeNydusBlob   = "application/vnd.oci.image.layer.nydus.blob.v1"
	annotationBlob       = "containerd.io/snapshot/nydus-blob"
	annotationBootstrap  = "containerd.io/snapshot/nydus-bootstrap"
	annotationVersion    = "containerd.io/snapshot/nydus-fs-version"
	annotationSeparated  = "containerd.io/snapshot/nydus-separated-blob-with-prefetch-files"
	blockSize            = 4096
	differencesShown     = 15
	bootstrapEntryInTree = "image/image.boot"
)

// rebuilt is an optimized image in an OCI layout, opened without the project's own
// reader of layouts.
type rebuilt struct {
	layout    string
	manifest  ocispec.Manifest
	bootstrap string // the bare bootstrap
	prefetch  string // hex id of the prefetch blob
	image     *rafs.Image
	devices   []string // per blob of the bootstrap, its expanded data
}

// openRebuilt opens the manifest that digest names in the layout; every blob of it must
// hash to its name.
func openRebuilt(t *testing.T, layout string, manifest digest.Digest) *rebuilt {
	t.Helper()
	r := &rebuilt{layout: layout}
	must(t, json.Unmarshal(r.blob(t, manifest), &r.manifest))
	r.blob(t, r.manifest.Config.Digest)
	layers := r.manifest.Layers
	if len(layers) == 0 {
		t.Fatal("rebuilt image has no layers")
	}
	last := layers[len(layers)-1]
	if last.Annotations[annotationBootstrap] != "true" || last.Annotations[annotationVersion] != "6" {
		t.Errorf("last layer = %+v, want the bootstrap of version 6", last)
	}
	r.prefetch = last.Annotations[annotationSeparated]
	for _, l := range layers[:len(layers)-1] {
		if l.MediaType != mediaTypeNydusBlob || l.Annotations[annotationBlob] != "true" {
			t.Errorf("layer %s = %+v, want a Nydus blob", l.Digest, l)
		}
		if got := fileDigest(t, r.path(l.Digest)); got != l.Digest {
			t.Errorf("blob %s hashes to %s", l.Digest, got)
		}
	}
	r.bootstrap = filepath.Join(t.TempDir(), "bootstrap")
	must(t, os.WriteFile(r.bootstrap, bootstrapOf(t, r.blob(t, last.Digest)), 0o644))
	r.open(t)
	return r
}

func (r *rebuilt) path(d digest.Digest) string {
	return filepath.Join(r.layout, "blobs", d.Algorithm().String(), d.Encoded())
}

// blob returns the verified bytes of a small blob.
func (r *rebuilt) blob(t *testing.T, d digest.Digest) []byte {
	t.Helper()
	data, err := os.ReadFile(r.path(d))
	must(t, err)
	if got := digest.FromBytes(data); got != d {
		t.Fatalf("blob %s hashes to %s", d, got)
	}
	return data
}

func fileDigest(t *testing.T, path string) digest.Digest {
	t.Helper()
	sum, err := hashFile(path)
	must(t, err)
	return digest.NewDigestFromEncoded(digest.SHA256, sum)
}

func bootstrapOf(t *testing.T, layer []byte) []byte {
	t.Helper()
	zr, err := gzip.NewReader(bytes.NewReader(layer))
	must(t, err)
	tr := tar.NewReader(zr)
	for {
		h, err := tr.Next()
		if err != nil {
			t.Fatalf("no %s in the bootstrap layer: %v", bootstrapEntryInTree, err)
		}
		if h.Name == bootstrapEntryInTree {
			data, err := io.ReadAll(tr)
			must(t, err)
			return data
		}
	}
}

// open reads the bootstrap and expands its blobs into device files.
func (r *rebuilt) open(t *testing.T) {
	t.Helper()
	f, err := os.Open(r.bootstrap)
	must(t, err)
	defer f.Close()
	info, err := f.Stat()
	must(t, err)
	r.image, err = rafs.Open(f, info.Size())
	must(t, err)
	dir := t.TempDir()
	for i, b := range r.image.Blobs {
		device := filepath.Join(dir, fmt.Sprintf("device-%d", i))
		if err := expand(t, r.image, i, r.path(digest.NewDigestFromEncoded(digest.SHA256, b.ID)), device); err != nil {
			t.Fatalf("expand blob %d: %v", i, err)
		}
		r.devices = append(r.devices, device)
	}
}

func expand(t *testing.T, img *rafs.Image, index int, blob, device string) (err error) {
	t.Helper()
	in, err := os.Open(blob)
	if err != nil {
		return err
	}
	defer in.Close()
	reader, err := rafs.OpenBlob(in, img.Blobs[index])
	if err != nil {
		return err
	}
	out, err := os.Create(device)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	return img.ExpandBlob(t.Context(), index, reader, out)
}

// verify holds the image against the container's merged root and, when list is not
// nil, its prefetch blob against what the list names, in order.
func (r *rebuilt) verify(t *testing.T, root string, list *persist.List) {
	t.Helper()
	r.fsck(t)
	r.nydusCheck(t)
	mounted := testenv.MountEROFS(t, r.bootstrap, r.devices...)
	got, err := readTree(mounted)
	must(t, err)
	want, err := readTree(root)
	must(t, err)
	if diff := diffTrees(got, want, differencesShown); len(diff) > 0 {
		t.Errorf("the mounted image differs from the container's root:\n%s", strings.Join(diff, "\n"))
	}
	t.Logf("rebuilt: %d entries equal, %d blobs", len(want), len(r.image.Blobs))
	if list != nil {
		r.verifyPrefetch(t, root, list)
	}
}

func (r *rebuilt) fsck(t *testing.T) {
	t.Helper()
	var args []string
	for _, d := range r.devices {
		args = append(args, "--device="+d)
	}
	out, err := exec.CommandContext(t.Context(), testenv.Tool(t, "fsck.erofs"), append(args, r.bootstrap)...).CombinedOutput()
	if err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

func (r *rebuilt) nydusCheck(t *testing.T) {
	t.Helper()
	t.Run("nydus-image", func(t *testing.T) {
		out, err := exec.CommandContext(t.Context(), testenv.Tool(t, "nydus-image"), "check", "--bootstrap", r.bootstrap).CombinedOutput()
		if err != nil {
			t.Errorf("nydus-image check: %v\n%s", err, out)
		}
	})
}

// verifyPrefetch computes from the files of root what the prefetch blob must hold when
// expanded: every chunk of the listed files of which a byte was touched, by first touch, each once, at block
// boundaries; and the listed files must point into it.
func (r *rebuilt) verifyPrefetch(t *testing.T, root string, list *persist.List) {
	t.Helper()
	if r.prefetch == "" {
		t.Fatal("no annotation names a prefetch blob")
	}
	index := slices.IndexFunc(r.image.Blobs, func(b rafs.Blob) bool { return b.ID == r.prefetch })
	if index != len(r.image.Blobs)-1 {
		t.Fatalf("prefetch blob %s has index %d of %d, want the last", r.prefetch, index, len(r.image.Blobs))
	}
	if n := len(r.manifest.Layers); n < 2 || r.manifest.Layers[n-2].Digest.Encoded() != r.prefetch {
		t.Errorf("layer before the bootstrap is not the prefetch blob %s", r.prefetch)
	}
	want, chunks, files := r.wantPrefetch(t, root, list)
	got, err := os.ReadFile(r.devices[index])
	must(t, err)
	if padded := len(want); len(got) > padded {
		t.Errorf("prefetch blob expands to %d bytes, want %d", len(got), padded)
	}
	if !bytes.Equal(got, want[:min(len(got), len(want))]) || roundUp(len(got)) != len(want) {
		t.Errorf("prefetch blob expands to %d bytes that are not the %d of %d listed files by first touch", len(got), len(want), files)
	}
	for _, a := range list.Accesses {
		ino := r.image.Lookup(a.Path)
		if ino == nil {
			t.Errorf("%s is listed and not in the image", a.Path)
			continue
		}
		for n, c := range ino.Chunks {
			if needed(a, n*int(r.image.ChunkSize), int(c.UncompressedSize)) && int(c.Blob) != index {
				t.Errorf("%s is listed and has a chunk in blob %d, want %d", a.Path, c.Blob, index)
				break
			}
		}
	}
	info, err := os.Stat(r.path(digest.NewDigestFromEncoded(digest.SHA256, r.prefetch)))
	must(t, err)
	t.Logf("prefetch blob: %d chunks of %d files, %.1f MB raw, %.1f MB stored", chunks, files, float64(len(want))/1e6, float64(info.Size())/1e6)
}

// wantPrefetch returns what the prefetch blob must expand to: chunks in the order of their first touch, those of one time in list order.
func (r *rebuilt) wantPrefetch(t *testing.T, root string, list *persist.List) (want []byte, chunks, files int) {
	t.Helper()
	type part struct {
		data []byte
		when time.Duration
	}
	var parts []*part
	seen := map[[sha256.Size]byte]*part{}
	latest := time.Duration(0)
	for _, a := range list.Accesses {
		path, err := resolveIn(root, a.Path)
		must(t, err)
		data, err := os.ReadFile(filepath.Join(root, path))
		must(t, err)
		files++
		latest = max(latest, a.Elapsed)
		at := 0
		for chunk := range slices.Chunk(data, int(r.image.ChunkSize)) {
			from := at
			at += len(chunk)
			if !needed(a, from, len(chunk)) {
				continue
			}
			when, sum := firstTouch(a, from, len(chunk), latest), sha256.Sum256(chunk)
			if p := seen[sum]; p != nil {
				p.when = min(p.when, when)
				continue
			}
			seen[sum] = &part{chunk, when}
			parts = append(parts, seen[sum])
		}
	}
	slices.SortStableFunc(parts, func(a, b *part) int { return cmp.Compare(a.when, b.when) })
	for _, p := range parts {
		want = append(want, p.data...)
		want = append(want, make([]byte, roundUp(len(want))-len(want))...)
	}
	return want, len(parts), files
}

// firstTouch returns when a run touched any of length bytes at offset first: at the beginning for what the container runtime read, and
// otherwise when no range says.
func firstTouch(a trace.Access, offset, length int, otherwise time.Duration) time.Duration {
	if a.How&trace.Runtime != 0 {
		return 0
	}
	first, known := otherwise, false
	for _, r := range a.Ranges {
		if r.Elapsed > 0 && r.Offset < int64(offset+length) && int64(offset) < r.Offset+r.Length && (!known || r.Elapsed < first) {
			first, known = r.Elapsed, true
		}
	}
	return first
}

// needed reports whether the run touched any of length bytes at offset.
func needed(a trace.Access, offset, length int) bool {
	return a.Ranges == nil || slices.ContainsFunc(a.Ranges, func(r trace.Range) bool {
		return r.Offset < int64(offset+length) && int64(offset) < r.Offset+r.Length
	})
}

func roundUp(n int) int { return (n + blockSize - 1) / blockSize * blockSize }

// sha is the hex sha256 of data.
func sha(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
