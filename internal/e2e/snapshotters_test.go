package e2e_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

const (
	layersRef = "docker.io/headstart/layers:1"
	pageSize  = int64(4096)
)

// layerFile is an entry of a layer of the test's image: a directory where name ends in a slash, a link
// where link is set, else a file of size random bytes.
type layerFile struct {
	name, link string
	size       int
}

// layersOf are layers that hide, replace and link what is below them, the lowest first.
func layersOf() [][]layerFile {
	return [][]layerFile{
		{
			{name: "proc/"},
			{name: "sys/"},
			{name: "dev/"},
			{name: "etc/"},
			{name: "tmp/"},
			{name: "s/"},
			{name: "opq/"},
			{name: "hard/"},
			{name: "etc/passwd", size: 70},
			{name: "etc/group", size: 30},
			{name: "s/low", size: 40*4096 + 17},
			{name: "s/map", size: 256 << 10},
			{name: "s/none", size: 5000},
			{name: "s/unread", size: 5000},
			{name: "s/replaced", size: 60000},
			{name: "s/gone", size: 9},
			{name: "opq/old", size: 9},
			{name: "opq/new", size: 11},
			{name: "hard/one", size: 20000},
			{name: "hard/two", link: "hard/one"},
		},
		{
			{name: "s/replaced", size: 30000},
			{name: "s/.wh.gone"},
			{name: "opq/"},
			{name: "opq/.wh..wh..opq"},
			{name: "opq/new", size: 12345},
			{name: "hard/one", size: 20000},
			{name: "hard/three", link: "hard/one"},
			{name: "s/empty"},
		},
		{
			{name: "odd/"},
			{name: "odd/a b\tc"},
			{name: "odd/line\nbreak", size: 5000},
			{name: "odd/ünï", size: 4096},
			{name: "odd/\xff\xfe", size: 4097},
			{name: "odd/" + strings.Repeat("n", 200), size: 1},
		},
	}
}

// layersImage is the image of layersOf whose program is the workload of the tracer's tests.
func layersImage(t *testing.T) v1.Image {
	t.Helper()
	img, err := testcri.StaticImage(testenv.Command(t, "./internal/tracer/testdata/workload"), nil)
	must(t, err)
	random := rand.NewChaCha8([32]byte{1})
	for _, files := range layersOf() {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range files {
			h := &tar.Header{Name: f.name, Mode: 0o755, Format: tar.FormatPAX}
			switch {
			case strings.HasSuffix(f.name, "/"):
				h.Typeflag = tar.TypeDir
			case f.link != "":
				h.Typeflag, h.Linkname = tar.TypeLink, f.link
			default:
				h.Typeflag, h.Size = tar.TypeReg, int64(f.size)
			}
			must(t, w.WriteHeader(h))
			_, err := io.CopyN(w, random, h.Size)
			must(t, err)
		}
		must(t, w.Close())
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil }, tarball.WithMediaType(types.OCILayer))
		must(t, err)
		img, err = mutate.AppendLayers(img, l)
		must(t, err)
	}
	return img
}

// layersArgs is what the container does, layersWant what its list has to say of it: the file, and for each of its
// pages that was touched one number; "~" that more may be listed, as they were mapped around a fault.
var (
	layersArgs = []string{
		"mixed", "pread:/s/low:8192:5000", "mmap:/s/map:40960:1", "pread:/s/replaced:29999:1", "open:/s/none", "read:/s/empty", "read:/opq/new",
		"pread:/hard/two:4096:1", "pread:/hard/three:12288:1", "pread:/hard/one:0:1", "tree:/odd", "write:/s/made", "read:/s/made", "write:/tmp/made",
	}
	layersWant = []string{
		"/workload ~", "/s/low 2 3", "/s/map ~10", "/s/replaced 7", "/s/none", "/s/empty", "/opq/new 0 1 2 3", "/hard/two 1", "/hard/three 0 3", "/hard/one 0 3",
		"/odd/a b\tc", "/odd/line\nbreak 0 1", "/odd/" + strings.Repeat("n", 200) + " 0", "/odd/ünï 0", "/odd/\xff\xfe 0 1",
	}
)

