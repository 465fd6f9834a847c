package lazy_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// A mount that was made by way of a symbolic link is unmounted by the same name, and by the directory's own. A file, and a link to nothing, are no
// places to mount at.
func TestMountAtLink(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir, link := b.mountpoint("mnt"), filepath.Join(b.dir, "link")
	nothing, file := filepath.Join(b.dir, "nothing"), filepath.Join(b.dir, "file")
	if err := errors.Join(os.Symlink("mnt", link), os.Symlink("away", nothing), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]error{nothing: unix.ENOENT, file: unix.ENOTDIR} {
		if _, err := b.client.Mount(t.Context(), name, b.of(loose(t, "v6-zstd"))); !errors.Is(err, want) {
			t.Errorf("Mount(%s) = %v, want %v", name, err, want)
		}
	}
	for _, name := range []string{link, dir, filepath.Join(link, ".")} {
		m, err := b.client.Mount(t.Context(), link, b.of(loose(t, "v6-zstd")))
		if err != nil || m.Dir != dir {
			t.Fatalf("Mount(link) = %+v, %v, want it at %s", m, err, dir)
		}
		held, err := os.Open(filepath.Join(dir, "app"))
		if err != nil {
			t.Fatal(err)
		}
		err = b.client.Unmount(t.Context(), name, false)
		if !errors.Is(err, lazy.ErrBusy) || !errors.Is(err, unix.EBUSY) || strings.Contains(err.Error(), "\n") {
			t.Errorf("Unmount(%s, in use) = %q, want ErrBusy in one line", name, err)
		}
		// A file that is closed soon, as by a child of another program at its execve, is waited for.
		if err := errors.Join(held.Close(), unmountSoon(func() error { return b.client.Unmount(t.Context(), name, false) })); err != nil {
			t.Errorf("Unmount(%s) = %v", name, err)
		}
	}
}
