package lazy_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// A daemon that takes a mount over and cannot reach its image serves what is local, says EIO for the rest, and goes on when the
// image is back.
func TestTakeOverWithoutImage(t *testing.T) { mostlyEROFS(t, testTakeOverWithoutImage) }

func testTakeOverWithoutImage(t *testing.T, b *box) {
	r := layout(t)
	image := filepath.Join(b.dir, "image")
	if err := os.CopyFS(image, os.DirFS(strings.TrimPrefix(r.Reference, "oci:"))); err != nil {
		t.Fatal(err)
	}
	r.Reference = "oci:" + image
	m := b.mount(b.mountpoint("mnt"), r)
	name := biggest(t, m.Dir)
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	before := b.status()
	if local := before.Mounts[0].Local; local == 0 || local >= m.Total {
		t.Fatalf("%d of %d bytes are local, want some", local, m.Total)
	}
	away := image + "-away"
	if err := os.Rename(image, away); err != nil {
		t.Fatal(err)
	}
	b.killDaemon()
	next := 0
	eventually(t, func() string {
		s, err := b.client.Status(t.Context(), false)
		if err != nil || s.PID == before.PID || len(s.Mounts) != 1 || s.Mounts[0].State != lazy.StateLazy {
			return fmt.Sprintf("after %d was killed: %+v, %v, want another daemon with a lazy mount", before.PID, s, err)
		}
		next = s.PID
		return ""
	})
	if err := uncache(name); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read what is local: %d bytes, %v, want %d", len(got), err, len(want))
	}
	if err := compareErr(t, m.Dir); err == nil {
		t.Error("a tree whose image is gone compares")
	} else if text := err.Error(); !strings.Contains(text, "Input/output error") && !strings.Contains(text, "Errno 5") {
		t.Errorf("%v, want EIO", err)
	}
	if err := os.Rename(away, image); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string {
		if err := compareErr(t, m.Dir); err != nil {
			return err.Error()
		}
		return ""
	})
	if done, err := b.client.Wait(t.Context(), m.Device); err != nil || done.State != lazy.StateComplete || done.Local != m.Total {
		t.Errorf("Wait() = %+v, %v, want complete with %d bytes", done, err, m.Total)
	}
	if pid := b.status().PID; pid != next {
		t.Errorf("daemon %d answers, want %d: it died", pid, next)
	}
}

// uncache has the kernel drop what it has read of a file.
func uncache(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
