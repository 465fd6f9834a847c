package lazy_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// tree are the regular files of a tree with what they have.
type tree struct {
	names []string
	sums  map[string][sha256.Size]byte
}

// treeOf reads a tree that was compared with what the images mean.
func treeOf(t testing.TB, dir string) tree {
	t.Helper()
	compare(t, dir)
	tr := tree{sums: map[string][sha256.Size]byte{}}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		name := strings.TrimPrefix(path, dir)
		tr.names, tr.sums[name] = append(tr.names, name), sha256.Sum256(b)
		return err
	})
	if err != nil || len(tr.names) == 0 {
		t.Fatalf("%d files in %s, %v", len(tr.names), dir, err)
	}
	return tr
}

// drill is mounts that come, are read and go, while the collector takes what it can get and daemons and holders die.
type drill struct {
	*box
	tree     tree
	requests []lazy.Request
	cycles   atomic.Int64 // left
	mounts   atomic.Int64
	reads    atomic.Int64
	again    atomic.Int64 // mounts whose daemon died on the way too often
	kills    atomic.Int64
}

// The collector runs without a pause under mounts that are read, with kill -9 at random: no wrong byte, no failed read, no blob that
// is wrong on disk, and at the end nothing is left. SOAK=1 makes it 1,000 mounts by 20 readers.
func TestCollectDrill(t *testing.T) {
	readers, cycles := 4, 12
	if os.Getenv("SOAK") != "" {
		readers, cycles = 20, 1000
	}
	d := &drill{box: newBox(t)}
	d.command("--cache-limit", "1", "--cache-pause", "1ms")
	for _, variant := range []string{"v6-zstd", "v6-lz4_block", "v6-zstd-sha256-64k", "v6-zstd-batch"} {
		d.requests = append(d.requests, loose(t, variant))
	}
	if os.Getenv("SOAK") != "" { // both drivers, also for the same blobs at once
		for _, variant := range []string{"v6-zstd", "v6-lz4_block", "v5-zstd"} {
			r := loose(t, variant)
			r.Driver = lazy.DriverFUSE
			d.requests = append(d.requests, r)
		}
	}
	d.tree = treeOf(t, d.whole("reference", d.requests[0]).Dir)
	d.unmount(filepath.Join(d.dir, "reference"))
	d.cycles.Store(int64(cycles))
	var work, others sync.WaitGroup
	for n := range readers {
		work.Go(func() { d.reader(n) })
	}
	ctx, stop := context.WithCancel(t.Context())
	others.Go(func() { d.killer(ctx) })
	others.Go(func() { d.verifier(ctx) })
	work.Wait()
	stop()
	others.Wait()
	t.Logf("%d mounts, %d files read, %d kills, %d mounts asked for again", d.mounts.Load(), d.reads.Load(), d.kills.Load(), d.again.Load())
	eventually(t, func() string {
		if c := d.cache(); len(c.Entries) != 0 {
			return fmt.Sprintf("%+v, want nothing left", c)
		}
		return ""
	})
	d.noDangling()
}

// command starts daemons with more arguments.
func (b *box) command(args ...string) {
	b.t.Helper()
	c, err := lazy.NewClient(lazy.ClientOptions{
		StateDir: b.state, RunDir: b.run, Version: "test",
		Command: append([]string{b.binary, "lazyd", "--state-dir", b.state, "--run-dir", b.run, "--idle", "100ms", "--limit", "10s"}, args...),
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.client = c
}

// noDangling is the independent walk of the index: it names nothing when all was removed, and what is there of mounts afterwards.
func (d *drill) noDangling() {
	if n := d.walk(); n != 0 {
		d.t.Errorf("%d entries are left of what was removed", n)
	}
	d.client = d.clientOf(d.state, d.run)
	d.unmount(d.whole("last", d.requests[0]).Dir)
	if d.walk() == 0 {
		d.t.Error("the index names nothing of what is there")
	}
}

// reader mounts, reads and unmounts.
func (d *drill) reader(n int) {
	rnd := rand.New(rand.NewPCG(7, uint64(n)))
	dir := d.mountpoint(fmt.Sprint("reader", n))
	for (d.cycles.Add(-1) >= 0 || d.kills.Load() < 2) && !d.t.Failed() {
		r := d.requests[rnd.IntN(len(d.requests))]
		r.Background = []string{"none", "full"}[rnd.IntN(2)]
		if err := d.mountAgain(dir, r); err != nil {
			d.t.Errorf("mount: %v", err)
			return
		}
		d.mounts.Add(1)
		for range 5 + rnd.IntN(15) {
			d.read(dir, d.tree.names[rnd.IntN(len(d.tree.names))])
		}
		if err := unmountSoon(func() error { return unix.Unmount(dir, 0) }); err != nil {
			d.t.Errorf("unmount %s: %v", dir, err)
			return
		}
	}
}

// mountAgain mounts, whoever dies on the way.
func (d *drill) mountAgain(dir string, r lazy.Request) (err error) {
	for range 20 {
		ctx, cancel := context.WithTimeout(d.t.Context(), time.Minute)
		_, err = d.client.Mount(ctx, dir, r)
		cancel()
		if err == nil || !strings.Contains(err.Error(), "ended the conversation") && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		d.again.Add(1)
	}
	return err
}

func (d *drill) read(dir, name string) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		d.t.Errorf("read: %v", err)
	} else if sha256.Sum256(b) != d.tree.sums[name] {
		d.t.Errorf("%s%s has wrong bytes", dir, name)
	}
	d.reads.Add(1)
}

// killer kills the daemon, or the holder, never both at once: the one that was killed is there again before the next dies.
func (d *drill) killer(ctx context.Context) {
	for ctx.Err() == nil && !d.t.Failed() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Duration(50+rand.IntN(500)) * time.Millisecond):
		}
		s, err := d.client.Status(ctx, false)
		if err != nil || s.PID <= 1 || s.Holder <= 1 {
			continue
		}
		victim := s.PID
		if rand.IntN(3) == 0 {
			victim = s.Holder
		}
		if err := unix.Kill(victim, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			d.t.Errorf("kill %d: %v", victim, err)
			return
		}
		d.kills.Add(1)
		for gone := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			now, err := d.client.Status(ctx, false)
			if ctx.Err() != nil || errors.Is(err, lazy.ErrNoDaemon) || err == nil && now.PID != victim && now.Holder != victim {
				break
			}
			if time.Now().After(gone) {
				d.t.Errorf("%d was killed, and after a minute there is %+v, %v", victim, now, err)
				return
			}
		}
	}
}

// verifier has everything verified, again and again.
func (d *drill) verifier(ctx context.Context) {
	for ctx.Err() == nil && !d.t.Failed() {
		v, err := d.client.VerifyCache(ctx, nil, nil)
		if len(v.Bad) != 0 || len(v.Removed) != 0 {
			d.t.Errorf("verify: %+v, %v, want nothing wrong", v, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}