// snapshotted is a way to keep images that a containerd is configured for.
type snapshotted struct {
	name, snapshotter string
	config            func(t *testing.T, dir string) string // of the snapshotter, which may use dir
	engine            string
}

func snapshotters() []snapshotted {
	const pages = "fanotify+filemap"
	return []snapshotted{
		{name: "overlayfs", engine: pages},
		{name: "erofs", snapshotter: "erofs", config: erofsConfig(""), engine: pages},
		{name: "erofs with a quota", snapshotter: "erofs", config: erofsConfig("default_size = \"64MiB\"\n"), engine: pages},
		{name: "native", snapshotter: "native", engine: pages},
		{name: "blockfile", snapshotter: "blockfile", config: blockfileConfig, engine: pages},
	}
}

func erofsConfig(more string) func(*testing.T, string) string {
	return func(t *testing.T, _ string) string {
		testenv.Tool(t, "mkfs.erofs")
		return "[plugins.\"io.containerd.snapshotter.v1.erofs\"]\n" + more
	}
}

func blockfileConfig(t *testing.T, dir string) string {
	scratch := testenv.NewDisk(t, 64<<20, "mkfs.ext4", "-q")
	return fmt.Sprintf("[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\nroot_path = %q\nscratch_file = %q\nfs_type = \"ext4\"\n",
		filepath.Join(dir, "blocks"), scratch)
}

// TestSnapshotters runs one image with each snapshotter, and holds that its list says the same.
func TestSnapshotters(t *testing.T) {
	img := layersImage(t)
	manifest, err := img.Digest()
	must(t, err)
	for i, s := range snapshotters() {
		t.Run(s.name, func(t *testing.T) {
			if testing.Short() && i > 1 {
				t.Skip("one containerd more")
			}
			h := newHostOn(t, s)
			u := h.newSetup(t, settings{"start_deadline": `"900ms"`})
			u.drop(t)
			must(t, h.Import(t.Context(), layersRef, img))
			u.awaitPages(t)
			r := h.run(t, testcri.ContainerOptions{Image: layersRef, Args: layersArgs})
			if r.exit != 0 {
				t.Fatalf("exit code %d: %s%s", r.exit, r.out, r.errOut)
			}
			l := u.list(t, r.id)
			judgeLayersList(t, l, s, layersWant)
			res := u.built(t, digest.Digest(manifest.String()))
			dir, _ := layoutOf(t, res.Target)
			b := openRebuilt(t, dir, digest.Digest(res.Manifest))
			b.fsck(t)
			b.nydusCheck(t)
			if b.prefetch == "" {
				t.Error("no annotation names a prefetch blob")
			}
			if testing.Short() {
				return
			}
			t.Run("attached", func(t *testing.T) { testAttached(t, h, s, manifest.String()) })
		})
	}
}

