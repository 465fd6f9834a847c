package rafs_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

var v6Fixtures = []string{"v6-lz4_block", "v6-zstd", "v6-zstd-batch", "v6-zstd-sha256-64k"}

var v5Fixtures = []string{"v5-lz4-sha256", "v5-zstd"}

// allFixtures are the images of both versions.
var allFixtures = slices.Concat(v5Fixtures, v6Fixtures)

// loadFixture reads an image made by the real nydus-image.
func loadFixture(t testing.TB, name string) *stored {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), "nydus", name)
	s := &stored{blobs: map[string][]byte{}}
	var err error
	s.bootstrap, err = os.ReadFile(filepath.Join(dir, "image.boot"))
	must(t, err)
	blobs, err := os.ReadDir(filepath.Join(dir, "blobs"))
	must(t, err)
	for _, b := range blobs {
		s.blobs[b.Name()], err = os.ReadFile(filepath.Join(dir, "blobs", b.Name()))
		must(t, err)
	}
	return s
}

// expectedTree reads what all fixtures mean.
func expectedTree(t testing.TB) []entry {
	t.Helper()
	p, err := os.ReadFile(filepath.Join(testenv.Fixtures(t), "expected.json"))
	must(t, err)
	var raw []struct {
		Path, Type, SHA256, Target string
		Mode, UID, GID             uint32
		Mtime                      *int64
		Size                       uint64
		Rdev                       []uint32
		Xattrs                     map[string]string
		HardlinkOf                 string `json:"hardlink_of"`
	}
	must(t, json.Unmarshal(p, &raw))
	types := map[string]uint32{
		"dir": unix.S_IFDIR, "reg": unix.S_IFREG, "sym": unix.S_IFLNK, "chr": unix.S_IFCHR,
		"blk": unix.S_IFBLK, "fifo": unix.S_IFIFO, "sock": unix.S_IFSOCK,
	}
	var list []entry
	for _, r := range raw {
		e := entry{Path: r.Path, Mode: types[r.Type] | r.Mode, UID: r.UID, GID: r.GID, Size: r.Size, Target: r.Target, ContentSHA256: r.SHA256, Xattrs: map[string]string{}}
		if r.Mtime != nil {
			e.Mtime = *r.Mtime
		}
		if r.Rdev != nil {
			e.Major, e.Minor = r.Rdev[0], r.Rdev[1]
		}
		if r.HardlinkOf != "" {
			e.Link = "/" + r.HardlinkOf
		}
		if r.Type == "sym" {
			e.Size = uint64(len(r.Target))
		}
		for k, v := range r.Xattrs {
			value, err := hex.DecodeString(v)
			must(t, err)
			e.Xattrs[k] = string(value)
		}
		list = append(list, e)
	}
	return list
}

func TestFixtureTree(t *testing.T) {
	t.Parallel()
	for _, name := range allFixtures {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := loadFixture(t, name)
			img := s.open(t)
			want := map[string]entry{}
			for _, e := range expectedTree(t) {
				want[e.Path] = e
			}
			got := flatten(t, img, img.FS(s.reader))
			if len(got) != len(want) {
				t.Errorf("%d entries, want %d", len(got), len(want))
			}
			var gotList, wantList []entry
			for _, e := range got {
				w := want[e.Path]
				e.Nlink, e.Nsec = 0, 0 // not in the list
				if e.Path == "/" {
					e.Mtime = 0 // nor this
				}
				gotList, wantList = append(gotList, e), append(wantList, w)
			}
			diff(t, "tree", gotList, wantList)
		})
	}
}

func TestFixtureCheck(t *testing.T) {
	t.Parallel()
	for _, name := range allFixtures {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := loadFixture(t, name)
			report, err := s.check(rafs.CheckOptions{Data: true})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%+v", report)
			if report.Dirs != 58 || report.Symlinks != 5 || report.Blobs != 2 || report.CheckedBytes == 0 {
				t.Errorf("Check = %+v, want 58 dirs, 5 symlinks, 2 blobs, bytes", report)
			}
		})
	}
}

// TestFixtureRewrite holds that an image made elsewhere survives our writer, with chunks of the same kind.
func TestFixtureRewrite(t *testing.T) {
	t.Parallel()
	for _, name := range v6Fixtures {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := loadFixture(t, name)
			again := rewritten(t, s)
			sameBytes(t, again.bootstrap, s.bootstrap)
			if name == "v6-zstd-batch" {
				t.Log("nydus-image 2.2.0 does not know batch blobs")
				return
			}
			again.checkNydus(t)
		})
	}
}

