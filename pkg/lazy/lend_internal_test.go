package lazy

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/watch"
)

// newest returns the inode that was marked last: the kernel lists it first.
func newest(t *testing.T, g *fanotify.Group) (ino uint64) {
	t.Helper()
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", g.FD()))
	must(t, err)
	_, mark, _ := strings.Cut(string(info), "fanotify ino:")
	if _, err := fmt.Sscanf(mark, "%x", &ino); err != nil {
		t.Fatalf("no mark: %v\n%s", err, info)
	}
	return ino
}

// watched is a daemon that fills blobs and marks them, in a group that nobody reads.
func watched(t *testing.T) (*daemon, *fanotify.Group) {
	t.Helper()
	testenv.Root(t)
	testenv.Kernel(t, "pre-content events", store.Probe(t.TempDir()))
	d := served(t)
	group, err := fanotify.New(fanotify.Options{PreContent: true})
	must(t, err)
	t.Cleanup(func() { must(t, group.Close()) })
	table, err := watch.NewTable(16)
	must(t, err)
	t.Cleanup(func() { must(t, table.Close()) })
	d.watch, err = watch.New(watch.Config{Group: group, Table: table, Ensure: d.ensure})
	must(t, err)
	t.Cleanup(func() { must(t, d.watch.Close()) })
	return d, group
}

// One of two failed mounts ends just when both are to keep a blob. The other one's holes have a mark all the time.
func TestLendWhileOneEnds(t *testing.T) {
	t.Parallel()
	d, group := watched(t)
	info, chunks, data := plain(4)
	b := d.use(t, info, chunks, &place{data: data})
	b.refs = 1
	info.ID = "another"
	other := d.use(t, info, chunks, &place{data: data})
	_, ino := b.st.Inode()
	_, otherIno := other.st.Inode()
	b.st.FirstUse() // as one that an earlier daemon kept, with its mark
	other.st.FirstUse()
	must(t, d.watch.Add(other.st))
	must(t, errors.Join(d.watch.Add(b.st), d.watch.Remove(b.st), d.watch.Add(b.st)))
	if got := newest(t, group); got != ino {
		t.Fatalf("inode %d is listed first, want %d, which was marked last", got, ino)
	}
	must(t, errors.Join(d.watch.Remove(b.st), d.watch.Remove(other.st)))

	pre := func(st *store.Blob) fanotify.Mark {
		return fanotify.Mark{Kind: fanotify.Inode, Mask: fanotify.PreAccess, Dir: int(st.File().Fd())}
	}
	must(t, errors.Join(group.Mark(pre(b.st)), group.Mark(pre(other.st))))
	ended, stays := &mount{failed: "it is", gone: true}, &mount{failed: "it is"}
	d.blobMu.Lock()
	err := d.lend(b, []*mount{ended, stays})
	d.blobMu.Unlock()
	must(t, err)
	if got := newest(t, group); got != otherIno {
		t.Errorf("inode %d was marked last, want %d: the blob had no mark for a moment", got, otherIno)
	}
	if len(ended.uses) != 0 || len(stays.uses) != 1 || b.refs != 2 {
		t.Errorf("the mount that ended has %d blobs, the other one %d, %d users in all; want 0, 1, 2", len(ended.uses), len(stays.uses), b.refs)
	}
	must(t, d.watch.Remove(b.st))
	if got := newest(t, group); got != otherIno {
		t.Errorf("inode %d is marked after the last mount", got)
	}
}

// A complete blob keeps its mark while a mount is being made of it: what EROFS opens without one never raises events.
func TestSettleWhileMounted(t *testing.T) {
	t.Parallel()
	d, group := watched(t)
	info, chunks, data := plain(4)
	b := d.use(t, info, chunks, &place{data: data})
	begin := func() *use {
		u := &use{b: b}
		u.begin(true)
		must(t, d.watch.Add(b.st))
		return u
	}
	marked := func() bool {
		must(t, d.settle(b))
		fdinfo, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", group.FD()))
		must(t, err)
		return strings.Contains(string(fdinfo), "fanotify ino:")
	}
	first := begin()
	must(t, d.ensure(t.Context(), b.st, 0, int64(len(data))))
	if !b.st.Complete() || !marked() {
		t.Error("a blob has no mark while the first mount is made of it")
	}
	if first.made(); marked() {
		t.Error("a complete blob has a mark after the first mount")
	}
	second, third := begin(), begin()
	if second.made(); !marked() {
		t.Error("a blob has no mark while a mount is made of it, beside others")
	}
	third.made()
	third.made() // and ended
	if marked() {
		t.Error("a complete blob has a mark after the last mount")
	}
	for range 3 {
		must(t, d.watch.Remove(b.st))
	}
}
