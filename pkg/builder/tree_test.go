package builder_test

import (
	"archive/tar"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/builder"
)

// TestMerge says what stacks of layers mean. Content stands for itself in the want maps:
// "dir", "file:DATA", "link:TARGET", "dev", "fifo".
func TestMerge(t *testing.T) {
	fifo := func(name string) file {
		return file{tar.Header{Typeflag: tar.TypeFifo, Name: name, Mode: 0o600}, ""}
	}
	char := func(name string, major, minor int64) file {
		return file{tar.Header{Typeflag: tar.TypeChar, Name: name, Mode: 0o600, Devmajor: major, Devminor: minor}, ""}
	}
	tests := map[string]struct {
		layers [][]file
		want   map[string]string
	}{
		"no layers": {nil, nil},
		"names are cleaned": {
			[][]file{{dir("./", 0o700), dir("./a/", 0o755), reg("/abs", "1"), reg("./a/../b", "2"), reg("a//c/./d", "3")}},
			map[string]string{"/a": "dir", "/abs": "file:1", "/b": "file:2", "/a/c": "dir", "/a/c/d": "file:3"},
		},
		"the last of equal names wins": {
			[][]file{{reg("a", "1"), reg("a", "2"), reg("b", "x"), dir("b", 0o755), reg("b/c", "3"), dir("d", 0o755), reg("d/e", "x"), sym("d", "b")}},
			map[string]string{"/a": "file:2", "/b": "dir", "/b/c": "file:3", "/d": "link:b"},
		},
		"a whiteout removes what is below": {
			[][]file{{reg("a", "1"), reg("d/x", "1"), reg("d/y", "2")}, {reg("d/.wh.x", ""), reg(".wh.a", ""), reg(".wh.none", "")}},
			map[string]string{"/d": "dir", "/d/y": "file:2"},
		},
		"a whiteout of a directory removes all of it": {
			[][]file{{reg("d/e/x", "1"), reg("k", "1")}, {reg(".wh.d", "")}},
			map[string]string{"/k": "file:1"},
		},
		"a whiteout spares its own layer, before and after": {
			[][]file{{reg("a", "1"), reg("b", "1"), reg("d/x", "1")}, {reg("a", "2"), reg(".wh.a", ""), reg(".wh.b", ""), reg("b", "2"), reg(".wh.d", ""), reg("d/y", "2")}},
			map[string]string{"/a": "file:2", "/b": "file:2", "/d": "dir", "/d/y": "file:2"},
		},
		"an opaque directory hides what is below, wherever its marker is": {
			[][]file{
				{reg("d/x", "1"), reg("d/s/y", "1"), reg("e/x", "1"), reg("f/x", "1")},
				{reg("d/z", "2"), reg("d/s/w", "2"), reg("d/.wh..wh..opq", ""), reg("e/.wh..wh..opq", ""), reg("e/z", "2")},
			},
			map[string]string{"/d": "dir", "/d/z": "file:2", "/d/s": "dir", "/d/s/w": "file:2", "/e": "dir", "/e/z": "file:2", "/f": "dir", "/f/x": "file:1"},
		},
		"the root may be opaque": {
			[][]file{{reg("a", "1"), reg("d/x", "1")}, {reg(".wh..wh..opq", ""), reg("b", "2")}},
			map[string]string{"/b": "file:2"},
		},
		"markers in the lowest layer are consumed": {
			[][]file{{reg(".wh.a", ""), reg("d/.wh..wh..opq", ""), reg("d/x", "1"), reg("d/.wh.y", "")}},
			map[string]string{"/d": "dir", "/d/x": "file:1"},
		},
		"markers inside a directory that is new": {
			[][]file{{reg("a", "1")}, {dir("d", 0o755), reg("d/.wh.x", ""), reg("d/.wh..wh..opq", ""), reg("d/e/.wh.y", ""), reg("d/z", "2")}, {reg("d/x", "3")}},
			map[string]string{"/a": "file:1", "/d": "dir", "/d/e": "dir", "/d/z": "file:2", "/d/x": "file:3"},
		},
		"aufs bookkeeping is ignored": {
			[][]file{{reg(".wh..wh.aufs", ""), dir(".wh..wh.plnk", 0o755), reg(".wh..wh.plnk/1.2", "x"), dir(".wh..wh.orph", 0o755), reg("a", "1")}},
			map[string]string{"/a": "file:1"},
		},
		"types change in both directions": {
			[][]file{{reg("a", "1"), reg("d/x", "1"), sym("s", "d"), dir("e", 0o755), fifo("p")}, {reg("a/b", "2"), reg("d", "2"), dir("s", 0o755), sym("e", "a"), char("p", 1, 3)}},
			map[string]string{"/a": "dir", "/a/b": "file:2", "/d": "file:2", "/s": "dir", "/e": "link:a", "/p": "dev"},
		},
		"a parent that is a symlink of the same layer is followed": {
			[][]file{{dir("usr/lib", 0o755), sym("lib", "usr/lib"), sym("abs", "/usr/lib"), sym("up", "../../../usr"), reg("lib/a", "1"), reg("abs/b", "2"), reg("up/lib/c", "3"), sym("new", "n/m"), reg("new/d", "4")}},
			map[string]string{
				"/usr": "dir", "/usr/lib": "dir", "/lib": "link:usr/lib", "/abs": "link:/usr/lib", "/up": "link:../../../usr",
				"/usr/lib/a": "file:1", "/usr/lib/b": "file:2", "/usr/lib/c": "file:3", "/new": "link:n/m", "/n": "dir", "/n/m": "dir", "/n/m/d": "file:4",
			},
		},
		"a replaced symlink is followed no longer": {
			[][]file{{dir("d", 0o755), sym("s", "d"), reg("s/a", "1"), dir("s", 0o755), reg("s/b", "2")}},
			map[string]string{"/d": "dir", "/d/a": "file:1", "/s": "dir", "/s/b": "file:2"},
		},
		"a directory replaces a symlink of a lower layer, as in an overlay": {
			[][]file{{reg("run/x", "1"), sym("var", "run")}, {reg("var/y", "2")}},
			map[string]string{"/run": "dir", "/run/x": "file:1", "/var": "dir", "/var/y": "file:2"},
		},
		"hard links, also to lower layers and to links": {
			[][]file{{reg("a", "1"), link("b", "a"), link("c", "./b"), sym("s", "a"), link("t", "s")}, {link("d", "/c"), link("e", "d"), reg("f/g", "2"), link("f/h", "f/g"), link("u", "s")}},
			map[string]string{"/a": "file:1", "/b": "file:1", "/c": "file:1", "/s": "link:a", "/t": "link:a", "/d": "file:1", "/e": "file:1", "/f": "dir", "/f/g": "file:2", "/f/h": "file:2", "/u": "link:a"},
		},
		"a hard link into a directory that is new": {
			[][]file{{reg("a", "1")}, {link("n/m/b", "a")}},
			map[string]string{"/a": "file:1", "/n": "dir", "/n/m": "dir", "/n/m/b": "file:1"},
		},
		"a hard link to a file that the same layer removes": {
			[][]file{{reg("a", "1")}, {reg(".wh.a", ""), link("b", "a")}},
			map[string]string{"/b": "file:1"},
		},
		"a null device is a device": {
			[][]file{{reg("a", "1")}, {char("a", 0, 0), char("b", 8, 300)}},
			map[string]string{"/a": "dev", "/b": "dev"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var layers [][]byte
			for _, l := range tt.layers {
				layers = append(layers, makeTar(t, l...))
			}
			res := convert(t, tars(t, layers...), builder.DefaultOptions())
			got := map[string]string{}
			for p, it := range dumpImage(t, res) {
				got[p] = describe(it)
			}
			want := map[string]string{"/": "dir"}
			for p, s := range tt.want {
				if data, ok := strings.CutPrefix(s, "file:"); ok {
					s = describe(item{Mode: unix.S_IFREG, Data: sum(data)})
				}
				want[p] = s
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("tree differs (-want +got):\n%s", diff)
			}
		})
	}
}

