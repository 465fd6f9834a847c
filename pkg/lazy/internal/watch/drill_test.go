package watch_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/watch"
)

// daemonEnv makes this test binary a daemon that serves what it inherits: the order is in JSON.
const daemonEnv = "HEADSTART_TEST_WATCH"

// order says what a test's daemon does. Its descriptors, from 3 on, are the group, the table, the lock, and
// for every blob its data file and its bits.
type order struct {
	Fixture, State string
	Blobs          []string      // names, in the order of the image's
	Delay          time.Duration // of a fetch, at most
	Chunks         int           // of a synthetic blob, instead of a fixture's
	Read           string        // be a reader of this data file of a synthetic blob
}

// report is what the daemon writes to its standard output, one line each: when it begins to answer, and
// at its end when that is a signal it can handle.
type report struct{ Stats watch.Stats }

func TestMain(m *testing.M) {
	if text := os.Getenv(daemonEnv); text != "" {
		var o order
		err := json.Unmarshal([]byte(text), &o)
		switch {
		case err != nil:
		case o.Read != "":
			err = reader(o)
		default:
			err = daemon(o)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testenv.Main(m)
}

func daemon(o order) error {
	table, err := watch.OpenTable(os.NewFile(4, "table"))
	if err != nil {
		return err
	}
	group, err := fanotify.Adopt(os.NewFile(3, "group"))
	if err != nil {
		return err
	}
	m := &image{index: map[*store.Blob]int{}}
	w, err := watch.New(watch.Config{Group: group, Table: table, Ensure: func(ctx context.Context, b *store.Blob, offset, length int64) error {
		select {
		case <-time.After(rand.N(o.Delay + 1)):
		case <-ctx.Done():
			return ctx.Err()
		}
		if o.Chunks > 0 {
			return synthesize(b, offset, length)
		}
		return m.ensure(ctx, b, offset, length)
	}})
	if err != nil {
		return err
	}
	kept := map[string]store.Kept{}
	for n, name := range o.Blobs {
		kept[name] = store.Kept{Data: os.NewFile(uintptr(6+2*n), "data"), Bits: os.NewFile(uintptr(7+2*n), "bits")}
	}
	s, err := store.Open(o.State, store.Options{Lock: os.NewFile(5, "lock"), Kept: kept})
	if err != nil {
		return err
	}
	if o.Chunks == 0 {
		m.img, err = nydusimage.OpenFiles(filepath.Join(o.Fixture, "image.boot"), filepath.Join(o.Fixture, "blobs"))
		if err != nil {
			return err
		}
		m.chunks = m.img.Chunks()
	}
	for n, name := range o.Blobs {
		blob, chunks := synthetic(o.Chunks)
		if o.Chunks == 0 {
			blob, chunks = m.img.RAFS.Blobs[n], m.img.RAFS.BlobChunks(n)
		}
		b, err := s.Adopt(name, blob, chunks)
		if err != nil {
			return err
		}
		m.index[b] = n
		if err := w.Add(b); err != nil {
			return err
		}
	}
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(report{w.Stats()}); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	err = w.Run(ctx)
	return errors.Join(err, out.Encode(report{w.Stats()}))
}

// holder keeps what daemons share, as package hold does, and starts them.
type holder struct {
	order
	group *fanotify.Group
	table *watch.Table
	m     *image
}

func newHolder(t *testing.T, fixture string, delay time.Duration) *holder {
	t.Helper()
	state := t.TempDir()
	needKernel(t, state)
	h := &holder{group: newGroup(t), table: newTable(t, 0)}
	h.m = openImage(t, fixture, state, store.Options{})
	h.order = order{Fixture: h.m.dir, State: state, Delay: delay}
	for _, b := range h.m.blobs {
		h.Blobs = append(h.Blobs, b.Name())
		must(t, h.group.Mark(fanotify.Mark{Kind: fanotify.Inode, Mask: fanotify.PreAccess, Dir: int(b.File().Fd())}))
	}
	h.denyAtEnd(t)
	return h
}

// denyAtEnd makes everybody get an answer also when the test fails.
func (h *holder) denyAtEnd(t *testing.T) {
	t.Cleanup(func() {
		w, err := watch.New(watch.Config{Group: h.group, Table: h.table})
		must(t, err)
		denied, err := w.DenyAll()
		must(t, errors.Join(err, w.Close()))
		if denied > 0 {
			t.Errorf("%d events were left", denied)
		}
	})
}

// run starts a daemon.
func (h *holder) run(t *testing.T) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	text, err := json.Marshal(h.order)
	must(t, err)
	self, err := os.Executable()
	must(t, err)
	c := exec.Command(self)
	c.Env = append(os.Environ(), daemonEnv+"="+string(text))
	c.Stderr = os.Stderr
	group, err := unix.FcntlInt(uintptr(h.group.FD()), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	groupFile := os.NewFile(uintptr(group), "group")
	defer groupFile.Close()
	c.ExtraFiles = []*os.File{groupFile, h.table.File(), h.m.store.LockFile()}
	for _, b := range h.m.blobs {
		d := b.Descriptors()
		c.ExtraFiles = append(c.ExtraFiles, d.Data, d.Bits)
	}
	pipe, err := c.StdoutPipe()
	must(t, err)
	must(t, c.Start())
	return c, bufio.NewReader(pipe)
}

func readReport(t *testing.T, c *exec.Cmd, out *bufio.Reader) watch.Stats {
	t.Helper()
	line, err := out.ReadBytes('\n')
	var r report
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err != nil {
		_ = c.Process.Kill()
		t.Fatalf("daemon said nothing: %v, %v", err, c.Wait())
	}
	return r.Stats
}

// TestKilledDaemons kills one daemon after the other while processes read: they wait, and read right bytes.
func TestKilledDaemons(t *testing.T) {
	kills := 30
	if testing.Short() {
		kills = 4
	}
	total, takenOver, images := 0, int64(0), 0
	for total < kills {
		n, taken := drill(t, kills-total)
		if t.Failed() {
			return
		}
		total, takenOver, images = total+n, takenOver+taken, images+1
	}
	t.Logf("%d daemons killed over %d images, %d pending events taken over", total, images, takenOver)
	if takenOver == 0 {
		t.Error("no event was pending when a daemon was killed")
	}
}

// drill reads one image while its daemons are killed, and returns how many were, and how many events
// the next ones took over.
func drill(t *testing.T, limit int) (kills int, takenOver int64) {
	t.Helper()
	h := newHolder(t, "v6-zstd", 40*time.Millisecond)
	dir := h.m.mount(t)
	readers := 6
	if testing.Short() {
		readers = 3
	}
	results := make(chan error, readers)
	for range readers {
		go func() {
			out, err := compareCommand(t, dir).CombinedOutput()
			if err != nil {
				err = fmt.Errorf("cmp_tree.py: %w\n%s", err, out)
			}
			results <- err
		}()
	}
	left := readers
	for left > 0 && kills < limit {
		c, out := h.run(t)
		pause := rand.N(40 * time.Millisecond)
		if kills%4 != 3 { // else it may be killed before it is ready
			takenOver += readReport(t, c, out).TakenOver
			for wait := 0; h.table.Pending() == 0 && wait < 200; wait++ {
				time.Sleep(5 * time.Millisecond) // the readers are slow to start
			}
		}
		select {
		case err := <-results:
			if left--; err != nil {
				t.Error(err)
			}
		case <-time.After(pause):
		}
		must(t, c.Process.Kill())
		_ = c.Wait() // killed
		kills++
	}
	c, out := h.run(t)
	takenOver += readReport(t, c, out).TakenOver
	for ; left > 0; left-- {
		select {
		case err := <-results:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(5 * time.Minute):
			t.Error("readers hang")
		}
	}
	compare(t, dir)
	must(t, c.Process.Signal(unix.SIGTERM))
	stats := readReport(t, c, out)
	must(t, c.Wait())
	if stats.Denied != 0 || stats.Lost != 0 || stats.Pending != 0 {
		t.Errorf("last daemon: %+v, want nothing denied, lost or pending", stats)
	}
	return kills, takenOver
}
