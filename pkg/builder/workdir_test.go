package builder_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/builder"
)

// A builder that was killed leaves its directory; the next conversion removes it, and only
// that: not a running builder's, not a new one, nothing of another name.
func TestSweepsWhatKilledBuildersLeft(t *testing.T) {
	o := builder.DefaultOptions()
	o.TempDir = t.TempDir()
	old := time.Now().Add(-time.Hour)
	for _, name := range []string{"headstart-build-dead", "headstart-build-alive", "headstart-build-new", "other"} {
		dir := filepath.Join(o.TempDir, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "blob"), []byte("data"), 0o600); err != nil {
			t.Fatal(err)
		}
		if name != "headstart-build-new" {
			if err := os.Chtimes(dir, old, old); err != nil {
				t.Fatal(err)
			}
		}
	}
	alive, err := os.Open(filepath.Join(o.TempDir, "headstart-build-alive"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(alive.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	res, err := builder.Convert(t.Context(), tars(t), o)
	if err != nil {
		t.Fatal(err)
	}
	// The directory of this conversion is locked until it is closed.
	dir, err := os.Open(filepath.Dir(res.Bootstrap.Path))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("lock of the result's directory = %v, want %v", err, unix.EWOULDBLOCK)
	}
	if err := errors.Join(dir.Close(), res.Close(), res.Close(), alive.Close()); err != nil {
		t.Error(err)
	}
	entries, err := os.ReadDir(o.TempDir)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if want := []string{"headstart-build-alive", "headstart-build-new", "other"}; !slices.Equal(left, want) {
		t.Errorf("left %v, want %v", left, want)
	}
}
