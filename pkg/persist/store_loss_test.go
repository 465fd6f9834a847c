package persist_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// Upstream's files of a list with loss say so in a file beside them, and yield to the next list.
func TestStoreLoss(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	save := func(container, path string, losses ...trace.Loss) {
		t.Helper()
		l := one("nginx", container, path)
		l.Losses = losses
		if _, err := s.Save(l, persist.SaveOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	want := func(paths, loss string) {
		t.Helper()
		for name, want := range map[string]string{"library/nginx:latest": paths, "library/nginx:latest.incomplete": loss} {
			got, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			if string(got) != want {
				t.Errorf("%s = %q, want %q", name, got, want)
			}
		}
	}
	save("c1", "/first", trace.Loss{Reason: "overflow", Count: -1, Detail: "two\nlines"})
	want("/first\n", "overflow -1 two\\nlines\n")
	save("c2", "/second", trace.Loss{Reason: "late", Count: 3})
	want("/second\n", "late 3 \n")
	save("c3", "/third")
	want("/third\n", "")
	save("c4", "/fourth", trace.Loss{Reason: "late", Count: 3})
	want("/third\n", "")
}

// Beside each name of upstream's files stands that they have losses, and beside no other image's.
func TestStoreLossOfOtherNames(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	save := func(ref, path string, losses ...trace.Loss) persist.Saved {
		t.Helper()
		l := one(ref, "c", path)
		l.Losses = losses
		saved, err := s.Save(l, persist.SaveOptions{Overwrite: true, Timeout: 5 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		return saved
	}
	late := trace.Loss{Reason: "late", Count: 3}
	marks := func(want ...string) {
		t.Helper()
		var got []string
		for _, name := range tree(t, dir) {
			if strings.Contains(name, ".incomplete") {
				got = append(got, name)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("marks %q, want %q", got, want)
		}
	}
	all := []string{
		"library/nginx:latest.incomplete",
		"library/nginx:latest.timeout5s.incomplete -> nginx:latest.incomplete",
		"nginx:latest.incomplete -> library/nginx:latest.incomplete",
		"nginx:latest.timeout5s.incomplete -> library/nginx:latest.incomplete",
	}
	save("nginx", "/first", late)
	marks(all...)
	if got, err := os.ReadFile(filepath.Join(dir, "nginx:latest.incomplete")); err != nil || string(got) != "late 3 \n" {
		t.Errorf("beside the short name: %q, %v", got, err)
	}
	save("nginx", "/second")
	marks()
	save("nginx", "/third", late)
	// The short name becomes another image's, whose list has no loss.
	save("ghcr.io/nginx", "/fourth")
	marks(all[0], all[1])
	save("nginx", "/fifth", late)
	marks(all[0], all[1], all[3]) // the short name with the limit is the last one's
	save("ghcr.io/nginx", "/sixth", late)
	save("nginx", "/seventh")
	marks("nginx:latest.incomplete")
	// A tag that reads like a mark: no list is taken for one, and none is removed as one.
	save("ghcr.io/nginx", "/eighth")
	if saved := save("nginx:latest.incomplete", "/ninth"); saved.Native == "" || saved.Paths != "" {
		t.Errorf("saved %+v, want the native list alone", saved)
	}
	marks()
}
