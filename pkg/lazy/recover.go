package lazy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/backend"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// recover takes over the mounts of earlier daemons, before the first event is read. guarded: their
// descriptors were kept all the time.
func (d *daemon) recover(ctx context.Context, guarded bool, own *held) {
	stored, err := d.store.Mounts()
	if err != nil {
		d.log.Error("records of mounts", zap.Error(err))
	}
	living, err := erofs.Living()
	if err != nil {
		d.log.Error("superblocks", zap.Error(err)) // none counts as gone then
		living = nil
	}
	unused := map[string]bool{}
	for id, data := range stored {
		var rec record
		if err := json.Unmarshal(data, &rec); err != nil {
			d.log.Error("record of a mount", zap.String("id", id), zap.Error(err))
			continue
		}
		if rec.Boot != d.boot || !lives(&rec, nil, living) {
			// Nobody knows when it ended.
			if err := errors.Join(d.store.Touch(rec.Blobs...), d.store.RemoveMount(id)); err != nil {
				d.log.Warn("remove a record", zap.String("id", id), zap.Error(err))
			}
			unused[rec.Bootstrap] = true
			continue
		}
		m := &mount{rec: rec, dir: rec.Dir, share: d.fill.Share(), over: make(chan struct{}), ended: make(chan struct{}), booted: true}
		d.bootstraps[rec.Bootstrap]++
		d.mounts[id] = m
		d.recoverOne(ctx, m, guarded, own)
	}
	d.lendAllToFailed()
	d.dropConnections()
	for sum := range unused {
		if d.bootstraps[sum] > 0 {
			continue
		}
		if err := d.store.RemoveBootstrap(sum); err != nil {
			d.log.Warn("remove a bootstrap", zap.Error(err))
		}
	}
	d.dropUnused()
	if guarded && d.watch != nil && d.unsure() {
		d.log.Warn("not all data files are known that readers may wait for")
		d.watch.Unsure()
	}
}

// lendAllToFailed has mounts that failed keep blobs that were adopted before they did.
func (d *daemon) lendAllToFailed() {
	d.blobMu.Lock()
	defer d.blobMu.Unlock()
	for _, b := range d.blobs { // nobody else changes them yet
		if err := d.lendToFailed(b); err != nil {
			d.log.Error("keep a blob for a mount that cannot be filled any more", zap.String("blob", b.st.Name()), zap.Error(err))
		}
	}
}

// unsure reports whether there may be data files that are not complete, have a mark, and were not adopted.
func (d *daemon) unsure() bool {
	if d.lost {
		return true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if m.failed != "" && m.rec.driver() == DriverEROFS {
			return true
		}
	}
	for name := range d.store.Unadopted() {
		if _, _, whole := d.store.Whole(name); !whole {
			return true
		}
	}
	return false
}

// recoverOne makes a mount served again. What stands in the way makes it a failed mount: what is local
// can be read, everything else is an error.
func (d *daemon) recoverOne(ctx context.Context, m *mount, guarded bool, own *held) {
	if m.rec.driver() == DriverFUSE {
		if err := d.recoverFUSE(ctx, m, own); err != nil {
			d.fail(m, err)
			return
		}
	}
	switch {
	case m.rec.Complete:
		m.final = &Mount{
			ID: m.rec.ID, Reference: m.rec.Reference, Digest: m.rec.Origin.Digest.String(), Since: m.rec.Since, Device: m.rec.Device,
			BDI: m.rec.BDI, Bootstrap: m.rec.Bootstrap, Blobs: len(m.rec.Blobs), Local: m.rec.Total, Total: m.rec.Total, Prefetched: true,
			Driver: m.rec.driver(), DriverReason: m.rec.Reason,
		}
		m.finish()
		if guarded && m.rec.driver() == DriverEROFS {
			d.passComplete(m)
		}
		if m.rec.driver() == DriverFUSE { // who said that it is complete may have ended then
			d.setReadAhead(m, m.rec.completeReadAhead())
		}
		return
	case m.rec.driver() == DriverFUSE:
		return
	case !guarded:
		d.fail(m, ErrFailed)
		return
	}
	whole := d.reopenWhole(m)
	if _, err := d.adopt(ctx, m); err != nil {
		d.fail(m, fmt.Errorf("%w: %w", ErrFailed, err))
	}
	for _, b := range whole {
		if err := b.Close(); err != nil {
			d.log.Warn("close a blob", zap.Error(err))
		}
	}
}

// reopenWhole opens those blobs of a mount that were not kept and of which all is local, so that the mount finds them by name: the daemon died when
// it had begun to make a complete mount lazy again. Nobody has read a hole of them.
func (d *daemon) reopenWhole(m *mount) (whole []*store.Blob) {
	kept := d.store.Unadopted()
	for _, name := range m.rec.Blobs {
		if _, ok := kept[name]; ok || d.store.IsOpen(name) {
			continue
		}
		if _, _, ok := d.store.Whole(name); !ok {
			continue
		}
		b, err := d.store.ReopenNow(name)
		if err != nil {
			d.log.Warn("open a blob of which all is local", zap.Error(err))
			continue
		}
		whole = append(whole, b)
	}
	return whole
}

