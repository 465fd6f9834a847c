package lazy_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// heldBy returns the descriptors of a process, by what they refer to.
func heldBy(t testing.TB, pid int) map[string]int {
	t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(links) == 0 {
		t.Fatalf("descriptors of %d: %d, %v", pid, len(links), err)
	}
	files := map[string]int{}
	for _, link := range links {
		to, err := os.Readlink(link)
		if err != nil {
			continue // closed since
		}
		kind, what, ok := strings.Cut(to, ":[")
		switch {
		case strings.HasPrefix(to, "/sys/"), what == "eventpoll]", what == "eventfd]":
			continue // the runtime's, from when it first needs them
		case ok && kind != "anon_inode":
			to = kind // of sockets and pipes, whose numbers differ
		}
		files[to]++
	}
	return files
}

// household is what daemon and holders have at one moment.
type household struct {
	pids  []int // daemon, holder, spare
	files []map[string]int
}

// household waits for all three, until the spare has what the holder keeps.
func (b *box) household() (h household) {
	b.t.Helper()
	s := b.spared()
	h.pids = []int{s.PID, s.Holder, s.Spare}
	eventually(b.t, func() string {
		h.files = nil
		for _, pid := range h.pids {
			h.files = append(h.files, heldBy(b.t, pid))
		}
		for what, n := range h.files[1] {
			kept := strings.HasPrefix(what, b.state) || strings.HasPrefix(what, "/memfd:") || what == "anon_inode:[fanotify]" || what == "/dev/fuse"
			if kept && h.files[2][what] < n {
				return fmt.Sprintf("the holder has %d of %s, the spare %d", n, what, h.files[2][what])
			}
		}
		return ""
	})
	return h
}

// more says what the processes have now that they had not, beside what one request takes for its time.
func (h household) more(t testing.TB) string {
	t.Helper()
	var found []string
	for i, pid := range h.pids {
		for what, n := range heldBy(t, pid) {
			if what != "socket" && n > h.files[i][what] || n > h.files[i][what]+1 {
				found = append(found, fmt.Sprintf("%s has %d of %s, had %d", []string{"daemon", "holder", "spare"}[i], n, what, h.files[i][what]))
			}
		}
	}
	slices.Sort(found)
	return strings.Join(found, "\n")
}

