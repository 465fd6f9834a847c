package watch_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// syntheticChunk is the size of the chunks of a synthetic blob in bytes.
const syntheticChunk = 16384

// synthetic returns a blob whose content is a function of the place.
func synthetic(chunks int) (rafs.Blob, []rafs.Chunk) {
	b := rafs.Blob{ID: "synthetic", UncompressedSize: uint64(chunks) * syntheticChunk}
	out := make([]rafs.Chunk, chunks)
	for i := range out {
		out[i] = rafs.Chunk{Index: uint32(i), UncompressedOffset: uint64(i) * syntheticChunk, UncompressedSize: syntheticChunk}
	}
	return b, out
}

// content fills p with the bytes of chunk n.
func content(n uint64, p []byte) {
	r := rand.NewPCG(n, 1)
	for i := 0; i < syntheticChunk; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64()|1) // never zero
	}
}

// synthesize is a fetch of a synthetic blob.
func synthesize(b *store.Blob, offset, length int64) error {
	missing, err := b.Missing(offset, length)
	if err != nil {
		return err
	}
	p := make([]byte, syntheticChunk)
	for _, c := range missing {
		content(c.UncompressedOffset/syntheticChunk, p)
		if err := b.Put(c, p); err != nil {
			return err
		}
	}
	return nil
}

// reader reads at random from a data file until its standard input ends, and says how often. Every read
// of it raises an event. It has a time limit, so that the test ends when reads hang.
func reader(o order) error {
	f, err := os.Open(o.Read)
	if err != nil {
		return err
	}
	var reads, end atomic.Int64
	errs := make(chan error, 16)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			p, want := make([]byte, 65536), make([]byte, syntheticChunk)
			for end.Load() == 0 {
				if err := readOnce(f, o.Chunks, p, want); err != nil {
					errs <- err
					return
				}
				reads.Add(1)
			}
		})
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	end.Store(1)
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
	}
	_, err = fmt.Println(reads.Load())
	return err
}

func readOnce(f *os.File, chunks int, p, want []byte) error {
	size := int64(chunks) * syntheticChunk
	offset := rand.Int64N(size)
	p = p[:1+rand.Int64N(min(int64(len(p)), size-offset))]
	if n, err := f.ReadAt(p, offset); err != nil {
		return fmt.Errorf("read %d bytes at %d: %d, %w", len(p), offset, n, err)
	}
	for len(p) > 0 {
		content(uint64(offset/syntheticChunk), want)
		from := offset % syntheticChunk
		n := min(int64(len(p)), syntheticChunk-from)
		if !bytes.Equal(p[:n], want[from:from+n]) {
			return fmt.Errorf("%d wrong bytes at %d, zeros: %t", n, offset, len(bytes.Trim(p[:n], "\x00")) == 0)
		}
		p, offset = p[n:], offset+n
	}
	return nil
}

func startReader(t *testing.T, o order) (stop func() int) {
	t.Helper()
	text, err := json.Marshal(o)
	must(t, err)
	self, err := os.Executable()
	must(t, err)
	c := exec.Command(self)
	c.Env = append(os.Environ(), daemonEnv+"="+string(text))
	in, err := c.StdinPipe()
	must(t, err)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	must(t, c.Start())
	return func() int {
		_ = in.Close()
		watchdog := time.AfterFunc(2*time.Minute, func() { _ = c.Process.Kill() })
		defer watchdog.Stop()
		reads := 0
		err := c.Wait()
		if err == nil {
			_, err = fmt.Sscan(out.String(), &reads)
		}
		if err != nil {
			t.Errorf("reader: %v\n%s", err, errs.String())
		}
		return reads
	}
}

// TestKilledUnderLoad kills daemons while 32 threads read a data file, each read an event. Every read gives the
// right bytes, and none hangs.
func TestKilledUnderLoad(t *testing.T) {
	kills := 100
	if testing.Short() {
		kills = 15
	}
	state := t.TempDir()
	needKernel(t, state)
	h := &holder{group: newGroup(t), table: newTable(t, 0)}
	h.order = order{State: state, Delay: 20 * time.Millisecond, Chunks: 4000, Blobs: []string{"synthetic"}}
	s, err := store.Open(state, store.Options{})
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	blob, err := s.OpenBlob(synthetic(h.Chunks))
	must(t, err)
	h.m = &image{store: s, blobs: []*store.Blob{blob}}
	must(t, h.group.Mark(fanotify.Mark{Kind: fanotify.Inode, Mask: fanotify.PreAccess, Dir: int(blob.File().Fd())}))
	h.denyAtEnd(t)
	var readers []func() int
	for range 2 {
		readers = append(readers, startReader(t, order{Read: blob.Path(), Chunks: h.Chunks}))
	}
	takenOver, events := int64(0), 0
	for range kills {
		c, out := h.run(t)
		takenOver += readReport(t, c, out).TakenOver
		time.Sleep(rand.N(60 * time.Millisecond))
		must(t, c.Process.Kill())
		_ = c.Wait() // killed
	}
	c, out := h.run(t)
	takenOver += readReport(t, c, out).TakenOver
	for _, stop := range readers {
		events += stop()
	}
	must(t, c.Process.Signal(unix.SIGTERM))
	stats := readReport(t, c, out)
	must(t, c.Wait())
	t.Logf("%d daemons killed, %d reads, %d pending events taken over; last daemon: %+v", kills, events, takenOver, stats)
	if stats.Denied != 0 || stats.Lost != 0 || stats.Pending != 0 {
		t.Errorf("last daemon: %+v, want nothing denied, lost or pending", stats)
	}
	if takenOver == 0 || events == 0 {
		t.Errorf("%d reads, %d events taken over, want some", events, takenOver)
	}
}