// passComplete lets readers of a complete mount pass whose events an earlier daemon did not answer, or that a mark raises which was left: it
// was the mount's own, or of another mount that used more of the same blobs and is not taken over.
func (d *daemon) passComplete(m *mount) {
	for _, name := range m.rec.Blobs {
		dev, ino, ready, err := d.store.Durable(name)
		if err != nil {
			d.log.Error("what is local of a complete mount's blob", zap.String("dir", m.dir), zap.Error(err))
			continue
		}
		d.watch.AddReady(dev, ino, ready)
	}
}

func (d *daemon) fail(m *mount, err error) {
	d.log.Error("mount cannot be filled any more; unmount it", zap.String("dir", m.dir), zap.String("reference", m.rec.Reference), zap.Error(err))
	d.mu.Lock()
	defer d.mu.Unlock()
	m.failed = err.Error()
	m.finish()
}

// adopt opens the blobs of a mount that outlived its daemon.
func (d *daemon) adopt(ctx context.Context, m *mount) (*rafs.Image, error) {
	path, err := d.store.Bootstrap(m.rec.Bootstrap)
	if err != nil {
		return nil, err
	}
	if m.claim, err = m.rec.Request.claim(m.rec.Scope, m.rec.Own); err != nil {
		d.log.Warn("a mount shares nothing", zap.Error(err)) // a record of another version
	}
	tree, err := readBootstrap(path)
	if err != nil {
		return nil, fmt.Errorf("bootstrap %s: %w", path, err)
	}
	if m.rec.driver() == DriverFUSE {
		if err := fuse.Align(tree); err != nil {
			return nil, err
		}
	}
	if n := len(tree.Blobs); n != len(m.rec.Blobs) || n != len(m.rec.Origin.Blobs) {
		return nil, fmt.Errorf("bootstrap %s has %d blobs, its mount %d, their origin %d", path, n, len(m.rec.Blobs), len(m.rec.Origin.Blobs))
	}
	m.src = d.reopenImage(ctx, m)
	m.narrow = m.src.Narrow
	for n := range tree.Blobs {
		u, err := d.openBlob(m, tree, n, m.src.Blob(n), m.rec.Blobs[n], store.Patience{})
		if err != nil {
			return nil, err
		}
		d.usedMu.Lock()
		m.uses = append(slices.Clip(m.uses), u)
		d.usedMu.Unlock()
	}
	d.prefetch(m, tree)
	return tree, nil
}

// reopenImage finds the blobs of a mount that outlived its daemon, and waits for nothing but its own memory. As long as they cannot be reached, what is local
// stays readable, and what is not is an error.
func (d *daemon) reopenImage(ctx context.Context, m *mount) imageSource {
	ctx = context.WithoutCancel(ctx) // of a client, or of the start
	said := false
	reopen := func() (*backend.Blobs, error) {
		blobs, err := backend.Reopen(ctx, m.rec.Origin, d.backendOptions(&m.rec.Request))
		if err != nil && !said {
			said = true
			d.log.Error("reopen an image", zap.String("reference", m.rec.Reference), zap.Error(err))
		}
		return blobs, err
	}
	l := &lateImage{reopen: reopen}
	if backend.Instant(m.rec.Origin) {
		blobs, err := reopen()
		if err == nil {
			return blobs
		}
		l.err, l.tried = err, time.Now()
		return l
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.try()
	return l
}

// unmark takes the mark off a data file of which all is local, and that no mount needs to have watched.
func (d *daemon) unmark(data *os.File) error {
	if d.watch == nil {
		return nil
	}
	return d.watch.Unmark(data)
}

// unmarkUnused takes the mark off a data file that nobody has.
func (d *daemon) unmarkUnused(data *os.File) error {
	if d.watch == nil {
		return nil
	}
	return d.watch.Release(data)
}

// dropUnused gives up marks and descriptors that no mount needs any more, and tells the holder: an earlier daemon may have died between
// two steps.
func (d *daemon) dropUnused() {
	d.blobMu.Lock()
	defer d.blobMu.Unlock()
	for name := range d.store.Unadopted() {
		if err := d.giveUp(name); err != nil {
			// Of a mount that cannot be filled any more, or is not known: while its mark lives, its reads fail.
			d.log.Debug("descriptors of a blob stay", zap.Error(err))
		}
	}
	var names []string
	for _, name := range d.link.Names() {
		for _, prefix := range []string{keptData, keptBits} {
			if blob, ok := strings.CutPrefix(name, prefix); ok && blob != "" && d.blobs[blob] == nil && !d.store.Left(blob) {
				names = append(names, name)
			}
		}
	}
	if err := d.link.Drop(names...); err != nil {
		d.log.Warn("drop descriptors", zap.Error(err))
	}
}

// giveUp gives up what is kept of a blob that nobody adopted. Whoever has one of which all is local needs no mark.
func (d *daemon) giveUp(name string) error {
	if dev, ino, whole := d.store.Whole(name); whole && d.watch != nil {
		d.watch.AddWhole(dev, ino) // events may be queued
		return d.store.ReleaseWhole(name, d.unmark)
	}
	err := d.store.Release(name, d.unmarkUnused)
	if errors.Is(err, store.ErrInUse) && d.watch != nil && !d.strangers(name) {
		err = d.store.ReleaseKnown(name, d.unmarkUnused)
	}
	return err
}
