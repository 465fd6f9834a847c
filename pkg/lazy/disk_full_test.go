package lazy_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

// smallBox is a box whose state lies on a disk of its own, dir.
func smallBox(t *testing.T, driver lazy.Driver) (b *box, dir string) {
	t.Helper()
	dir = testenv.MountDisk(t, 128<<20, "mkfs.ext4", "-q", "-F", "-m", "0")
	b = newBoxOf(t, driver) // after the disk, so that it ends before
	b.state = filepath.Join(dir, "state")
	b.command("--limit", "30s") // no read is to come near it
	return b, dir
}

// leave writes a file that leaves the disk so many free bytes.
func leave(t *testing.T, name string, free int64) {
	t.Helper()
	syncDisk(t, filepath.Dir(name))
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(name), &st); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(name)
	if err == nil {
		err = errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-free), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// syncDisk has a file system write everything; ext4 gives blocks free only then.
func syncDisk(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	if err == nil {
		err = errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// fillUp writes until there is no room for another block.
func fillUp(t *testing.T, name string) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	for size := 1 << 20; size >= 512; size /= 2 {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(errors.Join(err, f.Close()))
		}
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// readFiles has n readers read all files, from the disk or from wherever they come, each in an order of its own. It returns the files that all of them
// read; the others gave EIO to one at least. No byte is wrong and nobody hangs.
func readFiles(t *testing.T, dir string, files content, n int) (local content) {
	t.Helper()
	var names []string
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	failed := map[string]bool{}
	var mu sync.Mutex
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() {
			for _, at := range rand.New(rand.NewPCG(uint64(i), 2)).Perm(len(names)) {
				sum, err := readFresh(filepath.Join(dir, names[at]))
				switch {
				case errors.Is(err, unix.EIO):
					mu.Lock()
					failed[names[at]] = true
					mu.Unlock()
				case err != nil:
					t.Errorf("read: %v, want EIO or nothing", err)
				case sum != sha256.Sum256(files[names[at]]):
					t.Errorf("%s has wrong bytes", names[at])
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { group.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(3 * time.Minute):
		t.Fatal("readers hang")
	}
	local = content{}
	for _, name := range names {
		if !failed[name] {
			local[name] = files[name]
		}
	}
	return local
}

// The disk of the cache gets full under readers, the prefetch stream and the background: what does not fit is an error of who reads it, what is local and
// other mounts are read on, by the next daemon too, and with room again all of it comes with nothing mounted anew.
func TestDiskFull(t *testing.T) {
	for _, driver := range []lazy.Driver{lazy.DriverEROFS, lazy.DriverFUSE} {
		t.Run(string(driver), func(t *testing.T) {
			if testing.Short() && driver == lazy.DriverFUSE {
				t.Skip("one driver is enough for a short run")
			}
			testDiskFull(t, driver)
		})
	}
}

func testDiskFull(t *testing.T, driver lazy.Driver) {
	b, disk := smallBox(t, driver)
	files, other := mixed(1, 400, 0), mixed(2, 20, 0)
	var listed []string
	for name := range files {
		if strings.HasPrefix(name, "d1/") || strings.HasPrefix(name, "d2/") {
			listed = append(listed, "/"+name)
		}
	}
	list := filepath.Join(b.dir, "list")
	if err := os.WriteFile(list, []byte(strings.Join(listed, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, small := b.image("large", files, "--profile", list), b.image("small", other)
	r.Background = "full"
	whole := b.mount(b.mountpoint("whole"), small)
	readFiles(t, whole.Dir, other, 1)
	leave(t, filepath.Join(disk, "ballast"), 16<<20)

	m := b.mount(b.mountpoint("mnt"), r)
	local := readFiles(t, m.Dir, files, 8)
	fillUp(t, filepath.Join(disk, "rest"))
	before := b.status()
	if len(local) == 0 || len(local) == len(files) {
		t.Fatalf("%d of %d files were read, want some to fit on the disk: %+v", len(local), len(files), b.at(m.Dir))
	}
	t.Logf("%d of %d files were read; %d of %d bytes are local, %+v", len(local), len(files), b.at(m.Dir).Local, m.Total, b.at(m.Dir).Stats)
	goOn := func(when string) {
		t.Helper()
		if got := readFiles(t, m.Dir, local, 4); len(got) != len(local) {
			t.Errorf("%s: %d files are read of %d that were", when, len(got), len(local))
		}
		if got := readFiles(t, whole.Dir, other, 1); len(got) != len(other) {
			t.Errorf("%s: %d files of another mount are read, want %d", when, len(got), len(other))
		}
		b.quiet()
	}
	goOn("on the full disk")
	asked := b.at(m.Dir).Stats.Demand.Requests
	if got := readFiles(t, m.Dir, files, 8); len(got) >= len(files) {
		t.Errorf("%d files are read on the full disk, want fewer than %d", len(got), len(files))
	}
	if now := b.at(m.Dir).Stats.Demand.Requests; now > asked+50 { // each reader one or two when the disk has not been asked for a while
		t.Errorf("%d requests for what there is no room for", now-asked)
	}
	if _, err := b.client.Mount(t.Context(), b.mountpoint("third"), b.of(b.image("third", mixed(3, 300, 0)))); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("Mount() on the full disk = %v, want ENOSPC", err)
	}
	if now := b.status(); now.PID != before.PID || now.Holder != before.Holder || len(now.Mounts) != 2 {
		t.Errorf("%+v, want daemon %d with two mounts", now, before.PID)
	}
	b.killDaemon()
	goOn("for another daemon")

	for _, name := range []string{"ballast", "rest"} {
		if err := os.Remove(filepath.Join(disk, name)); err != nil {
			t.Fatal(err)
		}
	}
	syncDisk(t, disk)
	if got := readFiles(t, m.Dir, files, 8); len(got) != len(files) {
		t.Errorf("%d of %d files are read with room again", len(got), len(files))
	}
	goOn("with room again")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if done, err := b.client.Wait(ctx, m.Device); err != nil || done.State != lazy.StateComplete || done.Local != done.Total {
		t.Errorf("Wait() = %+v, %v, want complete", done, err)
	}
	if v := b.verify(); len(v.Bad) != 0 || len(v.Failed) != 0 || v.Chunks == 0 {
		t.Errorf("verify: %+v, want nothing wrong", v)
	}
	b.unmount(m.Dir)
	b.unmount(whole.Dir)
	eventually(t, func() string {
		if left, err := os.ReadDir(filepath.Join(b.state, "mounts")); err != nil || len(left) != 0 {
			return fmt.Sprintf("records %v, %v, want none", left, err)
		}
		return ""
	})
}
