package lazy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// unmarkOld takes a mark of an earlier daemon off a data file that nobody of this one has, and reports whether there was one.
func (d *daemon) unmarkOld(data *os.File) (bool, error) {
	if d.watch == nil {
		return false, nil
	}
	return d.watch.UnmarkOld(data)
}

// dropBad makes bad chunks of b not ready. Of mounts that have it, complete ones become lazy again, so that their readers
// wait for what is fetched anew; what cannot be fetched is an error for them. It returns how many are there again.
//
// What a mount has read before is in the kernel's page cache and cannot be taken back.
func (d *daemon) dropBad(ctx context.Context, b *store.Blob, bad []rafs.Chunk) (refetched int, err error) {
	mounted, err := d.forgetBad(ctx, b, bad)
	d.log.Error("chunks were wrong on disk", zap.String("blob", b.Name()), zap.Int("chunks", len(bad)), zap.Error(err))
	if !mounted || err != nil {
		return 0, err
	}
	refetched = d.refetch(ctx, b, bad)
	if refetched < len(bad) {
		d.fetchLater(b.Name())
	}
	return refetched, nil
}

// fetchLater has the mounts with the blob called name fetch what is missing of it by their policies. What they began with may be over: it
// was all there.
func (d *daemon) fetchLater(name string) {
	for _, m := range d.having(name, nil) {
		m.phase.Lock()
		d.background(m)
		m.phase.Unlock()
	}
}

// forgetBad is dropBad without fetching anything. mounted: somebody fills the blob.
//
// Until the chunks are not ready, nobody may take a mount or the blob for complete: it would lose its mark, and readers of what is
// dropped then would get what is on the disk.
func (d *daemon) forgetBad(ctx context.Context, b *store.Blob, bad []rafs.Chunk) (mounted bool, err error) {
	d.dropMu.Lock()
	defer d.dropMu.Unlock()
	r := revived{}
	defer r.unlock()
	for {
		if err := d.reviveAll(ctx, b.Name(), r); err != nil {
			return false, fmt.Errorf("they stay, for the sake of a mount: %w", err)
		}
		again, mounted, err := d.forgetLocked(b, bad, r)
		if !again {
			return mounted, err
		}
	}
}

// forgetLocked makes chunks not ready that are wrong still, unless there are mounts with the blob that are not in r: again. mounted: somebody fills
// the blob.
func (d *daemon) forgetLocked(b *store.Blob, bad []rafs.Chunk, r revived) (again, mounted bool, err error) {
	d.blobMu.Lock()
	defer d.blobMu.Unlock()
	if len(d.having(b.Name(), r)) > 0 {
		return true, false, nil
	}
	filled, err := d.blobForFailed(b)
	if err != nil {
		return false, false, fmt.Errorf("they stay, for the sake of a mount that cannot be filled any more: %w", err)
	}
	if filled != nil {
		filled.syncMu.Lock() // as settle does
		defer filled.syncMu.Unlock()
		mounted = len(filled.fillings) > 0
		filled.settled = false
	}
	if d.watch != nil { // also of one that was left
		if err := d.watch.Again(b); err != nil {
			return false, mounted, err
		}
	}
	// Not what somebody else has dropped and fetched again meanwhile.
	if bad, err = b.Wrong(bad); err != nil {
		return false, mounted, err
	}
	return false, mounted, b.Drop(bad)
}

// blobForFailed returns what mounts have of the blob b, nil when none has it open. Mounts that failed have let go of a blob that was complete and lost its
// mark: they have it from now on, with a mark, so that they get errors for what is dropped of it. The caller holds blobMu.
func (d *daemon) blobForFailed(st *store.Blob) (*blob, error) {
	name := st.Name()
	if b := d.blobs[name]; b != nil {
		return b, d.lendToFailed(b)
	}
	failed := d.failedWith(name)
	if len(failed) == 0 {
		return nil, nil
	}
	if d.watch == nil {
		return nil, errors.New("there are no marks")
	}
	b := &blob{st: st}
	d.usedMu.Lock()
	d.blobs[name] = b
	d.usedMu.Unlock()
	err := d.guard(b)
	if err == nil {
		err = d.lend(b, failed)
	}
	if b.refs > 0 {
		return b, err
	}
	d.usedMu.Lock()
	delete(d.blobs, name)
	d.usedMu.Unlock()
	return nil, errors.Join(err, d.link.Drop(keptData+name, keptBits+name))
}