// testAttached attaches to a container that runs already, by its id and by its process' at once.
func testAttached(t *testing.T, h *host, s snapshotted, manifest string) {
	c, err := h.pod(t).Create(t.Context(), testcri.ContainerOptions{Image: layersRef, Args: append([]string{"mixed", "await:/tmp/go"}, layersArgs[1:]...)})
	must(t, err)
	_, err = c.Start(t.Context())
	must(t, err)
	pid, err := c.PID(t.Context())
	must(t, err)
	dir := t.TempDir()
	type recorder struct {
		out  string
		said bytes.Buffer
		wait func() error
	}
	var all []*recorder
	for i, which := range [][]string{{"--container", c.ID[:13], "--containerd-address", h.Address()}, {"--pid", strconv.Itoa(pid)}} {
		r := &recorder{out: filepath.Join(dir, strconv.Itoa(i))}
		cmd := exec.Command(testenv.Binary(t, "optimizer"), append([]string{"record", "--server-path", h.server, "-o", r.out}, which...)...)
		said, err := cmd.StderrPipe()
		must(t, err)
		r.wait = testenv.Start(t, cmd)
		records := false
		lines := bufio.NewScanner(io.TeeReader(said, &r.said)) // what it warns of may come first
		for !records && lines.Scan() {
			records = strings.Contains(lines.Text(), "recording process "+strconv.Itoa(pid))
		}
		if !records {
			t.Fatalf("record %s: %q, %v; want that it records", which, r.said.String(), lines.Err())
		}
		all = append(all, r)
	}
	must(t, os.WriteFile(fmt.Sprintf("/proc/%d/root/tmp/go", pid), nil, 0o644))
	if r := finish(t, c, 0); r.exit != 0 {
		t.Fatalf("exit code %d: %s%s", r.exit, r.out, r.errOut)
	}
	for i, r := range all {
		must(t, r.wait())
		l, err := readList(r.out)
		must(t, err)
		if len(l.Losses) != 1 || l.Losses[0].Reason != "late" || i == 0 && (l.Digest != manifest || l.Container != c.ID) {
			t.Errorf("list of image %s, container %s, losses %+v; want %s, %s, and that it came late", l.Digest, l.Container, l.Losses, manifest, c.ID)
		}
		l.Losses = nil
		// The program runs already, and may raise no event.
		l.Accesses = slices.DeleteFunc(l.Accesses, func(a trace.Access) bool { return a.Path == "/workload" })
		judgeLayersList(t, l, s, layersWant[1:])
	}
}

// newHostOn is newHost with a snapshotter.
func newHostOn(t *testing.T, s snapshotted) *host {
	t.Helper()
	o := testcri.Options{Snapshotter: s.snapshotter}
	if s.config != nil {
		o.Config = s.config(t, t.TempDir())
	}
	return newHostWith(t, o)
}

// judgeLayersList holds a list of layersArgs against layersWant.
func judgeLayersList(t *testing.T, l *persist.List, s snapshotted, list []string) {
	t.Helper()
	if !l.Complete() || l.Engine != s.engine || l.Grade != trace.GradeFaultAround {
		t.Errorf("list by %s of grade %s, losses %+v; want %s, %s, none", l.Engine, l.Grade, l.Losses, s.engine, trace.GradeFaultAround)
	}
	var got []string
	for _, a := range l.Accesses {
		if a.How != trace.Runtime {
			got = append(got, a.Path)
		}
	}
	var want []string
	for _, w := range list {
		p, pages, _ := strings.Cut(w, " ")
		if strings.HasPrefix(w, "/odd/a b\tc") {
			p, pages = "/odd/a b\tc", ""
		}
		want = append(want, p)
		i := slices.IndexFunc(l.Accesses, func(a trace.Access) bool { return a.Path == p })
		if i < 0 {
			continue
		}
		if fault := pagesFault(l.Accesses[i], pages); fault != "" {
			t.Errorf("%s: %s", p, fault)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("files %q\nwant  %q", got, want)
	}
	if l.Skipped < 2 {
		t.Errorf("%d files were left out, want the two that the run made, at least", l.Skipped)
	}
}

// pagesFault returns how the pages of an access differ from want, as layersWant has them.
func pagesFault(a trace.Access, want string) string {
	if a.Ranges == nil {
		return "the whole file"
	}
	truth, more := strings.CutPrefix(want, "~")
	sure, all := map[int64]bool{}, map[int64]bool{}
	for _, r := range a.Ranges {
		for p := r.Offset / pageSize; p <= (r.Offset+r.Length-1)/pageSize; p++ {
			all[p] = true
			if r.Certain {
				sure[p] = true
			}
		}
	}
	var missing []int64
	n := 0
	for f := range strings.FieldsSeq(truth) {
		p, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return err.Error()
		}
		if n++; !all[p] || !more && !sure[p] && !passedOver(p, all, sure) {
			missing = append(missing, p)
		}
	}
	switch {
	case len(missing) > 0:
		return fmt.Sprintf("pages %d are missing or not certain: %+v", missing, a.Ranges)
	case !more && len(all) > n, more && len(all) == 0:
		return fmt.Sprintf("ranges %+v, want pages %q", a.Ranges, want)
	}
	return ""
}
