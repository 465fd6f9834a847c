package lazy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

func (b *box) cache() lazy.Cache {
	b.t.Helper()
	c, err := b.client.Cache(b.t.Context(), true)
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

func (b *box) verify(names ...string) lazy.Verified {
	b.t.Helper()
	v, err := b.client.VerifyCache(b.t.Context(), names, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	return v
}

// all is the policy that lets nothing stay that may go.
var all = &lazy.CachePolicy{Age: time.Nanosecond}

func (b *box) collect(p *lazy.CachePolicy) lazy.Collected {
	b.t.Helper()
	c, err := b.client.CollectCache(b.t.Context(), p)
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

// whole mounts r and has all of it fetched.
func (b *box) whole(name string, r lazy.Request) lazy.Mount {
	b.t.Helper()
	r.Background = "full"
	m := b.mount(b.mountpoint(name), r)
	m, err := b.client.Wait(b.t.Context(), m.Device)
	if err != nil {
		b.t.Fatal(err)
	}
	return m
}

// alone waits until no daemon runs.
func (b *box) alone() {
	b.t.Helper()
	eventually(b.t, func() string {
		if s, err := b.client.Status(b.t.Context(), false); !errors.Is(err, lazy.ErrNoDaemon) {
			return fmt.Sprintf("%+v, %v, want no daemon", s, err)
		}
		return ""
	})
}

// What mounts have stays, complete or not, and goes when they are gone; with a daemon and without.
func TestCollect(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	done, begun := b.whole("done", loose(t, "v6-zstd")), b.mount(b.mountpoint("begun"), loose(t, "v6-lz4_block"))
	c := b.cache()
	if c.Policy == nil || c.StateDir != b.state || len(c.Entries) < 2 || c.Usage.InUse != c.Usage.Blobs || c.Usage.Blobs == 0 {
		t.Errorf("%+v, want blobs of two mounts, all in use", c)
	}
	for _, e := range c.Entries {
		if !e.InUse || len(e.Mounts) != 1 || e.Aside || e.Damaged != "" || time.Since(e.Used) > time.Minute || (e.Local == e.Total) != (e.Mounts[0] == done.Dir) {
			t.Errorf("entry %+v, want it in use by a mount, complete if that is", e)
		}
	}
	if got := b.collect(all); len(got.Removed) != 0 {
		t.Errorf("removed %v under two mounts", got.Removed)
	}
	if got := b.collect(&lazy.CachePolicy{Limit: 1}); len(got.Removed) != 0 || got.Wanted == 0 {
		t.Errorf("%+v, want nothing removed, and to be told so", got)
	}
	compare(t, done.Dir)
	compare(t, begun.Dir)
	b.unmount(begun.Dir)
	pin := ""
	for _, e := range c.Entries {
		if e.Mounts[0] == done.Dir {
			pin = e.Name
		}
	}
	if err := b.client.PinCache(t.Context(), pin); err != nil {
		t.Error(err)
	}
	if got := b.collect(all); len(got.Removed) == 0 || got.Freed <= 0 || got.After >= got.Before {
		t.Errorf("%+v, want the blobs of the mount that is gone removed", got)
	}
	compare(t, done.Dir)
	b.unmount(done.Dir)
	b.alone()
	b.collect(all)
	left := b.cache()
	if len(left.Entries) != 1 || left.Entries[0].Name != pin || !left.Entries[0].Pinned || left.Policy != nil {
		t.Errorf("%+v, want the pinned one alone", left)
	}
	if err := b.client.UnpinCache(t.Context(), pin); err != nil {
		t.Error(err)
	}
	b.collect(all)
	if left := b.cache(); len(left.Entries) != 0 || left.Usage.Blobs != 0 {
		t.Errorf("%+v, want nothing", left)
	}
	if err := b.client.PinCache(t.Context(), pin); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("PinCache(removed) = %v, want os.ErrNotExist", err)
	}
	again := b.whole("done", loose(t, "v6-zstd"))
	compare(t, again.Dir)
}

// The daemon comes back under its limit by itself when a mount ends.
func TestCollectByItself(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	const limit = 1 << 20 // more than the index of chunks
	c, err := lazy.NewClient(lazy.ClientOptions{
		StateDir: b.state, RunDir: b.run,
		Command: []string{b.binary, "lazyd", "--state-dir", b.state, "--run-dir", b.run, "--idle", "10s", "--cache-limit", fmt.Sprint(limit), "--cache-low", "1k"},
	})
	if err != nil {
		t.Fatal(err)
	}
	b.client = c
	t.Cleanup(func() { // it would stay for its idle time
		if s, err := c.Status(context.Background(), false); err == nil {
			_ = unix.Kill(s.PID, unix.SIGTERM)
		}
	})
	m := b.whole("mnt", loose(t, "v6-zstd"))
	if c := b.cache(); c.Policy == nil || c.Policy.Limit != limit || c.Usage.Blobs <= limit {
		t.Errorf("%+v, want the limit of %d, and more than that", c, limit)
	}
	compare(t, m.Dir)
	b.unmount(m.Dir)
	eventually(t, func() string {
		if c := b.cache(); c.Usage.Total() > limit {
			return fmt.Sprintf("%+v, want at most %d bytes", c.Usage, limit)
		}
		return ""
	})
}

// spoil changes a byte in every tenth chunk's worth of each cache file, and returns how many.
func (b *box) spoil() (n int) {
	b.t.Helper()
	files, err := filepath.Glob(filepath.Join(b.state, "blobs", "*", "data"))
	if err != nil || len(files) == 0 {
		b.t.Fatalf("%v, %v", files, err)
	}
	for _, name := range files {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			b.t.Fatal(err)
		}
		info, err := f.Stat()
		if err != nil {
			b.t.Fatal(err)
		}
		p := make([]byte, 1)
		for at := int64(7); at < info.Size(); at += 256 << 10 {
			if _, err := f.ReadAt(p, at); err != nil {
				b.t.Fatal(err)
			}
			p[0] ^= 0x40
			if _, err := f.WriteAt(p, at); err != nil {
				b.t.Fatal(err)
			}
			n++
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			b.t.Fatal(err)
		}
	}
	return n
}

// What is wrong on disk is found and dropped. Where a complete mount has it, it is there again when VerifyCache returns, and
// the mount, which was lazy meanwhile, is complete.
func TestVerifyMounted(t *testing.T) { mostlyEROFS(t, testVerifyMounted) }

func testVerifyMounted(t *testing.T, b *box) {
	m := b.whole("mnt", loose(t, "v6-zstd"))
	whole := b.verify()
	if whole.Chunks == 0 || whole.Blobs == 0 || whole.Bytes == 0 || len(whole.Bad) != 0 || len(whole.Failed) != 0 {
		t.Errorf("%+v, want good chunks alone", whole)
	}
	spoiled := b.spoil()
	v := b.verify()
	if len(v.Bad) == 0 || len(v.Bad) > spoiled || v.Refetched != len(v.Bad) || len(v.Failed) != 0 || len(v.Removed) != 0 {
		t.Errorf("%d places spoiled: %+v, want as many chunks, all fetched again", spoiled, v)
	}
	// Some may have been dropped before they were looked at, by who was to borrow them for the others.
	if again := b.verify(); len(again.Bad) != 0 || again.Chunks < v.Chunks {
		t.Errorf("verified again: %+v, want %d good chunks or more", again, v.Chunks)
	}
	// Nothing of it was read before, so nothing wrong is in the page cache.
	compare(t, m.Dir)
	eventually(t, func() string {
		if s := b.status(); len(s.Mounts) != 1 || s.Mounts[0].State != lazy.StateComplete || s.Mounts[0].Local != m.Local {
			return fmt.Sprintf("%+v, want one complete mount", s.Mounts)
		}
		return ""
	})
	if _, err := b.client.Wait(t.Context(), m.Device); err != nil {
		t.Error(err)
	}
	if again := b.verify(); len(again.Bad) != 0 || again.Chunks != whole.Chunks {
		t.Errorf("complete again: %+v, want %d good chunks", again, whole.Chunks)
	}
	if b.driver == lazy.DriverEROFS {
		if marks := marksOf(t, b.status().PID); marks != 0 {
			t.Errorf("%d marks are left", marks)
		}
	}
	b.unmount(m.Dir)
}

// What cannot be fetched again is an error for who reads it, and right when the source is back.
func TestVerifyWithoutSource(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c, err := lazy.NewClient(lazy.ClientOptions{
		StateDir: b.state, RunDir: b.run,
		Command: []string{b.binary, "lazyd", "--state-dir", b.state, "--run-dir", b.run, "--idle", "100ms", "--limit", "300ms"},
	})
	if err != nil {
		t.Fatal(err)
	}
	b.client = c
	r := loose(t, "v6-zstd")
	blobs := filepath.Join(b.dir, "blobs")
	if err := os.CopyFS(blobs, os.DirFS(r.BlobDir)); err != nil {
		t.Fatal(err)
	}
	r.BlobDir = blobs
	m := b.whole("mnt", r)
	b.spoil()
	away := blobs + "-away"
	if err := os.Rename(blobs, away); err != nil {
		t.Fatal(err)
	}
	v := b.verify()
	if len(v.Bad) == 0 || v.Refetched != 0 {
		t.Errorf("%+v, want bad chunks, and none fetched", v)
	}
	// Every file is right or an error: the expected tree's program says which are not right.
	if err := compareErr(t, m.Dir); err == nil {
		t.Error("a tree with chunks missing compares")
	} else if text := err.Error(); !strings.Contains(text, "Input/output error") && !strings.Contains(text, "Errno 5") {
		t.Errorf("%v, want EIO", err)
	}
	if err := os.Rename(away, blobs); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string {
		if err := compareErr(t, m.Dir); err != nil {
			return err.Error()
		}
		return ""
	})
	if v := b.verify(); len(v.Bad) != 0 || len(v.Failed) != 0 {
		t.Errorf("at the end: %+v, want good chunks alone", v)
	}
}

