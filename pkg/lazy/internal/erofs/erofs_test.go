package erofs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// needKernel skips the test where EROFS is not mounted from plain files.
func needKernel(t *testing.T) {
	t.Helper()
	testenv.Root(t)
	testenv.Kernel(t, "EROFS mounts of plain files", erofs.Probe(t.TempDir()))
}

// expand writes the cache files of a fixture's blobs and returns what to mount.
func expand(t *testing.T, variant, dir string) erofs.Options {
	t.Helper()
	fixture := filepath.Join(testenv.Fixtures(t), "nydus", variant)
	img, err := nydusimage.OpenFiles(filepath.Join(fixture, "image.boot"), filepath.Join(fixture, "blobs"))
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	chunks := img.Chunks()
	defer chunks.Close()
	o := erofs.Options{Bootstrap: filepath.Join(fixture, "image.boot"), ReadAhead: -1}
	for n := range img.RAFS.Blobs {
		r, err := chunks.Blob(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(dir, fmt.Sprintf("device-%d", n))
		f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
		if err == nil {
			err = errors.Join(img.RAFS.ExpandBlob(t.Context(), n, r, f), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		o.Devices = append(o.Devices, name)
	}
	return o
}

// attach mounts o at a directory until the test ends.
func attach(t *testing.T, o erofs.Options) (dir string, d *erofs.Detached) {
	t.Helper()
	d, err := erofs.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	dir = t.TempDir()
	if err := erofs.Attach(d.File(), dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := erofs.Unmount(dir, false); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Error(err, erofs.Unmount(dir, true))
		}
	})
	return dir, d
}

// waitGone waits until a superblock is gone.
func waitGone(t *testing.T, bdi string) {
	t.Helper()
	for range 500 {
		alive, err := erofs.Alive(bdi)
		if err != nil {
			t.Fatal(err)
		}
		if !alive {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("superblock of %s is still there", bdi)
}

func TestMount(t *testing.T) {
	needKernel(t)
	for _, variant := range []string{"v6-zstd", "v6-lz4_block", "v6-zstd-sha256-64k"} {
		t.Run(variant, func(t *testing.T) {
			dir, d := attach(t, expand(t, variant, t.TempDir()))
			fixtures := testenv.Fixtures(t)
			out, err := exec.Command(testenv.Tool(t, "python3"), filepath.Join(fixtures, "cmp_tree.py"), dir, filepath.Join(fixtures, "expected.json")).CombinedOutput()
			if err != nil {
				t.Errorf("cmp_tree.py: %v\n%s", err, out)
			}
			if dev, isEROFS, err := erofs.DeviceOf(dir); err != nil || !isEROFS || dev != d.Device {
				t.Errorf("DeviceOf(mount) = %d, %v, %v, want %d, true", dev, isEROFS, err, d.Device)
			}
			if dev, isEROFS, err := erofs.DeviceOf(filepath.Dir(dir)); err != nil || isEROFS || dev == d.Device {
				t.Errorf("DeviceOf(its parent) = %d, %v, %v, want another, false", dev, isEROFS, err)
			}
		})
	}
}

// manyBlobs writes an image with n blobs, one file in each, and returns what to mount.
func manyBlobs(t *testing.T, n int, dir string) erofs.Options {
	t.Helper()
	img := &rafs.Image{Root: &rafs.Inode{Mode: unix.S_IFDIR | 0o755}, ChunkSize: rafs.DefaultChunkSize}
	var o erofs.Options
	for i := range n {
		content := []byte(fmt.Sprintf("content of blob %d", i))
		w, err := rafs.NewBlobWriter(&bytes.Buffer{}, rafs.BlobOptions{})
		if err != nil {
			t.Fatal(err)
		}
		c, err := w.Append(rafs.EncodedChunk{Digest: img.Digester.Sum(content), Data: content, UncompressedSize: uint32(len(content))})
		if err != nil {
			t.Fatal(err)
		}
		b, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		c.Blob = uint16(i)
		img.Blobs = append(img.Blobs, b)
		img.Root.Children = append(img.Root.Children, rafs.Dirent{
			Name:  fmt.Sprintf("file-%03d", i),
			Inode: &rafs.Inode{Mode: unix.S_IFREG | 0o644, Size: uint64(len(content)), Chunks: []rafs.Chunk{c}},
		})
		device := make([]byte, b.UncompressedSize)
		copy(device[c.UncompressedOffset:], content)
		o.Devices = append(o.Devices, filepath.Join(dir, fmt.Sprintf("device-%03d", i)))
		if err := os.WriteFile(o.Devices[i], device, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var boot bytes.Buffer
	if _, err := rafs.WriteBootstrap(&boot, img); err != nil {
		t.Fatal(err)
	}
	o.Bootstrap = filepath.Join(dir, "image.boot")
	if err := os.WriteFile(o.Bootstrap, boot.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return o
}

// As many devices as the format has, in a directory whose paths are longer than fsconfig(2)
// takes, and longer together than a page of mount options.
func TestManyDevices(t *testing.T) {
	needKernel(t)
	deep := filepath.Join(t.TempDir(), strings.Repeat("d", 200), strings.Repeat("e", 200))
	if err := os.MkdirAll(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{1, 120, rafs.MaxBlobs} {
		dir, _ := attach(t, manyBlobs(t, n, deep))
		for i := range n {
			got, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("file-%03d", i)))
			if want := fmt.Sprintf("content of blob %d", i); err != nil || string(got) != want {
				t.Fatalf("%d blobs, file %d: %q, %v, want %q", n, i, got, err, want)
			}
		}
	}
}

func TestReadAhead(t *testing.T) {
	needKernel(t)
	o := manyBlobs(t, 1, t.TempDir())
	for _, kib := range []int{0, 4, 512} {
		o.ReadAhead = kib
		_, d := attach(t, o)
		if got, err := erofs.ReadAhead(d.BDI); err != nil || got != kib {
			t.Errorf("ReadAhead() = %d, %v, want %d", got, err, kib)
		}
		if err := erofs.SetReadAhead(d.BDI, 128); err != nil {
			t.Error(err)
		}
		if got, err := erofs.ReadAhead(d.BDI); err != nil || got != 128 {
			t.Errorf("ReadAhead() = %d, %v, want 128", got, err)
		}
	}
}

// Every mount has a backing device of its own, also when many are made at the same moment,
// and others mount EROFS beside us, also when somebody keeps the lock: every local user can.
func TestBackingDevices(t *testing.T) {
	needKernel(t)
	for name, locked := range map[string]bool{"lock": false, "lock that somebody keeps": true} {
		t.Run(name, func(t *testing.T) {
			if locked {
				keepLock(t)
			}
			testBackingDevices(t)
		})
	}
}

// keepLock keeps the lock until the test ends.
func keepLock(t *testing.T) {
	t.Helper()
	f, err := os.Open("/sys/class/bdi")
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A mount that is given up does not wait for the lock.
func TestGivenUp(t *testing.T) {
	needKernel(t)
	keepLock(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the client hung up")
	cancel(why)
	if d, err := erofs.New(ctx, manyBlobs(t, 1, t.TempDir())); d != nil || !errors.Is(err, why) {
		t.Errorf("New = %v, %v, want the cause", d, err)
	}
}

func testBackingDevices(t *testing.T) {
	o := manyBlobs(t, 2, t.TempDir())
	o.ReadAhead = 16
	ctx, stop := context.WithCancel(t.Context())
	var others, ours sync.WaitGroup
	others.Go(func() {
		dir := t.TempDir()
		for ctx.Err() == nil {
			if err := testenv.MountEROFSAt(dir, o.Bootstrap, o.Devices...); err != nil {
				t.Error(err)
				return
			}
			if err := testenv.Unmount(dir); err != nil {
				t.Error(err)
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	const n = 16
	made := make([]*erofs.Detached, n)
	for i := range made {
		ours.Go(func() {
			d, err := erofs.New(t.Context(), o)
			if err != nil {
				t.Error(err)
			}
			made[i] = d
		})
	}
	ours.Wait()
	stop()
	others.Wait()
	bdi, device := map[string]bool{}, map[uint64]bool{}
	for _, d := range made {
		if d == nil {
			continue
		}
		if bdi[d.BDI] || device[d.Device] {
			t.Errorf("%s or device %d belongs to two mounts", d.BDI, d.Device)
		}
		bdi[d.BDI], device[d.Device] = true, true
	}
	// A backing device goes with its own mount: close one after the other.
	for _, d := range made {
		if d == nil {
			continue
		}
		if alive, err := erofs.Alive(d.BDI); err != nil || !alive {
			t.Errorf("Alive(%s) = %v, %v before its mount was closed", d.BDI, alive, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		waitGone(t, d.BDI)
	}
}

// A superblock lives as long as its last user, and is seen to.
func TestLiveness(t *testing.T) {
	needKernel(t)
	dir, d := attach(t, manyBlobs(t, 1, t.TempDir()))
	f, err := os.Open(filepath.Join(dir, "file-000"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := erofs.Unmount(dir, false); !errors.Is(err, erofs.ErrBusy) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("Unmount(busy) = %v, want ErrBusy", err)
	}
	if err := erofs.Unmount(dir, true); err != nil {
		t.Errorf("Unmount(busy, lazy) = %v", err)
	}
	if alive, err := erofs.Alive(d.BDI); err != nil || !alive {
		t.Errorf("Alive() = %v, %v with an open file", alive, err)
	}
	if living, err := erofs.Living(); err != nil || !living[d.BDI] {
		t.Errorf("Living() = %v, %v, want %s in it", living, err, d.BDI)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	waitGone(t, d.BDI)
	if err := erofs.SetReadAhead(d.BDI, 4); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("SetReadAhead(gone) = %v, want ErrNotExist", err)
	}
	if err := erofs.Unmount(dir, false); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Unmount(not mounted) = %v, want EINVAL", err)
	}
}

// A detached mount goes into the mount namespace of who attaches it.
func TestOtherNamespace(t *testing.T) {
	needKernel(t)
	d, err := erofs.New(t.Context(), manyBlobs(t, 1, t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	dir := t.TempDir()
	testenv.MountNamespace(t, func() error {
		if err := erofs.Attach(d.File(), dir); err != nil {
			return err
		}
		_, err := os.Stat(filepath.Join(dir, "file-000"))
		return errors.Join(err, erofs.Unmount(dir, true)) // busy: d has it open
	})
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("%v, %v in the test's own namespace, want nothing", left, err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	waitGone(t, d.BDI)
}

func TestFaults(t *testing.T) {
	needKernel(t)
	dir := t.TempDir()
	good := manyBlobs(t, 2, dir)
	zeros := filepath.Join(dir, "zeros")
	if err := os.WriteFile(zeros, make([]byte, 1<<14), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		o    erofs.Options
		want error
		text string
	}{
		{"no bootstrap", erofs.Options{Bootstrap: filepath.Join(dir, "none"), Devices: good.Devices}, os.ErrNotExist, "none"},
		{"no image", erofs.Options{Bootstrap: zeros}, unix.EINVAL, "zeros"},
		{"a device is missing", erofs.Options{Bootstrap: good.Bootstrap, Devices: good.Devices[:1]}, unix.EINVAL, "1 devices"},
		{"a device is not there", erofs.Options{Bootstrap: good.Bootstrap, Devices: []string{good.Devices[0], filepath.Join(dir, "none")}}, os.ErrNotExist, "2 devices"},
		{"a directory", erofs.Options{Bootstrap: dir}, nil, dir},
		{"no long name", erofs.Options{Bootstrap: filepath.Join(dir, strings.Repeat("n", 250))}, os.ErrNotExist, "nnn"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := erofs.New(t.Context(), tt.o)
			if err == nil || d != nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("New() = %v, %v, want %v with %q", d, err, tt.want, tt.text)
			}
		})
	}
	d, err := erofs.New(t.Context(), good)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := erofs.Attach(d.File(), filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Attach(no directory) = %v, want ErrNotExist", err)
	}
	if err := erofs.Attach(d.File(), zeros); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("Attach(file) = %v, want ENOTDIR", err)
	}
}