// refetchLimit is how long one dropped chunk is waited for: readers that want it do it again.
const refetchLimit = 10 * time.Second

// refetch fetches dropped chunks of b, and returns how many. A source that is dead or away may cost a second in all, beside what
// the last chunk takes.
func (d *daemon) refetch(ctx context.Context, b *store.Blob, chunks []rafs.Chunk) (fetched int) {
	lost := time.Duration(0)
	for i, c := range chunks {
		began := time.Now()
		one, cancel := context.WithTimeout(ctx, refetchLimit)
		err := d.ensure(one, b, int64(c.UncompressedOffset), int64(c.UncompressedSize)) //nolint:gosec // below the blob's size
		cancel()
		if err == nil {
			fetched++
			continue
		}
		d.log.Warn("fetch a dropped chunk", zap.String("blob", b.Name()), zap.Error(err))
		if lost += time.Since(began); lost > cacheStep || ctx.Err() != nil {
			d.log.Warn("the rest is fetched when somebody reads it", zap.String("blob", b.Name()), zap.Int("chunks", len(chunks)-i-1))
			break
		}
	}
	return fetched
}

// revived are mounts whose phase is held, so that they stay lazy.
type revived map[*mount]bool

// unlock lets them go on.
func (r revived) unlock() {
	for m := range r {
		m.phase.Unlock()
	}
}

// having returns the mounts with the blob called name that can be filled and are not in r.
func (d *daemon) having(name string, r revived) (mounts []*mount) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if !r[m] && m.failed == "" && slices.Contains(m.rec.Blobs, name) {
			mounts = append(mounts, m)
		}
	}
	return mounts
}

// reviveAll makes complete mounts that have the blob called name lazy again, and puts all that have it into r. The caller
// holds dropMu: nobody else holds the phases of two mounts.
func (d *daemon) reviveAll(ctx context.Context, name string, r revived) error {
	var errs []error
	for _, m := range d.having(name, r) {
		m.phase.Lock()
		r[m] = true
		if err := d.revive(ctx, m); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.rec.Dir, err))
		}
	}
	return errors.Join(errs...)
}

// revive makes a complete mount lazy again, with everything that it had. Nothing happens to one that is lazy, or gone. The caller
// holds its phase.
func (d *daemon) revive(ctx context.Context, m *mount) (err error) {
	d.mu.Lock()
	complete := m.final != nil && !m.gone
	d.mu.Unlock()
	if !complete {
		return nil
	}
	if m.rec.driver() == DriverEROFS { // with FUSE it never let go of anything
		if err := d.reopen(ctx, m); err != nil {
			return err
		}
	} else {
		if err := d.setComplete(m, false); err != nil {
			return err
		}
		d.setReadAhead(m, m.rec.readAhead())
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m.final, m.over, m.overDone = nil, make(chan struct{}), false
	d.log.Warn("a complete mount is lazy again", zap.String("dir", m.rec.Dir))
	return nil
}

// reopen takes back what a complete EROFS mount let go.
func (d *daemon) reopen(ctx context.Context, m *mount) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, d.release(m), d.setComplete(m, true))
		}
	}()
	// As long as they are open here, the mount finds them by name.
	kept := d.store.Unadopted()
	for _, name := range m.rec.Blobs {
		if _, ok := kept[name]; ok {
			continue // it was left, and is found as it is
		}
		b, err := d.store.Reopen(name)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, b.Close()) }()
	}
	// A daemon that takes over from here on adopts it.
	if err := d.setComplete(m, false); err != nil {
		return err
	}
	_, err = d.adopt(ctx, m)
	return err
}

// setComplete notes durably whether a mount needs nobody.
func (d *daemon) setComplete(m *mount, complete bool) error {
	d.mu.Lock()
	m.rec.Complete = complete
	rec := m.rec
	d.mu.Unlock()
	return d.store.PutMount(rec.ID, rec)
}
