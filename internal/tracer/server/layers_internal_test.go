package server

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestLowerDirs(t *testing.T) {
	for in, want := range map[string][]string{
		"":                             nil,
		"rw,upperdir=/u,workdir=/w":    nil,
		"ro,lowerdir=/a":               {"/a"},
		"rw,lowerdir=/a:/b/c,upperdir": {"/a", "/b/c"},
		"rw,lowerdir=l/X:l/Y":          {"l/X", "l/Y"},
		`lowerdir=/with\040space:/b`:   {"/with space", "/b"},
		`lowerdir=/a\134:b:/c`:         {"/a:b", "/c"}, // as given: /a\:b:/c
		`lowerdir=/a\072b:/c`:          {"/a:b", "/c"}, // Linux 6.5 to 6.7
		`lowerdir=/a\134\134:/c`:       {`/a\`, "/c"},
		`lowerdir=/a\054b:/c`:          {"/a,b", "/c"},
		`lowerdir=/a::/data1::/data2`:  {"/a", "/data1", "/data2"},
		`lowerdir+=/a,lowerdir+=/b\040c,datadir+=/d:e,x=y`: {"/a", "/b c", "/d:e"},
		`lowerdir=/end\`:                       {"/end"},
		`lowerdir=/a\999`:                      {"/a999"},
		"lowerdir=" + strings.Repeat("/l:", 3): {"/l", "/l", "/l"},
	} {
		if got := lowerDirs(in); !slices.Equal(got, want) {
			t.Errorf("lowerDirs(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestSplitsData(t *testing.T) {
	for in, want := range map[string]bool{
		"rw,lowerdir=/a:/b,upperdir=/u":             false,
		"rw,lowerdir=/a:/b,metacopy=on":             true,
		"rw,lowerdir=/a::/data,redirect_dir=follow": true,
		"rw,lowerdir+=/a,datadir+=/b":               true,
		"rw,lowerdir=/a,metacopy=off":               false,
	} {
		if got := splitsData(in, false); got != want {
			t.Errorf("splitsData(%q) = %v, want %v", in, got, want)
		}
	}
	if !splitsData("lowerdir=/a", true) || splitsData("lowerdir=/a,metacopy=off", true) {
		t.Error("the module's default does not count where the options are silent, or counts where they are not")
	}
}

// FuzzLowerDirs holds that no options make it panic or return what is no name.
func FuzzLowerDirs(f *testing.F) {
	f.Add(`rw,lowerdir=/a\134:b:/c\040d,upperdir=/u`)
	f.Add(`lowerdir+=/a,datadir+=/b`)
	f.Fuzz(func(t *testing.T, in string) {
		total := 0
		for _, d := range lowerDirs(in) {
			total += len(d)
		}
		if total > len(in) {
			t.Errorf("%d bytes of names in %d of options", total, len(in))
		}
	})
}

// lowerOverlay mounts an overlay of lower directories, given as they are written in options, in the
// directory dir, into which it changes, and opens its layers as the server does.
func lowerOverlay(dir, lower string) ([]layer, error) {
	for _, d := range []string{"merged", "u/upper", "work"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if err := unix.Chdir(dir); err != nil {
		return nil, err
	}
	merged := filepath.Join(dir, "merged")
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/u/upper,workdir=%s/work", lower, dir, dir)
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		return nil, err
	}
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	own, err := mountinfo.GetMountsFromReader(bytes.NewReader(text), nil)
	if err != nil {
		return nil, err
	}
	for _, m := range own {
		if m.Mountpoint == merged {
			return openLayers(m, own, false)
		}
	}
	return nil, fmt.Errorf("%s is no mount point", merged)
}

// TestOpenLayers holds what the running kernel shows of lower directories with names that
// need escapes, and of relative ones, against the directories themselves.
func TestOpenLayers(t *testing.T) {
	for name, tt := range map[string]struct {
		dirs  []string
		lower string // with %[1]s for the directory
	}{
		"plain":    {[]string{"a", "b"}, "%[1]s/a:%[1]s/b"},
		"relative": {[]string{"l/A", "l/B"}, "l/A:l/B"},
		"odd":      {[]string{"a b", "c:d", `e\f`}, `%[1]s/a b:%[1]s/c\:d:%[1]s/e\\f`},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			testenv.MountNamespace(t, func() error {
				if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
					return err
				}
				for _, d := range tt.dirs {
					if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
						return err
					}
				}
				lower := tt.lower
				if strings.Contains(lower, "%") {
					lower = fmt.Sprintf(lower, dir)
				}
				layers, err := lowerOverlay(dir, lower)
				if err != nil {
					return err
				}
				defer func() { _ = closeLayers(layers) }()
				if len(layers) != len(tt.dirs) {
					return fmt.Errorf("%d layers, want %d", len(layers), len(tt.dirs))
				}
				for i, d := range tt.dirs {
					var got, want unix.Stat_t
					if err := unix.Fstatat(layers[i].fd, "", &got, unix.AT_EMPTY_PATH); err != nil {
						return err
					}
					if err := unix.Stat(filepath.Join(dir, d), &want); err != nil {
						return err
					}
					if got.Ino != want.Ino || layers[i].dev != want.Dev || layers[i].kind != "tmpfs" || layers[i].visible() {
						t.Errorf("layer %d: inode %d, %+v; want inode %d of %s", i, got.Ino, layers[i], want.Ino, d)
					}
				}
				return nil
			})
		})
	}
}

// TestShadowed holds the rules of an overlay against the kernel's: a file of a lower layer is in the
// merged tree or it is shadowed.
func TestShadowed(t *testing.T) {
	dir := t.TempDir()
	testenv.MountNamespace(t, func() error {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return err
		}
		files := []string{"plain", "covered", "white", "d/inwhite", "o/inopaque", "o/deep/er", "f/infile", "m/merged", "w/x/y"}
		for _, f := range files {
			p := filepath.Join(dir, "b", f)
			if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(p, nil, 0o644); err != nil {
				return err
			}
		}
		for _, d := range []string{"a/o", "a/m", "a/w"} {
			if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
				return err
			}
		}
		for _, w := range []string{"white", "d", "w/x"} {
			if err := unix.Mknod(filepath.Join(dir, "a", w), unix.S_IFCHR, 0); err != nil {
				return err
			}
		}
		for _, f := range []string{"covered", "f"} {
			if err := os.WriteFile(filepath.Join(dir, "a", f), nil, 0o644); err != nil {
				return err
			}
		}
		if err := unix.Setxattr(filepath.Join(dir, "a/o"), "trusted.overlay.opaque", []byte("y"), 0); err != nil {
			return err
		}
		layers, err := lowerOverlay(dir, dir+"/a:"+dir+"/b")
		if err != nil {
			return err
		}
		defer func() { _ = closeLayers(layers) }()
		tgt := &target{layers: layers}
		for _, f := range files {
			var merged, lower unix.Stat_t
			err := unix.Lstat(filepath.Join(dir, "merged", f), &merged)
			if err := unix.Lstat(filepath.Join(dir, "b", f), &lower); err != nil {
				return err
			}
			visible := err == nil && merged.Ino == lower.Ino
			if got := tgt.shadowed(1, "/"+f); got == visible {
				t.Errorf("shadowed(%s) = %v, in the merged tree: %v", f, got, visible)
			}
			if tgt.shadowed(0, "/"+f) {
				t.Errorf("%s is shadowed in the topmost layer", f)
			}
		}
		return nil
	})
}
