package lazy

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// stuckLimit is how long something that was told to end is waited for. A source may take no notice: a file on a network file system
// whose server is away, or a disk that hangs.
const stuckLimit = 2 * time.Second

// after returns a channel that is closed when wait has returned.
func after(wait func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		wait()
	}()
	return done
}

// within reports whether all channels are closed before stuckLimit is over.
func within(all ...<-chan struct{}) bool {
	timer := time.NewTimer(stuckLimit)
	defer timer.Stop()
	for _, c := range all {
		select {
		case <-c: // also when both are ready, mostly
		case <-timer.C:
			return false
		}
	}
	return true
}

// parts are what fills a mount.
type parts struct {
	run    *fill.Run    // nil: none
	server *fuse.Server // that something fetches for still; nil: none
	uses   []*use
	src    imageSource // nil: none, or it stays
}

// letGo gives back what filled what is at dir. What is in use for longer than a moment, because a source ignores that it is to end, stays
// open until then, and nobody waits for it: that is an error too.
func (d *daemon) letGo(dir string, p parts) error {
	var idle []<-chan struct{}
	if p.server != nil {
		idle = append(idle, p.server.Idle())
	}
	if p.run != nil {
		idle = append(idle, p.run.End())
		within(p.run.Done()) // then its blobs
	}
	var errs []error
	d.blobMu.Lock()
	for _, u := range p.uses {
		busy, err := d.unlink(u)
		idle, errs = append(idle, busy...), append(errs, err)
	}
	d.blobMu.Unlock()
	if within(idle...) {
		return errors.Join(append(errs, d.giveBack(p))...)
	}
	d.late.Add(1)
	go func() {
		defer d.late.Add(-1)
		for _, c := range idle {
			<-c
		}
		err := d.giveBack(p)
		d.log.Info("a source that did not answer has ended", zap.String("dir", dir), zap.Error(err))
	}()
	return errors.Join(append(errs, fmt.Errorf("the source of %s does not answer and does not end: %d blobs stay open until it does", dir, len(p.uses)))...)
}

// giveBack closes parts that nothing uses any more.
func (d *daemon) giveBack(p parts) error {
	var errs []error
	var names []string
	d.blobMu.Lock()
	for _, u := range p.uses {
		names = append(names, u.b.st.Name())
		errs = append(errs, d.closeUse(u))
	}
	d.blobMu.Unlock()
	d.feedSoon(names)
	if p.src != nil {
		errs = append(errs, p.src.Close())
	}
	return errors.Join(errs...)
}

// unlink ends a mount's part in a blob, so that nobody begins to use it. It may be closed when the channels are. The caller holds blobMu.
func (d *daemon) unlink(u *use) (idle []<-chan struct{}, err error) {
	u.made()
	d.noteScope(u, u.b.st)
	d.usedMu.Lock()
	u.b.users = slices.DeleteFunc(u.b.users, func(o *use) bool { return o == u })
	d.usedMu.Unlock()
	if u.f != nil {
		if u.f.refs--; u.f.refs > 0 {
			idle = append(idle, u.f.fb.EndSource(u.src))
		} else {
			d.usedMu.Lock()
			u.b.fillings = slices.DeleteFunc(slices.Clone(u.b.fillings), func(f *filling) bool { return f == u.f })
			d.usedMu.Unlock()
			idle = append(idle, u.f.fb.End())
		}
	}
	if u.watched {
		d.meet(u.b.st)
		var events <-chan struct{}
		events, err = d.watch.End(u.b.st)
		idle = append(idle, events)
	}
	return idle, err
}

// closeUse closes what [daemon.unlink] has ended. The last one closes the blob; no mount has it then. The caller holds blobMu.
func (d *daemon) closeUse(u *use) error {
	var errs []error
	u.b.refs--
	if u.b.refs == 0 {
		name := u.b.st.Name()
		d.meet(u.b.st)
		if u.b.st.Strangers() { // with a mark that no mount of this daemon needed
			u.b.st.Leave()
		}
		if d.store.Left(name) {
			d.log.Warn("a mount that is not known may have a data file that is not complete: what is missing is an error for it", zap.String("blob", name))
		} else {
			errs = append(errs, d.link.Drop(keptData+name, keptBits+name))
		}
		d.usedMu.Lock()
		delete(d.blobs, name)
		d.usedMu.Unlock()
	}
	u.b.syncMu.Lock()
	defer u.b.syncMu.Unlock()
	u.b.closed = u.b.refs == 0
	err := u.b.st.Close()
	if err != nil && u.b.closed && d.watch != nil {
		errs = append(errs, d.watch.Again(u.b.st)) // what was ready may not be on the disk
	}
	return errors.Join(append(errs, err)...)
}

// meet tells st whether somebody may have its data file whom nobody here knows.
func (d *daemon) meet(st *store.Blob) {
	if d.watch != nil && !st.Known() {
		st.NoStrangers(!d.strangers(st.Name()))
	}
}

// strangers reports whether there are EROFS mounts that may have the blob called name and need its mark: such as are not known here, and known ones that
// cannot be filled or are not complete.
func (d *daemon) strangers(name string) bool {
	living, err := erofs.Living()
	return err != nil || d.strangersAmong(living, name)
}

// strangersAmong is strangers for the backing devices of all EROFS mounts, which it takes known ones out of.
func (d *daemon) strangersAmong(living map[string]bool, name string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if m.rec.driver() == DriverEROFS && m.failed == "" && (m.final != nil || !slices.Contains(m.rec.Blobs, name)) {
			delete(living, m.rec.BDI)
		}
	}
	return len(living) > 0
}

// fetching reports whether something that was asked for over a connection that has ended is on its way still.
func (d *daemon) fetching() bool {
	for _, m := range d.all() {
		s := m.stuck.Load()
		if s == nil {
			continue
		}
		select {
		case <-s.Idle():
		default:
			return true
		}
	}
	return false
}
