package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// Handles of Linux 6.18 without nfs_export: of a file of the image, and of one that the
// run made.
const (
	lowerHandle = "\x00\x00\x00\x00\xfb\x1d\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xd9\xc7\x9d\x00\x7e\x10\xba\x36"
	upperHandle = "\x00\x00\x00\x00\xfb\x1d\x04\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xde\xc7\x9d\x00\xd5\xa5\xab\x4f"
)

func TestOverlayUpper(t *testing.T) {
	tests := map[string]struct {
		kind      int32
		b         string
		upper, ok bool
	}{
		"lower":           {ovlFileIDV1, lowerHandle, false, true},
		"upper":           {ovlFileIDV1, upperHandle, true, true},
		"old form, lower": {ovlFileIDV0, lowerHandle[3:], false, true},
		"old form, upper": {ovlFileIDV0, upperHandle[3:], true, true},
		"ext4":            {1, lowerHandle, false, false},
		"magic":           {ovlFileIDV1, "\x00\x00\x00\x00\xfa" + lowerHandle[5:], false, false},
		"version":         {ovlFileIDV1, "\x00\x00\x00\x01\xfb" + lowerHandle[5:], false, false},
		"short":           {ovlFileIDV1, lowerHandle[:23], false, false},
		"shortest":        {ovlFileIDV1, lowerHandle[:24], false, true},
		"empty":           {ovlFileIDV1, "", false, false},
	}
	for name, tt := range tests {
		if upper, ok := overlayUpper(tt.kind, []byte(tt.b)); upper != tt.upper || ok != tt.ok {
			t.Errorf("%s: overlayUpper = %v, %v; want %v, %v", name, upper, ok, tt.upper, tt.ok)
		}
	}
}

// FuzzOverlayUpper holds that no handle makes it panic or answer without knowing.
func FuzzOverlayUpper(f *testing.F) {
	f.Add(int32(ovlFileIDV1), []byte(lowerHandle))
	f.Add(int32(ovlFileIDV1), []byte(upperHandle))
	f.Add(int32(ovlFileIDV0), []byte(upperHandle[3:]))
	f.Fuzz(func(t *testing.T, kind int32, b []byte) {
		if upper, ok := overlayUpper(kind, b); upper && !ok {
			t.Error("upper and not ok")
		}
	})
}

// TestOrigin holds the two ways of telling files of the image from others, by handle and
// by the writable layer, against the same overlay.
func TestOrigin(t *testing.T) {
	dir := t.TempDir()
	testenv.MountNamespace(t, func() error {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return err
		}
		for _, d := range []string{"lower/sub", "upper", "work", "merged"} {
			if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
				return err
			}
		}
		for _, f := range []string{"plain", "changed", "deleted", "replaced", "sub/deep"} {
			if err := os.WriteFile(filepath.Join(dir, "lower", f), []byte("x"), 0o644); err != nil {
				return err
			}
		}
		options := fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", dir)
		if err := unix.Mount("overlay", dir+"/merged", "overlay", 0, options); err != nil {
			return err
		}
		return checkOrigin(t, dir)
	})
}

func checkOrigin(t *testing.T, dir string) error {
	open := func(name string) *os.File {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		}
		return f
	}
	merged, upper := open("merged"), open("upper")
	fds, err := os.Open("/proc/self/fd")
	if err != nil {
		return err
	}
	deleted := open("merged/deleted")
	for _, f := range []string{"changed", "made", "madeThenGone"} {
		w, err := os.OpenFile(filepath.Join(dir, "merged", f), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		if _, err := w.WriteString("y"); err != nil {
			return err
		}
		if err := w.Close(); err != nil {
			return err
		}
	}
	gone := open("merged/madeThenGone")
	if err := errors.Join(os.Remove(dir+"/merged/deleted"), os.Remove(dir+"/merged/madeThenGone"),
		os.WriteFile(dir+"/merged/new", nil, 0o644), os.Rename(dir+"/merged/new", dir+"/merged/replaced")); err != nil {
		return err
	}
	files := map[string]struct {
		f    *os.File
		want whence
	}{
		"/plain": {open("merged/plain"), image}, "/sub/deep": {open("merged/sub/deep"), image},
		"/changed": {open("merged/changed"), image}, "/deleted": {deleted, image},
		"/made": {open("merged/made"), made}, "/replaced": {open("merged/replaced"), made},
		"/madeThenGone": {gone, made},
	}
	o := newOrigin(&target{mount: &mountinfo.Info{FSType: "overlay"}, upper: int(upper.Fd()), view: int(merged.Fd()), fds: int(fds.Fd())})
	for p, file := range files {
		if got := o.ofHandle(int(file.f.Fd())); got != file.want && o.handles {
			t.Errorf("by handle: %s is %v, want %v", p, got, file.want)
		}
		if got := o.madeAt(p); got != (file.want == made) {
			t.Errorf("by layer: %s made is %v, want %v", p, got, file.want == made)
		}
		if err := file.f.Close(); err != nil {
			return err
		}
	}
	if !o.handles {
		t.Log("this kernel's overlay has no handles for every file")
	}
	return errors.Join(merged.Close(), upper.Close(), fds.Close())
}

func TestMountOptions(t *testing.T) {
	for in, want := range map[string]string{
		"rw,lowerdir=/a:/b,upperdir=/up/fs,workdir=/w":  "/up/fs",
		"rw,lowerdir=/a:/b":                             "",
		`rw,lowerdir+=/a,upperdir=/with\040space\134,x`: `/with space\`,
		`rw,upperdir=/broken\04`:                        `/broken\04`,
		`rw,upperdir=/broken\999`:                       `/broken\999`,
		"":                                              "",
	} {
		if got := upperDir(in); got != want {
			t.Errorf("upperDir(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestRewrite(t *testing.T) {
	tests := []struct {
		r    rewrite
		in   string
		want string
		ok   bool
	}{
		{rewrite{"", "/"}, "/usr/x", "/usr/x", true},
		{rewrite{"/mnt", "/usr"}, "/mnt/x", "/usr/x", true},
		{rewrite{"/mnt", "/usr"}, "/mntx", "", false},
		{rewrite{"/mnt", "/usr"}, "/other", "", false},
		{rewrite{"/mnt/f", "/etc/f"}, "/mnt/f", "/etc/f", true},
		{rewrite{"/a/b", "/"}, "/a/b/c", "/c", true},
	}
	for _, tt := range tests {
		if got, ok := tt.r.apply(tt.in); got != tt.want || ok != tt.ok {
			t.Errorf("%+v.apply(%q) = %q, %v; want %q, %v", tt.r, tt.in, got, ok, tt.want, tt.ok)
		}
	}
}
