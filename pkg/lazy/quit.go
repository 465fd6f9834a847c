package lazy

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
)

// run serves until there is nothing to do.
func (d *daemon) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.quit = cancel
	var watchErr error
	if d.watch != nil {
		d.calls.Go(func() {
			defer cancel() // a daemon that cannot answer makes room for another
			watchErr = d.watch.Run(ctx)
		})
	}
	d.log.Info("lazy mounts are served", zap.String("state_dir", d.o.StateDir), zap.Int("pid", os.Getpid()), zap.Int("holder", d.link.Holder()))
	d.calls.Go(func() { d.accept(ctx) })
	d.calls.Go(func() { d.syncLoop(ctx) })
	d.calls.Go(func() { d.shareLoop(ctx) })
	d.calls.Go(func() { d.gcLoop(ctx) })
	d.calls.Go(func() { d.confirmLoop(ctx) })
	var hidden atomic.Bool
	d.calls.Go(func() {
		defer cancel()
		if d.janitor(ctx) {
			hidden.Store(d.hide())
		}
	})
	<-ctx.Done()
	err := d.listener.Close()
	if !within(after(d.calls.Wait)) {
		// Readers wait for the next daemon, which comes when this process has ended. What is stuck ends with it.
		d.stuck.Store(true)
		d.log.Warn("something does not end, like a source or a disk that hangs: the next daemon goes on without it")
		return errors.Join(err, d.listenAnew(hidden.Load()), d.close(false))
	}
	done := d.nothingMounted() // a call may have been quicker, or ctx ended with nothing mounted
	if !done {
		err = errors.Join(err, d.listenAnew(hidden.Load()))
	}
	return errors.Join(watchErr, err, d.close(done))
}

// listenAnew has the next daemon make a socket, where this one has removed its name.
func (d *daemon) listenAnew(hidden bool) error {
	if !hidden {
		return nil
	}
	return d.link.Drop(keptListener, keptSocket)
}

// nothingMounted reports whether no mount needs anybody: neither one that is known, nor one whose record was lost, which
// has the data file of a blob that nobody adopted, or one that was put aside: the mark of either ends with this daemon and its holder.
func (d *daemon) nothingMounted() bool {
	d.mu.Lock()
	n := len(d.mounts)
	d.mu.Unlock()
	if n > 0 {
		return false
	}
	d.dropUnused()
	if d.store.Left("") {
		return false
	}
	used, err := d.store.AsideInUse()
	if err != nil {
		d.log.Warn("what was put aside cannot be looked at", zap.Error(err))
	}
	return !used
}

// nothingLives reports whether no EROFS is mounted from files on the whole machine, as far as that can be told.
func nothingLives() bool {
	living, err := erofs.Living()
	return err == nil && len(living) == 0
}

// close gives everything back. done ends the holder too; else it starts another daemon when this process ends. What is in use still, because
// something does not end, is left to the end of the process, as in one that is killed.
func (d *daemon) close(done bool) error {
	if d.listener != nil && done {
		d.hide()
	}
	errs := []error{d.closeServers()}
	if d.socket != nil {
		errs = append(errs, d.socket.Close())
	}
	stuck := d.stuck.Load() || d.late.Load() > 0 || d.fetching()
	if d.fill != nil && !stuck {
		stuck = !within(d.fill.End())
	}
	if stuck {
		d.log.Warn("a source or a disk hangs: what it is used for stays open until this process ends")
		return errors.Join(append(errs, d.closeLink(done))...)
	}
	if d.watch != nil {
		errs = append(errs, d.watch.Close())
	}
	if d.table != nil {
		errs = append(errs, d.table.Close())
	}
	if d.group != nil {
		errs = append(errs, d.group.Close())
	}
	if !done {
		errs = append(errs, d.closeLink(false))
	}
	errs = append(errs, d.stopSharing())
	if d.store != nil {
		errs = append(errs, d.store.Close())
	}
	if done {
		errs = append(errs, d.closeLink(true))
	}
	return errors.Join(errs...)
}

// closeLink ends the holder when all is done, else leaves it alone.
func (d *daemon) closeLink(done bool) error {
	switch {
	case d.link == nil:
		return nil
	case done:
		return d.link.Done()
	}
	return d.link.Close()
}

// closeServers stops the servers of FUSE mounts. What waits is the next daemon's.
func (d *daemon) closeServers() error {
	var mu sync.Mutex // guards errs
	var errs []error
	var closing sync.WaitGroup
	for _, m := range d.all() {
		c := m.conn.Load()
		if c == nil {
			continue
		}
		closing.Go(func() {
			err := c.server.Close()
			if errors.Is(err, fuse.ErrStuck) {
				d.stuck.Store(true)
			}
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	closing.Wait()
	return errors.Join(errs...)
}