// Nobody asks for anything to be verified: a cache file that somebody has changed while no mount had it is compared with
// its digests before a byte of it is read, and a mount of it fetches what is wrong, even with nothing fetched in the background.
func TestSpoiledBetweenMounts(t *testing.T) { mostlyEROFS(t, testSpoiledBetweenMounts) }

func testSpoiledBetweenMounts(t *testing.T, b *box) {
	m := b.whole("mnt", loose(t, "v6-zstd"))
	compare(t, m.Dir)
	pid := b.status().PID
	b.unmount(m.Dir)
	eventually(t, func() string { // what is open for the index to be fed is not looked at anew
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // the pattern is right
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, filepath.Join(b.state, "blobs")+"/") {
				return "the daemon has " + to + " open"
			}
		}
		return ""
	})
	if spoiled := b.spoil(); spoiled == 0 {
		t.Fatal("nothing is spoiled")
	}
	again := b.mount(m.Dir, loose(t, "v6-zstd"))
	if again.State != lazy.StateLazy {
		t.Errorf("%+v, want it lazy: nobody has looked at it", again)
	}
	compare(t, m.Dir)
	if _, err := b.client.Wait(t.Context(), again.Device); err != nil {
		t.Error(err)
	}
	if v := b.verify(); len(v.Bad) != 0 || len(v.Failed) != 0 {
		t.Errorf("%+v, want nothing wrong", v)
	}
	s := b.status()
	if len(s.Mounts) != 1 || s.Mounts[0].State != lazy.StateComplete || s.Mounts[0].Stats.Demand.Bytes == 0 {
		t.Errorf("%+v, want one complete mount, and something fetched", s.Mounts)
	}
	b.unmount(m.Dir)
	// Nothing has changed since: it is whole at once, and nothing is fetched.
	whole := b.mount(m.Dir, loose(t, "v6-zstd"))
	if done, err := b.client.Wait(t.Context(), whole.Device); err != nil || done.Stats.Demand.Bytes != 0 || done.Local != done.Total {
		t.Errorf("Wait() = %+v, %v, want it complete with nothing fetched", done, err)
	}
}

