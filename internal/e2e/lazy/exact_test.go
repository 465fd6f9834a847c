package lazy_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
)

// TestRecordExact records the same start on a stock overlay and with --exact, of the plain image and of a Nydus image, and holds the lists
// against each other: the same files, no byte that is not certain, and not more than the stock run's upper bound.
func TestRecordExact(t *testing.T) {
	img := newImages(t)
	stock := record(t, "oci:"+img.source.Dir)
	upper, lower := bytesOf(stock)
	files := read(stock)
	for name, ref := range map[string]string{"plain": "oci:" + img.source.Dir, "nydus": img.ours(t, "plain")} {
		t.Run(name, func(t *testing.T) {
			l := record(t, ref, "--exact", "--scratch", t.TempDir())
			all, certain := bytesOf(l)
			if l.Grade != persist.GradeExact || all != certain {
				t.Errorf("grade %q with %d of %d bytes certain, want %q and all", l.Grade, certain, all, persist.GradeExact)
			}
			// A page of a large folio or two may differ from run to run.
			if all > upper || all < lower {
				t.Errorf("%d bytes, want between the %d that a stock run is sure of and its upper bound of %d", all, lower, upper)
			}
			if !l.Complete() {
				t.Errorf("the list has losses: %+v", l.Losses)
			}
			if name == "plain" && l.Digest != stock.Digest {
				t.Errorf("the list is of %s, want the plain image's %s", l.Digest, stock.Digest)
			}
			got := read(l)
			for path := range files {
				if !got[path] {
					t.Errorf("%s is not in the exact list", path)
				}
			}
		})
	}
}

// record records a start of an image and returns the list.
func record(t *testing.T, ref string, args ...string) *persist.List {
	t.Helper()
	name := filepath.Join(t.TempDir(), "list")
	run(t, testenv.Binary(t, "optimizer"), append(append([]string{"record", "--quiet", "--server-path", testenv.Binary(t, "optimizer-server"), "--timeout", "2m", "-o", name}, args...), ref)...)
	f, err := os.Open(name)
	must(t, err)
	defer f.Close()
	l, err := persist.Read(f)
	must(t, err)
	return l
}

// bytesOf returns how many bytes the ranges of a list have, and how many of them are certain.
func bytesOf(l *persist.List) (all, certain int64) {
	for _, a := range l.Accesses {
		for _, r := range a.Ranges {
			all += r.Length
			if r.Certain {
				certain += r.Length
			}
		}
	}
	return all, certain
}

// read returns the files of a list of which bytes were touched for certain.
func read(l *persist.List) map[string]bool {
	files := map[string]bool{}
	for _, a := range l.Accesses {
		for _, r := range a.Ranges {
			if r.Certain {
				files[a.Path] = true
			}
		}
	}
	return files
}