func describe(it item) string {
	switch it.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "dir"
	case unix.S_IFLNK:
		return "link:" + it.Data
	case unix.S_IFREG:
		return "file:" + it.Data
	case unix.S_IFIFO:
		return "fifo"
	}
	return "dev"
}

// TestAttributes follows the attributes of files through headers, links and layers.
func TestAttributes(t *testing.T) {
	pax := func(f file) file { f.Format = tar.FormatPAX; return f }
	at := func(f file, sec, nsec int64) file { f.ModTime = time.Unix(sec, nsec); return f }
	owned := func(f file, uid, gid int) file { f.Uid, f.Gid = uid, gid; return f }
	mode := func(f file, m int64) file { f.Mode = m; return f }
	res := convert(t, tars(t,
		makeTar(t,
			at(owned(dir("./", 0o1777), 7, 8), 77, 0),
			pax(at(reg("frac", "x"), 12, 345678901)),
			pax(at(reg("early", "x"), -5, 0)),
			at(reg("late", "x"), 1<<33, 0),
			pax(owned(reg("ids", "x"), 4294967295, 3000000000)),
			mode(reg("suid", "x"), 0o6755),
			dir("keep", 0o700), dir("change", 0o1700), reg("keep/a", "1"), reg("change/a", "1"),
			xattr(dir("xdir", 0o755), "user.old", "1"),
			xattr(reg("cap", "x"), "security.capability", "\x01\x00\x00\x02"),
			xattr(reg("trusted", "x"), "trusted.overlay.opaque", "y"),
			xattr(sym("usersym", "x"), "user.a", "1"),
			xattr(reg("empty", "x"), "user.empty", ""),
			reg("one", "x"), mode(owned(at(link("two", "one"), 500, 0), 5, 6), 0o600),
			sym("sym", "x"),
		),
		makeTar(t,
			reg("keep/b", "2"),
			owned(dir("change", 0o755), 1, 2), reg("change/b", "2"),
			xattr(dir("xdir", 0o755), "user.new", "2"),
			reg("invented/a", "x"),
		)), builder.DefaultOptions())
	got := dumpImage(t, res)
	none := map[string]string{}
	want := map[string]item{
		"/":         {Mode: unix.S_IFDIR | 0o1777, UID: 7, GID: 8, Mtime: 77e9, Xattrs: none},
		"/frac":     {Mode: unix.S_IFREG | 0o644, Mtime: 12345678901, Xattrs: none},
		"/early":    {Mode: unix.S_IFREG | 0o644, Mtime: -5e9, Xattrs: none},
		"/late":     {Mode: unix.S_IFREG | 0o644, Mtime: 1 << 33 * 1e9, Xattrs: none},
		"/ids":      {Mode: unix.S_IFREG | 0o644, UID: 4294967295, GID: 3000000000, Mtime: 1000e9, Xattrs: none},
		"/suid":     {Mode: unix.S_IFREG | 0o6755, Mtime: 1000e9, Xattrs: none},
		"/keep":     {Mode: unix.S_IFDIR | 0o700, Mtime: 1000e9, Xattrs: none},
		"/change":   {Mode: unix.S_IFDIR | 0o755, UID: 1, GID: 2, Mtime: 1000e9, Xattrs: none},
		"/xdir":     {Mode: unix.S_IFDIR | 0o755, Mtime: 1000e9, Xattrs: map[string]string{"user.new": "32"}},
		"/cap":      {Mode: unix.S_IFREG | 0o644, Mtime: 1000e9, Xattrs: map[string]string{"security.capability": "01000002"}},
		"/trusted":  {Mode: unix.S_IFREG | 0o644, Mtime: 1000e9, Xattrs: none},
		"/usersym":  {Mode: unix.S_IFLNK | 0o777, Mtime: 1000e9, Xattrs: none},
		"/empty":    {Mode: unix.S_IFREG | 0o644, Mtime: 1000e9, Xattrs: map[string]string{"user.empty": ""}},
		"/one":      {Mode: unix.S_IFREG | 0o600, UID: 5, GID: 6, Mtime: 500e9, Xattrs: none},
		"/two":      {Mode: unix.S_IFREG | 0o600, UID: 5, GID: 6, Mtime: 500e9, Xattrs: none},
		"/sym":      {Mode: unix.S_IFLNK | 0o777, Mtime: 1000e9, Xattrs: none},
		"/invented": {Mode: unix.S_IFDIR | 0o755, Xattrs: none},
	}
	for p, w := range want {
		g := got[p]
		g.Size, g.Data, g.Link = 0, "", ""
		if diff := cmp.Diff(w, g); diff != "" {
			t.Errorf("%s (-want +got):\n%s", p, diff)
		}
	}
	if got["/two"].Link != got["/one"].Link {
		t.Errorf("one and two are no hard links: %v, %v", got["/one"], got["/two"])
	}
	if n := res.Stats.XattrsIgnored; n != 2 {
		t.Errorf("XattrsIgnored = %d, want 2", n)
	}
}

// Of several links to one file of a lower layer the last entry says what its attributes are, be it a link to a link.
func TestLowerLinkOrder(t *testing.T) {
	mode := func(f file, mode int64) file { f.Mode = mode; return f }
	res := convert(t, tars(t,
		makeTar(t, reg("f", "data")),
		makeTar(t, mode(link("a", "f"), 0o600), mode(link("b", "f"), 0o640), mode(link("c", "a"), 0o4755)),
	), builder.DefaultOptions())
	got := dumpImage(t, res)
	for _, p := range []string{"/f", "/a", "/b", "/c"} {
		if g := got[p]; g.Mode != unix.S_IFREG|0o4755 || g.Link != "/a" && g.Link != "a" {
			t.Errorf("%s has mode %#o, link %q, want %#o of /a", p, g.Mode, g.Link, unix.S_IFREG|0o4755)
		}
	}
}
