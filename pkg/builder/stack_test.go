package builder_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
)

// stackRules are what random layers leave out because an oracle has its own mind there.
type stackRules struct {
	// parents: every directory that an entry is in has an entry of its own before it.
	// Without it there are no symlinks: where a lower layer has one and an upper layer implies
	// a directory, one directory differs from an overlay, and containerd takes the invented
	// directory's attributes from behind the symlink.
	parents bool
	// opaque: directories may be opaque. containerd removes invented directories below
	// one, and inherits attributes through one, so this needs parents.
	opaque bool
	// again: a name may come twice in a layer.
	again bool
	// lowerLinks: hard links to lower layers.
	lowerLinks bool
	// dirXattrs: directories may have extended attributes.
	dirXattrs bool
}

// stackGen makes random layers over a few names, so that they meet.
type stackGen struct {
	*rand.Rand
	rules stackRules
	lower []string // files of the layers before

	layer    []file
	names    map[string]byte // of this layer: entry type
	removed  map[string]bool
	children map[string]bool // directories with something in them, of this layer
}

func (g *stackGen) name(depth int) string {
	var parts []string
	for range 1 + g.IntN(depth) {
		parts = append(parts, string(rune('a'+g.IntN(4))))
	}
	return strings.Join(parts, "/")
}

func (g *stackGen) header(name string, typ byte) tar.Header {
	h := tar.Header{
		Name: name, Typeflag: typ, Mode: int64(g.IntN(0o10000)), Uid: g.IntN(3), Gid: g.IntN(3),
		ModTime: time.Unix(1e9+int64(g.IntN(1e8)), 0),
	}
	if typ == tar.TypeDir {
		h.Mode &^= 0o2000 // what is made in such a directory inherits its group
	}
	if g.IntN(3) == 0 {
		h.Format = tar.FormatPAX
		h.ModTime = h.ModTime.Add(time.Duration(g.IntN(1e9)))
	}
	if typ == tar.TypeReg && g.IntN(4) == 0 || typ == tar.TypeDir && g.rules.dirXattrs && g.IntN(3) == 0 {
		h.Format = tar.FormatPAX
		h.PAXRecords = map[string]string{"SCHILY.xattr.user." + g.name(1): fmt.Sprint(g.IntN(9))}
	}
	return h
}

func (g *stackGen) emit(h tar.Header, data string) {
	g.layer = append(g.layer, file{h, data})
	g.names[h.Name] = h.Typeflag
	for p := path.Dir(h.Name); p != "."; p = path.Dir(p) {
		g.children[p] = true
	}
}

// ensure gives name's parents entries, or says that name cannot be used.
func (g *stackGen) ensure(name string) bool {
	for i, c := range name {
		if c != '/' {
			continue
		}
		p := name[:i]
		switch typ, ok := g.names[p]; {
		case ok && typ != tar.TypeDir || g.removed[p]:
			return false
		case !ok && g.rules.parents:
			g.emit(g.header(p, tar.TypeDir), "")
		}
	}
	return true
}

func (g *stackGen) entry() {
	name := g.name(3)
	if !g.ensure(name) || g.removed[name] {
		return
	}
	typ, exists := g.names[name]
	if !exists && g.children[name] {
		return // an invented directory gets no entry afterwards: its xattrs would be inherited
	}
	if exists && (!g.rules.again || typ == tar.TypeDir) {
		return
	}
	switch n := g.IntN(20); {
	case n < 8:
		g.emit(g.header(name, tar.TypeReg), strings.Repeat(g.name(1), g.IntN(5000)))
	case n < 12:
		g.emit(g.header(name, tar.TypeDir), "")
	case n < 13 && g.rules.parents:
		h := g.header(name, tar.TypeSymlink)
		h.Linkname = g.name(2)
		g.emit(h, "")
	case n < 14:
		g.emit(g.header(name, tar.TypeFifo), "")
	case n < 15:
		h := g.header(name, tar.TypeChar)
		h.Devmajor, h.Devminor = int64(1+g.IntN(9)), int64(g.IntN(1000))
		g.emit(h, "")
	case n < 17:
		g.link(name)
	case n < 18 && !exists:
		dir, base := path.Split(name)
		for p := path.Dir(name); p != "."; p = path.Dir(p) {
			g.children[p] = true
		}
		g.layer = append(g.layer, file{g.header(dir+".wh."+base, tar.TypeReg), ""})
		g.removed[name] = true
	case n < 19 && g.rules.opaque && g.rules.parents:
		if d := path.Dir(name); d != "." {
			g.layer = append(g.layer, file{g.header(d+"/.wh..wh..opq", tar.TypeReg), ""})
		}
	}
}

// link makes a hard link to a file of this layer or of a lower one.
func (g *stackGen) link(name string) {
	var targets []string
	for n, typ := range g.names {
		if typ != tar.TypeDir && n != name {
			targets = append(targets, n)
		}
	}
	if g.rules.lowerLinks {
		targets = append(targets, g.lower...)
	}
	if len(targets) == 0 {
		return
	}
	slices.Sort(targets)
	h := g.header(name, tar.TypeLink)
	h.Linkname = targets[g.IntN(len(targets))]
	g.emit(h, "")
}

