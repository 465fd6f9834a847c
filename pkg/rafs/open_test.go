package rafs_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestWaysToOpen opens images of the real nydus-image in each way: strictly they are what they are, and the tables alone
// say the same of the blobs. What is no bootstrap is none in any way.
func TestWaysToOpen(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob(filepath.Join(testenv.Fixtures(t), "nydus", "*"))
	must(t, err)
	if len(names) < 6 {
		t.Fatalf("%d fixtures", len(names))
	}
	for _, dir := range names {
		s := loadFixture(t, filepath.Base(dir))
		r, size := bytes.NewReader(s.bootstrap), int64(len(s.bootstrap))
		want, err := rafs.Open(r, size)
		must(t, err)
		strict, err := rafs.OpenStrict(r, size)
		must(t, err)
		tables, err := rafs.OpenTables(r, size)
		must(t, err)
		var entries, strictEntries int
		must(t, want.Walk(func(string, *rafs.Inode) error { entries++; return nil }))
		must(t, strict.Walk(func(string, *rafs.Inode) error { strictEntries++; return nil }))
		if entries == 0 || entries != strictEntries {
			t.Errorf("%s: OpenStrict has %d entries, want %d", dir, strictEntries, entries)
		}
		bare := *want
		bare.Root, bare.Prefetch = nil, nil
		if d := cmp.Diff(&bare, tables); d != "" {
			t.Errorf("%s: OpenTables, want what Open has (-), got (+):\n%s", dir, d)
		}
		for _, open := range []func() (*rafs.Image, error){
			func() (*rafs.Image, error) { return rafs.OpenTables(bytes.NewReader(s.bootstrap[1:]), size-1) },
			func() (*rafs.Image, error) { return rafs.OpenStrict(bytes.NewReader(s.bootstrap[1:]), size-1) },
		} {
			if img, err := open(); img != nil || !errors.Is(err, rafs.ErrInvalid) {
				t.Errorf("%s without its first byte: %v, %v, want ErrInvalid", dir, img, err)
			}
		}
	}
}
