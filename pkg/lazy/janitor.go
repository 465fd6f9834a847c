package lazy

import (
	"context"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

const (
	lookPause = time.Second // between two looks at superblocks: the kernel tells nobody when one ends
	syncPause = 5 * time.Second
	leftPause = 2 * time.Second // between two looks whether somebody has still what was left
)

// look makes the janitor look at once.
func (d *daemon) look() {
	select {
	case d.poke <- struct{}{}:
	default:
	}
}

// janitor ends mounts whose superblocks are gone and gets out of the way of complete ones, until ctx is
// done. It returns true when nothing was mounted and nobody asked for anything for a while.
func (d *daemon) janitor(ctx context.Context) (idle bool) {
	tick := time.NewTicker(lookPause)
	defer tick.Stop()
	swept := time.Now()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		case <-d.poke:
		}
		d.sweep()
		if time.Since(swept) >= leftPause && len(d.store.Unadopted()) > 0 {
			d.dropUnused()
			swept = time.Now()
		}
		fuse.ClosePipes(lookPause)
		d.mu.Lock()
		alone := time.Since(d.last)
		idle = len(d.mounts) == 0 && d.busy == 0 && d.o.Idle >= 0 && alone >= d.o.Idle
		d.mu.Unlock()
		if idle && (d.collected() || alone >= d.o.Idle+gcGrace) && d.nothingMounted() {
			return true
		}
	}
}

// sweep looks at every mount once.
func (d *daemon) sweep() {
	mounts := d.all()
	if len(mounts) == 0 {
		return
	}
	living, err := erofs.Living()
	if err != nil {
		d.log.Error("superblocks", zap.Error(err))
		return
	}
	var ending sync.WaitGroup // together: one whose source does not answer takes a while
	defer ending.Wait()
	for _, m := range mounts {
		if !m.phase.TryLock() {
			continue // it is being made lazy again
		}
		if !lives(&m.rec, m.conn.Load(), living) {
			ending.Go(func() {
				defer m.phase.Unlock()
				if err := d.end(m); err != nil {
					d.log.Warn("end of a mount", zap.String("dir", m.rec.Dir), zap.Error(err))
				}
				d.log.Info("unmounted", zap.String("dir", m.rec.Dir), zap.String("bdi", m.rec.BDI))
			})
			continue
		}
		if d.isComplete(m) {
			d.complete(m)
		}
		m.phase.Unlock()
	}
}

// isComplete reports whether everything of a mount became local. Blobs that did lose their mark.
func (d *daemon) isComplete(m *mount) bool {
	d.mu.Lock()
	known := m.final != nil || m.failed != ""
	d.mu.Unlock()
	if known {
		return false
	}
	complete := true
	for _, b := range d.blobsOf(m) {
		if !b.st.Complete() {
			complete = false
			d.narrow(b)
		} else if err := d.settle(b); err != nil {
			d.log.Error("take a complete blob's mark away", zap.Error(err))
			complete = false
		} else if !b.st.Complete() {
			complete = false // while settle waited, something of it was dropped
		}
	}
	return complete
}

// narrowPause is how long narrow waits after it could not.
const narrowPause = 5 * time.Second

// narrow takes what only images needed that have been unmounted out of b, when all is there that others need, and it is known who they
// are: it would never be complete, and keep its mark. The mounts see so the next time.
func (d *daemon) narrow(b *blob) {
	if time.Since(b.narrowed) < narrowPause || !d.blobMu.TryLock() {
		return
	}
	defer d.blobMu.Unlock()
	var sets [][]rafs.Chunk
	known := 0
	for _, f := range b.fillings {
		if !f.fb.Complete() {
			return
		}
		sets, known = append(sets, f.fb.Chunks()), known+f.refs
	}
	if known == 0 || known < b.refs {
		return
	}
	b.narrowed = time.Now()
	if err := b.st.Narrow(sets...); err != nil {
		d.log.Warn("chunks that no image needs any more stay in a blob, which is not complete without them", zap.Error(err))
	}
}

// settle makes a complete blob durable and takes its mark away, once.
func (d *daemon) settle(b *blob) error {
	b.syncMu.Lock()
	defer b.syncMu.Unlock()
	if b.closed || b.settled || b.making > 0 || d.watch == nil {
		return nil
	}
	done, err := d.watch.Settle(b.st)
	b.settled = done
	return err
}

// blobsOf returns the blobs of m, some of which may be closed at any time.
func (d *daemon) blobsOf(m *mount) (blobs []*blob) {
	d.usedMu.Lock()
	defer d.usedMu.Unlock()
	for _, u := range m.uses {
		blobs = append(blobs, u.b)
	}
	return blobs
}

// complete makes what a mount has durable, says so in its record, and takes everything of ours out of its way.
func (d *daemon) complete(m *mount) {
	if !d.syncMount(m) {
		return // it is not complete any more, or is tried again
	}
	final := d.describe(m, true)
	d.mu.Lock()
	m.rec.Complete, m.rec.Total = true, final.Total
	d.mu.Unlock()
	if err := d.store.PutMount(m.rec.ID, m.rec); err != nil {
		d.log.Error("record of a mount", zap.String("dir", m.rec.Dir), zap.Error(err))
		return
	}
	d.mu.Lock()
	m.final = &final
	m.finish()
	d.mu.Unlock()
	if m.rec.driver() == DriverEROFS { // FUSE goes on asking
		if err := d.release(m); err != nil {
			d.log.Warn("release a complete mount", zap.String("dir", m.rec.Dir), zap.Error(err))
		}
	}
	d.setReadAhead(m, m.rec.completeReadAhead())
	d.log.Info("complete", zap.String("dir", m.rec.Dir), zap.Int64("bytes", final.Total))
}

// setReadAhead sets how many KiB the kernel reads ahead for a mount that is there; it is right without.
func (d *daemon) setReadAhead(m *mount, kib int) {
	if err := erofs.SetReadAhead(m.rec.BDI, kib); err != nil {
		d.log.Info("read-ahead of a mount", zap.String("bdi", m.rec.BDI), zap.Int("KiB", kib), zap.Error(err))
	}
}

// syncMount makes what the blobs of m have durable, and reports whether all of it is.
func (d *daemon) syncMount(m *mount) bool {
	ok := true
	for _, b := range d.blobsOf(m) {
		if err := b.sync(); err != nil {
			d.log.Error("make a blob durable", zap.Error(err))
			ok = false
		}
		ok = ok && b.st.Complete()
	}
	return ok
}

// syncLoop makes what was fetched durable now and then, so that a machine that stops has most of it.
func (d *daemon) syncLoop(ctx context.Context) {
	tick := time.NewTicker(syncPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		mounts := d.all()
		for _, m := range mounts {
			d.syncMount(m)
			d.syncShared(m)
		}
		d.tidyShared()
	}
}