// Without a daemon, what is wrong is dropped too, and fetched by the next mount; a cache file of which nothing can be used goes.
func TestVerifyAlone(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.whole("mnt", loose(t, "v6-zstd"))
	b.unmount(m.Dir)
	b.alone()
	b.spoil()
	v := b.verify()
	if len(v.Bad) == 0 || v.Refetched != 0 || len(v.Failed) != 0 {
		t.Errorf("%+v, want bad chunks", v)
	}
	again := b.mount(m.Dir, loose(t, "v6-zstd"))
	if again.Local == 0 || again.Local >= again.Total {
		t.Errorf("mounted again with %d of %d bytes, want what was good", again.Local, again.Total)
	}
	compare(t, m.Dir)
	b.unmount(m.Dir)
	b.alone()
	name := b.cache().Entries[0].Name
	table := filepath.Join(b.state, "blobs", name, "chunks")
	old, err := os.ReadFile(table)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(table, bytes.Repeat([]byte{0xff}, len(old)), 0o600); err != nil {
		t.Fatal(err)
	}
	v = b.verify(name) // who opens the directory first removes it
	for _, e := range b.cache().Entries {
		if e.Name == name {
			t.Errorf("%+v, want it removed: %+v", e, v)
		}
	}
	compare(t, b.whole("mnt", loose(t, "v6-zstd")).Dir)
}
