package lazy_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/endproc"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

// The power is cut while an image is read and fetched: the disk that the next machine finds has what was synced and not the rest. All that it reads by
// way of a new mount is right.
func TestPowerCut(t *testing.T) {
	for _, driver := range []lazy.Driver{lazy.DriverEROFS, lazy.DriverFUSE} {
		if testing.Short() && driver == lazy.DriverFUSE {
			continue // what is on the disk does not depend on who answers
		}
		for round := range 5 {
			lost := int64(0)
			t.Run(fmt.Sprintf("%s/%d", driver, round), func(t *testing.T) { lost = powerCut(t, driver) })
			if lost > 0 || t.Failed() {
				break
			}
			if round == 4 {
				t.Error("nothing was lost in any round: nothing was shown")
			}
		}
	}
}

// TestSoakPowerCut cuts the power a hundred times.
func TestSoakPowerCut(t *testing.T) {
	soak(t)
	lost := int64(0)
	for round := range 50 {
		for _, driver := range []lazy.Driver{lazy.DriverEROFS, lazy.DriverFUSE} {
			t.Run(fmt.Sprintf("%s/%d", driver, round), func(t *testing.T) { lost += powerCut(t, driver) })
		}
	}
	if lost == 0 {
		t.Error("nothing was lost in any round: nothing was shown")
	}
}

// powerCut returns how many bytes of cache files the cut has cost.
func powerCut(t *testing.T, driver lazy.Driver) (lost int64) {
	t.Helper()
	disk := testenv.NewDisk(t, 96<<20, "mkfs.ext4", "-q", "-F")
	// The journal's timer is off; pages are not old enough to be written back.
	first, dir := boxOn(t, driver, testenv.MountImage(t, disk, "commit=300"))
	whole := treeOf(t, first.mount(first.mountpoint("reference"), layout(t)).Dir)
	first.unmount(filepath.Join(first.dir, "reference"))
	eventually(t, func() string {
		_, err := first.client.CollectCache(t.Context(), &lazy.CachePolicy{Limit: 1})
		left, err2 := filepath.Glob(filepath.Join(first.state, "blobs", "*"))
		if len(left) != 0 {
			return fmt.Sprintf("%v are left, %v", left, errors.Join(err, err2))
		}
		return ""
	})
	syncDisk(t, dir)
	r := layout(t)
	r.Background, r.Rate, r.Share = "full", 200_000, lazy.ShareNone
	m := first.mount(first.mountpoint("mnt"), r)
	ctx, stop := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	for i := range 4 {
		readers.Go(func() { whole.readSlowly(ctx, m.Dir, uint64(i)) })
	}
	s := first.spared()
	first.afterSync(m)
	if err := endproc.All(s.PID, s.Holder, s.Spare); err != nil { // stopped first, so that none can start another
		t.Fatal(err)
	}
	p, err := os.ReadFile(disk) // as it is when nobody is there to write to it
	stop()
	if err != nil {
		t.Fatal(err)
	}
	readers.Wait()
	if err := testenv.Unmount(m.Dir); err != nil {
		t.Fatal(err)
	}
	lost = first.stored()

	copied := filepath.Join(t.TempDir(), "copy")
	if err := os.WriteFile(copied, p, 0o600); err != nil {
		t.Fatal(err)
	}
	next, _ := boxOn(t, driver, testenv.MountImage(t, copied, ""))
	there := next.stored()
	lost -= there
	r.Background = "none"
	again := next.mount(next.mountpoint("mnt"), r)
	t.Logf("cache files take %d bytes after the cut and %d more before it; %d of %d bytes are local", there, lost, again.Local, again.Total)
	if again.Local == 0 || again.Local == again.Total {
		t.Errorf("%d of %d bytes are local after the power was cut, want what was synced", again.Local, again.Total)
	}
	if v := next.verify(); len(v.Bad) != 0 || len(v.Failed) != 0 {
		t.Errorf("verify: %+v, want nothing wrong", v)
	}
	if err := whole.reads(again.Dir); err != nil {
		t.Error(err)
	}
	compare(t, again.Dir)
	next.unmount(again.Dir)
	return lost
}

// stored returns how many bytes the data of all cache files take.
func (b *box) stored() (bytes int64) {
	b.t.Helper()
	names, err := filepath.Glob(filepath.Join(b.state, "blobs", "*", "data"))
	if err != nil || len(names) == 0 {
		b.t.Fatalf("%d cache files, %v", len(names), err)
	}
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			b.t.Fatal(err)
		}
		bytes += st.Blocks * 512
	}
	return bytes
}

// boxOn is a box whose state lies on a disk that is mounted at dir.
func boxOn(t *testing.T, driver lazy.Driver, dir string) (*box, string) {
	t.Helper()
	b := newBoxOf(t, driver) // after the disk, so that it ends before
	b.state = filepath.Join(dir, "state")
	b.command()
	return b, dir
}

// afterSync waits until some of a mount is durable and, for a random while, for more to come. It fails the test when all of it is local, which leaves
// nothing to show.
func (b *box) afterSync(m lazy.Mount) {
	b.t.Helper()
	synced, now := int64(0), lazy.Mount{}
	eventually(b.t, func() string {
		files, err := filepath.Glob(filepath.Join(b.state, "blobs", "*", "ready"))
		if now = b.at(m.Dir); err != nil || len(files) == 0 || now.Local == 0 {
			return fmt.Sprintf("nothing is durable of %+v, %v", now, err)
		}
		return ""
	})
	synced = now.Local
	time.Sleep(time.Duration(rand.IntN(1000)) * time.Millisecond)
	eventually(b.t, func() string {
		if now = b.at(m.Dir); now.Local <= synced {
			return fmt.Sprintf("nothing more comes: %+v", now)
		}
		return ""
	})
	if now.Local >= m.Total {
		b.t.Fatalf("%d of %d bytes are local before the power is cut", now.Local, m.Total)
	}
}

// readSlowly reads files at random until ctx ends; what it meets then is nobody's business any more.
func (tr tree) readSlowly(ctx context.Context, dir string, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 9))
	for ctx.Err() == nil {
		_, err := os.ReadFile(filepath.Join(dir, tr.names[rnd.IntN(len(tr.names))]))
		if errors.Is(err, unix.ENOTCONN) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}