// rewritten is the image with a bootstrap by our writer, which has been checked and holds the same tree.
func rewritten(t *testing.T, s *stored) *stored {
	t.Helper()
	img := s.open(t)
	var out bytes.Buffer
	_, err := rafs.WriteBootstrap(&out, img)
	must(t, err)
	again := &stored{bootstrap: out.Bytes(), blobs: s.blobs}
	if _, err := again.check(rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	img2 := again.open(t)
	diff(t, "tree", flatten(t, img2, img2.FS(again.reader)), flatten(t, img, img.FS(s.reader)))
	return again
}

// sameBytes holds that our bootstrap is upstream's byte for byte, but for two things: the chunk table's CRC fields, which
// we leave out, and the order of xattrs on one inode, which upstream takes from a hash map.
func sameBytes(t *testing.T, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d bytes, want %d", len(got), len(want))
	}
	info, err := rafs.Inspect(bytes.NewReader(want), int64(len(want)))
	must(t, err)
	chunks := info.Sections[len(info.Sections)-1]
	from, to := -1, 0
	for i := range got {
		field := (uint64(i) - chunks.Offset) % 80
		if crc := field == 36 || field >= 76; got[i] == want[i] || uint64(i) >= chunks.Offset && crc {
			continue
		}
		if from < 0 {
			from = i
		}
		to = i + 1
	}
	if from < 0 {
		t.Fatal("xattrs are in upstream's order: is the fixture another one?")
	}
	a, b := slices.Sorted(slices.Values(got[from:to])), slices.Sorted(slices.Values(want[from:to]))
	if to-from > 700 || !slices.Equal(a, b) {
		t.Errorf("bytes %d to %d differ in more than order", from, to)
	}
}

func TestFixtureMount(t *testing.T) {
	for _, name := range v6Fixtures {
		t.Run(name, func(t *testing.T) {
			s := loadFixture(t, name)
			bootstrap, _, devices := s.write(t, t.TempDir())
			dir := testenv.MountEROFS(t, bootstrap, devices...)
			out, err := exec.Command(testenv.Tool(t, "python3"), filepath.Join(testenv.Fixtures(t), "cmp_tree.py"),
				dir, filepath.Join(testenv.Fixtures(t), "expected.json")).CombinedOutput()
			if err != nil {
				t.Errorf("cmp_tree.py: %v\n%s", err, out)
			}
			img := s.open(t)
			want := flatten(t, img, img.FS(s.reader))
			diff(t, "mounted tree", flattenDir(t, dir, want), want)
		})
	}
}

// checkNydus asks the real nydus-image 2.2.0.
func (s *stored) checkNydus(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	bootstrap, blobDir, _ := s.write(t, dir)
	out, err := exec.Command(testenv.Tool(t, "nydus-image"), "check", "--bootstrap", bootstrap, "--blob-dir", blobDir).CombinedOutput()
	if err != nil {
		t.Errorf("nydus-image check: %v\n%s", err, out)
	}
}

// checkFsck asks fsck.erofs, which reads all data too.
func (s *stored) checkFsck(t *testing.T) {
	t.Helper()
	bootstrap, _, devices := s.write(t, t.TempDir())
	args := []string{"--extract"}
	for _, d := range devices {
		args = append(args, "--device="+d)
	}
	out, err := exec.Command(testenv.Tool(t, "fsck.erofs"), append(args, bootstrap)...).CombinedOutput()
	if err != nil {
		t.Errorf("fsck.erofs: %v\n%.2000s", err, out)
	}
}

// TestBatch reads chunks that share their compressed form.
func TestBatch(t *testing.T) {
	t.Parallel()
	s := loadFixture(t, "v6-zstd-batch")
	img := s.open(t)
	batched := 0
	for i, b := range img.Blobs {
		if b.Features&rafs.FeatureBatch == 0 {
			t.Errorf("blob %d has features %#x", i, b.Features)
		}
		r, err := s.reader(b)
		must(t, err)
		for _, c := range img.BlobChunks(i) {
			_, err := r.ReadChunk(t.Context(), c)
			must(t, err)
			if _, err := r.ReadStored(t.Context(), c); errors.Is(err, rafs.ErrUnsupported) {
				batched++
			} else if err != nil {
				t.Error(err)
			}
		}
		// A record that names another batch, size or place is seen.
		good := s.blobs[b.ID]
		step := 97
		if raceEnabled {
			step = 997
		}
		for at := len(good) - 8192; at < len(good); at += step {
			p := bytes.Clone(good)
			p[at] ^= 0x41
			s.blobs[b.ID] = p
			if _, err := s.check(rafs.CheckOptions{Data: true}); err == nil {
				t.Errorf("blob %d: byte %d changed, Check sees nothing", i, at)
			}
		}
		s.blobs[b.ID] = good
	}
	if batched < 100 {
		t.Errorf("%d chunks are batched", batched)
	}
}
