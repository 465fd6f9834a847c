package converter_test

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/testenv"
	nydus "github.com/headstart-oci/headstart/pkg/builder/converter"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// tableOf returns the paths that the prefetch table of a bootstrap names.
func tableOf(t *testing.T, boot []byte) (out []string) {
	t.Helper()
	img := opened(t, boot)
	for _, ino := range img.Prefetch {
		if err := img.Walk(func(p string, i *rafs.Inode) error {
			if i == ino {
				out = append(out, p)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// TestPackPrefetch: the paths that a layer is packed with are in the table of its own bootstrap, which nydus-image merges, and
// in that of the image unless the merge has paths of its own.
func TestPackPrefetch(t *testing.T) {
	testenv.Root(t)
	eachVersion(t, func(t *testing.T, version string) {
		upper := tarOf(t, "d/", "d/f=1", "e=2", ".wh.gone")
		blobs := [][]byte{
			pack(t, tarOf(t, "a=3", "gone=4"), nydus.PackOption{FsVersion: version, PrefetchPatterns: "/gone\n/a\n"}),
			pack(t, upper, nydus.PackOption{FsVersion: version, PrefetchPatterns: "/e\n/missing\nrelative\n/d/\n/e"}),
		}
		for i, want := range [][]string{{"/gone", "/a"}, {"/e", "/d"}} {
			own, err := rafs.ReadInline(bytes.NewReader(blobs[i]), int64(len(blobs[i])))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, tableOf(t, own)); diff != "" {
				t.Errorf("table of layer %d (-want +got):\n%s", i, diff)
			}
		}
		for patterns, want := range map[string][]string{"": {"/a", "/e", "/d"}, "/d/f": {"/d/f"}} {
			boot, _ := merge(t, blobs, nydus.MergeOption{PrefetchPatterns: patterns})
			if diff := cmp.Diff(want, tableOf(t, boot)); diff != "" {
				t.Errorf("table of the image for %q (-want +got):\n%s", patterns, diff)
			}
			path, dir := store(t, boot, blobs)
			nydusImage(t, "check", "--blob-dir", dir, path)
			if diff := cmp.Diff(map[string]string{"/a": "3", "/d/f": "1", "/e": "2"}, served(t, boot, blobs)); diff != "" {
				t.Errorf("nydusd (-want +got):\n%s", diff)
			}
		}
		theirs := nydusMerge(t, blobs)
		if diff := cmp.Diff(map[string]string{"/a": "3", "/d/f": "1", "/e": "2"}, served(t, theirs, blobs)); diff != "" {
			t.Errorf("merged by nydus-image (-want +got):\n%s", diff)
		}
		// A layer without data has no blob in its bootstrap, which then has no table either.
		empty := pack(t, tarOf(t, "g/"), nydus.PackOption{FsVersion: version, PrefetchPatterns: "/g"})
		own, err := rafs.ReadInline(bytes.NewReader(empty), int64(len(empty)))
		if err != nil {
			t.Fatal(err)
		}
		if got := tableOf(t, own); got != nil {
			t.Errorf("table of a layer without data: %v", got)
		}
		plain := pack(t, upper, nydus.PackOption{FsVersion: version})
		boot, _ := merge(t, [][]byte{plain, empty}, nydus.MergeOption{})
		if diff := cmp.Diff([]string{"/"}, tableOf(t, boot)); diff != "" {
			t.Errorf("table of an image of layers without (-want +got):\n%s", diff)
		}
	})
}
