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
	"github.com/headstart-oci/headstart/pkg/rafs"
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
		part := string(rune('a' + g.IntN(4)))
		if g.IntN(60) == 0 {
			part = strings.Repeat(part, 101+g.IntN(155)) // a ustar header has no room for it
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, "/")
}

// owners are below and above what 16 and 21 bits hold, as old formats have.
var owners = []int{0, 1, 2, 65_536, 3_000_000_000}

func (g *stackGen) header(name string, typ byte) tar.Header {
	h := tar.Header{
		Name: name, Typeflag: typ, Mode: int64(g.IntN(0o10000)), Uid: owners[g.IntN(len(owners))], Gid: owners[g.IntN(len(owners))],
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
	if (typ == tar.TypeReg || typ == tar.TypeLink) && g.IntN(4) == 0 {
		// It is gone when another header names the same file without it. Source: linux/capability.h, VFS_CAP_REVISION_2.
		h.Format = tar.FormatPAX
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr.security.capability"] = "\x01\x00\x00\x02\x00" + string(rune(1+g.IntN(100))) + strings.Repeat("\x00", 14)
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
	case n < 7:
		g.emit(g.header(name, tar.TypeReg), strings.Repeat(g.name(1), g.IntN(5000)))
	case n < 8:
		g.sparse(name)
	case n < 12:
		g.emit(g.header(name, tar.TypeDir), "")
	case n < 13 && g.rules.parents:
		h := g.header(name, tar.TypeSymlink)
		h.Linkname = g.name(2)
		g.emit(h, "")
	case n < 14:
		g.emit(g.header(name, tar.TypeFifo), "")
	case n < 15:
		h := g.header(name, []byte{tar.TypeChar, tar.TypeBlock}[g.IntN(2)])
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

// sparse makes a file with holes, as GNU tar writes them in PAX archives (GNU.sparse, 1.0). See [finish].
func (g *stackGen) sparse(name string) {
	var places, data strings.Builder
	end, pieces := int64(0), g.IntN(4)
	for range pieces {
		n := 1 + g.IntN(9000)
		end += int64(g.IntN(100_000))
		fmt.Fprintf(&places, "%d\n%d\n", end, n)
		data.Write(noise(g.Uint64(), n))
		end += int64(n)
	}
	if g.IntN(2) == 0 {
		end += int64(g.IntN(100_000))
	}
	table := fmt.Sprintf("%d\n%s", pieces, places.String())
	table += strings.Repeat("\x00", (512-len(table)%512)%512)
	var records strings.Builder
	for _, kv := range [][2]string{
		{"GNU.sparse.major", "1"}, {"GNU.sparse.minor", "0"}, {"GNU.sparse.name", name}, {"GNU.sparse.realsize", fmt.Sprint(end)},
	} {
		size := len(kv[0]) + len(kv[1]) + len(" =\n")
		for size < len(fmt.Sprintf("%d %s=%s\n", size, kv[0], kv[1])) {
			size++
		}
		fmt.Fprintf(&records, "%d %s=%s\n", size, kv[0], kv[1])
	}
	h := tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: int64(g.IntN(0o1000)), Uid: g.IntN(3), ModTime: time.Unix(1e9, 0), Format: tar.FormatUSTAR}
	if len(name) > 90 {
		return // whose header would be between the two
	}
	g.layer = append(g.layer, file{tar.Header{Name: paxName, Typeflag: tar.TypeReg, Mode: 0o644, Format: tar.FormatUSTAR}, records.String()})
	g.emit(h, table+data.String())
}

// paxName is that of the entries that [finish] makes PAX headers of.
const paxName = "././@PaxHeader"

// finish makes PAX headers of the entries of a tar that are called so: archive/tar writes none with such records.
func finish(tarball []byte) []byte {
	for at := 0; at+512 <= len(tarball); at += 512 {
		b := tarball[at : at+512]
		if !bytes.HasPrefix(b, []byte(paxName+"\x00")) {
			continue
		}
		b[156] = tar.TypeXHeader
		copy(b[148:156], "        ")
		sum := 0
		for _, c := range b {
			sum += int(c)
		}
		copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	}
	return tarball
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
			if typ != tar.TypeDir && typ != tar.TypeLink {
				g.lower = append(g.lower, n)
			}
		}
		slices.Sort(g.lower)
		out = append(out, finish(makeTar(t, g.layer...)))
	}
	return out
}

