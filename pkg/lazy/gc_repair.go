package lazy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

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
	if err := d.reviveAll(ctx, b.Name()); err != nil {
		return 0, fmt.Errorf("they stay, for the sake of a mount: %w", err)
	}
	d.blobMu.Lock()
	filled := d.blobs[b.Name()]
	if filled != nil {
		filled.syncMu.Lock()
		filled.settled = false
		if d.watch != nil {
			err = d.watch.Again(b)
		}
		filled.syncMu.Unlock()
	}
	if err == nil {
		err = b.Drop(bad)
	}
	d.blobMu.Unlock()
	d.log.Error("chunks were wrong on disk", zap.String("blob", b.Name()), zap.Int("chunks", len(bad)), zap.Error(err))
	if filled == nil || err != nil {
		return 0, err
	}
	for _, c := range bad {
		if err := d.ensure(ctx, b, int64(c.UncompressedOffset), int64(c.UncompressedSize)); err != nil { //nolint:gosec // below the blob's size
			d.log.Warn("fetch a dropped chunk", zap.String("blob", b.Name()), zap.Error(err)) // its readers try again
		} else {
			refetched++
		}
	}
	return refetched, nil
}

// reviveAll makes complete mounts that have the blob called name lazy again.
func (d *daemon) reviveAll(ctx context.Context, name string) error {
	d.mu.Lock()
	var mounts []*mount
	for _, m := range d.mounts {
		if m.failed == "" && slices.Contains(m.rec.Blobs, name) {
			mounts = append(mounts, m)
		}
	}
	d.mu.Unlock()
	var errs []error
	for _, m := range mounts {
		if err := d.revive(ctx, m); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.rec.Dir, err))
		}
	}
	return errors.Join(errs...)
}

// revive makes a complete mount lazy again, with everything that it had. Nothing happens to one that is lazy, or gone.
func (d *daemon) revive(ctx context.Context, m *mount) (err error) {
	m.phase.Lock()
	defer m.phase.Unlock()
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
	} else if err := d.setComplete(m, false); err != nil {
		return err
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
	for _, name := range m.rec.Blobs {
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