// symlinkParent makes an entry whose parent is a symlink of the same layer.
func (g *stackGen) symlinkParent(i int) {
	name := fmt.Sprintf("s%d", i)
	h := g.header(name, tar.TypeSymlink)
	h.Linkname = g.name(2)
	if !g.ensure(h.Linkname+"/x") || g.names[h.Linkname] != 0 && g.names[h.Linkname] != tar.TypeDir || g.removed[h.Linkname] || g.removed[h.Linkname+"/a"] || g.names[h.Linkname+"/a"] != 0 || g.children[h.Linkname+"/a"] {
		return
	}
	g.emit(h, "")
	real := h.Linkname + "/a"
	f := g.header(name+"/a", tar.TypeReg)
	g.emit(f, "through a symlink")
	g.names[real] = tar.TypeReg
	g.children[h.Linkname] = true
}

// generate returns the tars of one stack.
func (g *stackGen) generate(t *testing.T) [][]byte {
	var out [][]byte
	for i := range 1 + g.IntN(4) {
		g.layer, g.names, g.removed, g.children = nil, map[string]byte{}, map[string]bool{}, map[string]bool{}
		for range 2 + g.IntN(15) {
			g.entry()
		}
		if g.rules.parents && g.IntN(3) == 0 {
			g.symlinkParent(i)
		}
		for n, typ := range g.names {
			if typ == tar.TypeReg {
				g.lower = append(g.lower, n)
			}
		}
		slices.Sort(g.lower)
		out = append(out, makeTar(t, g.layer...))
	}
	return out
}

// compareStack converts layers and compares the tree with a directory.
func compareStack(t *testing.T, seed uint64, layers [][]byte, root string) {
	t.Helper()
	want := dumpDir(t, root)
	res := convert(t, tars(t, layers...), builder.DefaultOptions())
	got := dumpImage(t, res)
	for p, w := range want {
		g, ok := got[p]
		// Directories that an unpacker wrote into have the time of that.
		if ok && w.Mtime > time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano() {
			g.Mtime = w.Mtime
			got[p] = g
		}
	}
	delete(want, "/")
	delete(got, "/")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("seed %d differs (-containerd +ours):\n%s", seed, diff)
		for i, l := range layers {
			tr := tar.NewReader(bytes.NewReader(l))
			for h, err := tr.Next(); err == nil; h, err = tr.Next() {
				t.Logf("layer %d: %c %o %s %s", i, h.Typeflag, h.Mode, h.Name, h.Linkname)
			}
		}
	}
}

// seeds is the number of random stacks of each test.
func seeds() int {
	if raceEnabled || testing.Short() {
		return 20
	}
	return 100
}

// TestStackOverlay compares random stacks of layers with what a container on containerd's
// overlayfs snapshotter sees: every layer is unpacked by containerd's own code and all are mounted.
func TestStackOverlay(t *testing.T) {
	testenv.Root(t)
	t.Parallel()
	refused := 0
	for seed := range uint64(seeds()) {
		g := &stackGen{Rand: rand.New(rand.NewPCG(seed, 1)), rules: stackRules{again: true, dirXattrs: true}}
		if seed%2 == 0 {
			g.rules.parents, g.rules.opaque = true, true
		}
		layers := g.generate(t)
		base := t.TempDir()
		var dirs []string // uppermost first
		var err error
		for i, l := range layers {
			d := filepath.Join(base, fmt.Sprint(i))
			if err := os.Mkdir(d, 0o755); err != nil {
				t.Fatal(err)
			}
			var opts []archive.ApplyOpt
			if i > 0 {
				opts = []archive.ApplyOpt{archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(dirs)}
			}
			if _, err = archive.Apply(t.Context(), d, bytes.NewReader(l), opts...); err != nil {
				break
			}
			dirs = append([]string{d}, dirs...)
		}
		if err != nil {
			refused++ // a corner of containerd's own, such as a whiteout among the parents
			continue
		}
		root := dirs[0]
		if len(dirs) > 1 {
			root = mountOverlay(t, dirs)
		}
		compareStack(t, seed, layers, root)
		if t.Failed() {
			return
		}
	}
	if refused > seeds()/3 {
		t.Errorf("containerd refused %d of %d stacks: the generator is off", refused, seeds())
	}
}

func mountOverlay(t *testing.T, lower []string) string {
	t.Helper()
	root := t.TempDir()
	err := unix.Mount("overlay", root, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":"))
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EPERM) {
		testenv.Kernel(t, "overlay mounts", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	return root
}

// TestStackNative compares random stacks with what containerd makes of them in one
// directory (its native snapshotter), which also has hard links across layers.
func TestStackNative(t *testing.T) {
	testenv.Root(t)
	t.Parallel()
	refused := 0
	for seed := range uint64(seeds()) {
		g := &stackGen{Rand: rand.New(rand.NewPCG(seed, 2)), rules: stackRules{lowerLinks: true}}
		if seed%2 == 0 {
			g.rules.parents, g.rules.opaque = true, true
		}
		layers := g.generate(t)
		root := t.TempDir()
		var err error
		for _, l := range layers {
			if _, err = archive.Apply(t.Context(), root, bytes.NewReader(l)); err != nil {
				break
			}
		}
		if err != nil {
			refused++
			continue
		}
		compareStack(t, seed, layers, root)
		if t.Failed() {
			return
		}
	}
	if refused > seeds()*3/4 {
		t.Errorf("containerd refused %d of %d stacks: the generator is off", refused, seeds())
	}
}