// compareStack converts layers and compares the tree with a directory.
func compareStack(t *testing.T, seed uint64, layers [][]byte, root string) {
	t.Helper()
	want := dumpDir(t, root)
	o := builder.DefaultOptions()
	if seed%3 == 0 {
		o.FSVersion = rafs.V5
	}
	res := convert(t, tars(t, layers...), o)
	if seed%20 == 0 || seed%20 == 1 {
		checkStack(t, seed, res, o)
	}
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

// checkStack asks the tools what they say of a stack's image.
func checkStack(t *testing.T, seed uint64, res *builder.Result, o builder.Options) {
	t.Helper()
	t.Run(fmt.Sprintf("nydus-image %d", seed), func(t *testing.T) { checkNydusImage(t, res) })
	if o.FSVersion == rafs.V6 {
		t.Run(fmt.Sprintf("fsck.erofs %d", seed), func(t *testing.T) { checkFsck(t, res) })
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
		if refused += stackOverlay(t, seed); t.Failed() {
			return
		}
	}
	if refused > seeds()/3 {
		t.Errorf("containerd refused %d of %d stacks: the generator is off", refused, seeds())
	}
}

// stackOverlay compares one stack; it returns 1 for one that containerd refuses.
func stackOverlay(t *testing.T, seed uint64) (refused int) {
	t.Helper()
	g := &stackGen{Rand: rand.New(rand.NewPCG(seed, 1)), rules: stackRules{again: true, dirXattrs: true}}
	if seed%2 == 0 {
		g.rules.parents, g.rules.opaque = true, true
	}
	layers := g.generate(t)
	base := t.TempDir()
	var dirs []string // uppermost first
	for i, l := range layers {
		d := filepath.Join(base, fmt.Sprint(i))
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		var opts []archive.ApplyOpt
		if i > 0 {
			opts = []archive.ApplyOpt{archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(dirs)}
		}
		if _, err := archive.Apply(t.Context(), d, bytes.NewReader(l), opts...); err != nil {
			return 1 // a corner of containerd's own, such as a whiteout among the parents
		}
		dirs = append([]string{d}, dirs...)
	}
	root := dirs[0]
	if len(dirs) > 1 {
		root = mountOverlay(t, dirs)
	}
	compareStack(t, seed, layers, root)
	return 0
}

// TestSoakStacks goes on with other seeds for the duration in SOAK, from the seed in SOAK_SEED or 1000, up to the first that differs.
func TestSoakStacks(t *testing.T) {
	testenv.Root(t)
	length, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Skip("SOAK says no duration: make soak")
	}
	seed := uint64(1000)
	if s := os.Getenv("SOAK_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatalf("SOAK_SEED=%s: %v", s, err)
		}
	}
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			stackOverlay(t, seed)
			stackNative(t, seed)
		})
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
		if refused += stackNative(t, seed); t.Failed() {
			return
		}
	}
	if refused > seeds()*3/4 {
		t.Errorf("containerd refused %d of %d stacks: the generator is off", refused, seeds())
	}
}

// stackNative compares one stack; it returns 1 for one that containerd refuses.
func stackNative(t *testing.T, seed uint64) (refused int) {
	t.Helper()
	g := &stackGen{Rand: rand.New(rand.NewPCG(seed, 2)), rules: stackRules{lowerLinks: true}}
	if seed%2 == 0 {
		g.rules.parents, g.rules.opaque = true, true
	}
	layers := g.generate(t)
	root := t.TempDir()
	for _, l := range layers {
		if _, err := archive.Apply(t.Context(), root, bytes.NewReader(l)); err != nil {
			return 1
		}
	}
	compareStack(t, seed, layers, root)
	return 0
}

// TestWhiteoutOfLongName removes a file whose name has no room for the whiteout's prefix, which a layer may say all the same.
func TestWhiteoutOfLongName(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("n", 255)
	res := convert(t, tars(t, makeTar(t, reg("d/"+long, "gone"), reg("d/kept", "kept")), makeTar(t, reg("d/.wh."+long, ""))), builder.DefaultOptions())
	got := dumpImage(t, res)
	if _, there := got["/d/"+long]; there || got["/d/kept"].Size != 4 {
		t.Errorf("%d entries: the long name is there: %v, kept: %+v", len(got), there, got["/d/kept"])
	}
}