// reads compares the files of a directory with those of a tree.
func (tr tree) reads(dir string) error {
	for _, name := range tr.names {
		p, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil && sha256.Sum256(p) != tr.sums[name] {
			err = fmt.Errorf("%s%s has wrong bytes", dir, name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Fifty at once, of five images; behind FUSE v5 ones are among them. Each is read whole, and nothing of them is left.
func TestMany(t *testing.T) {
	for _, driver := range []lazy.Driver{lazy.DriverEROFS, lazy.DriverFUSE} {
		t.Run(string(driver), func(t *testing.T) {
			if testing.Short() && driver == lazy.DriverFUSE {
				t.Skip("one driver is enough for a short run")
			}
			testMany(t, newBoxOf(t, driver))
		})
	}
}

func testMany(t *testing.T, b *box) {
	requests := []lazy.Request{layout(t), loose(t, "v6-zstd"), loose(t, "v6-lz4_block"), loose(t, "v6-zstd-batch"), loose(t, "v6-zstd-sha256-64k")}
	if b.driver == lazy.DriverFUSE {
		requests[1], requests[2] = loose(t, "v5-zstd"), loose(t, "v5-lz4-sha256")
	}
	small := b.image("small", mixed(1, 3, 0))
	keep := b.mount(b.mountpoint("keep"), small) // the daemon stays
	b.unmount(b.mount(b.mountpoint("once"), small).Dir)
	before := b.household()
	var g errgroup.Group
	n := 50
	if testing.Short() {
		n = 15
	}
	mounts := make([]lazy.Mount, n)
	for i := range n {
		dir := b.mountpoint(fmt.Sprintf("mnt-%d", i))
		g.Go(func() (err error) {
			mounts[i], err = b.client.Mount(t.Context(), dir, b.of(requests[i%len(requests)]))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	b.narrow()
	for i := range requests {
		g.Go(func() error { return compareErr(t, mounts[i].Dir) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	whole := treeOf(t, mounts[0].Dir) // of all images
	g.SetLimit(8)
	for _, m := range mounts {
		g.Go(func() error { return whole.reads(m.Dir) })
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if s := b.status(); len(s.Mounts) != n+1 {
		t.Errorf("%d mounts, want %d", len(s.Mounts), n+1)
	}
	b.quiet()
	for _, m := range mounts {
		g.Go(func() error { return b.client.Unmount(t.Context(), m.Dir, false) })
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	b.onlyKept(before, keep, mounts)
	b.unmount(keep.Dir)
}

// onlyKept fails the test unless soon nothing is left of mounts that were: daemon and holders, whom nobody replaced, have what they had before.
func (b *box) onlyKept(before household, keep lazy.Mount, gone []lazy.Mount) {
	b.t.Helper()
	eventually(b.t, func() string {
		s := b.status()
		if len(s.Mounts) != 1 || s.Mounts[0].ID != keep.ID || s.PID != before.pids[0] || s.Holder != before.pids[1] || s.Spare != before.pids[2] {
			return fmt.Sprintf("%+v, want %v with one mount", s, before.pids)
		}
		for _, m := range gone {
			if mounted, err := mountinfo.Mounted(m.Dir); mounted || err != nil {
				return fmt.Sprintf("something is mounted at %s, %v", m.Dir, err)
			}
			// The kernel gives names of FUSE out again, to others too.
			if alive, err := alive(m); m.Driver == lazy.DriverEROFS && (alive || err != nil) {
				return fmt.Sprintf("superblock %s is left, %v", m.BDI, err)
			}
		}
		records, err := os.ReadDir(filepath.Join(b.state, "mounts"))
		boots, err2 := os.ReadDir(filepath.Join(b.state, "bootstraps"))
		if err = errors.Join(err, err2); err != nil || len(records) != 1 || len(boots) != 1 {
			return fmt.Sprintf("records %v, bootstraps %v, %v, want one each", records, boots, err)
		}
		return before.more(b.t)
	})
	if n, most := b.narrow(), keep.Blobs; n > most {
		b.t.Errorf("%d marks are left, want at most %d", n, most)
	}
}

// Many mounts, one after the other, leave nothing.
func TestManyInARow(t *testing.T) {
	mostlyEROFS(t, func(t *testing.T, b *box) { testManyInARow(t, b, 20) })
}

// TestSoakManyInARow is a thousand of each driver.
func TestSoakManyInARow(t *testing.T) {
	soak(t)
	eachDriver(t, func(t *testing.T, b *box) { testManyInARow(t, b, 1000) })
}

// soak skips the test unless it was asked for what takes long.
func soak(t *testing.T) {
	t.Helper()
	if os.Getenv("SOAK") == "" {
		t.Skip("SOAK is not set: make soak")
	}
}

func testManyInARow(t *testing.T, b *box, rounds int) {
	keep := b.mount(b.mountpoint("keep"), loose(t, "v6-zstd")) // the daemon stays for all of them
	dir, r := b.mountpoint("mnt"), layout(t)
	var before household
	var memory []int
	var last lazy.Mount
	for i := range rounds {
		last = b.mount(dir, r)
		if _, err := os.ReadFile(filepath.Join(dir, "nosuchfile")); !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		b.unmount(dir)
		if alive, err := alive(last); alive || err != nil {
			t.Fatalf("round %d: superblock %s: %v, %v", i, last.BDI, alive, err)
		}
		if i == rounds/2 {
			before = b.household()
			memory = before.resident(t)
		}
	}
	b.onlyKept(before, keep, []lazy.Mount{last})
	now := before.resident(t)
	for i, kib := range now {
		if kib > memory[i]+16<<10 {
			t.Errorf("%v: %d KiB after %d mounts, %d after half of them", before.pids, now, rounds, memory)
			break
		}
	}
	t.Logf("daemon, holder, spare after %d mounts: %d KiB, descriptors %v", rounds, now, before.counts())
	b.unmount(keep.Dir)
}

// resident returns the resident memory of daemon, holder and spare in KiB.
func (h household) resident(t testing.TB) (kib []int) {
	t.Helper()
	for _, pid := range h.pids {
		kib = append(kib, resident(t, pid))
	}
	return kib
}

// counts returns how many descriptors each has.
func (h household) counts() (n []int) {
	for _, files := range h.files {
		sum := 0
		for _, k := range files {
			sum += k
		}
		n = append(n, sum)
	}
	return n
}
