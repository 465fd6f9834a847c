package lazy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// connection is what a FUSE mount has of its own.
type connection struct {
	dev    *os.File
	table  *fuse.Table
	server *fuse.Server
}

// fuseBlob is a blob as a FUSE server sees it.
type fuseBlob struct {
	d  *daemon
	st *store.Blob
}

// File implements fuse.Blob: the first descriptor, whose reads raise no events of EROFS mounts that have the blob too.
func (b fuseBlob) File() *os.File { return b.st.File() }

// ReadyRange implements fuse.Blob. It is asked once for a read of what is ready.
func (b fuseBlob) ReadyRange(off, n int64) bool {
	ready := b.st.ReadyRange(off, n)
	if ready {
		b.d.touched(b.st, off, n)
	}
	return ready
}

// Ensure implements fuse.Blob.
func (b fuseBlob) Ensure(ctx context.Context, off, n int64) error {
	return b.d.ensure(ctx, b.st, off, n)
}

// newFUSE makes a superblock whose reads this process answers.
func (d *daemon) newFUSE(m *mount, tree *rafs.Image) (_ *fuse.Detached, err error) {
	dev, err := fuse.Open()
	if err != nil {
		return nil, err
	}
	table, err := fuse.NewTable()
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	c, err := d.connect(m, tree, dev, table)
	if err != nil {
		return nil, errors.Join(err, dev.Close(), table.Close())
	}
	if err := errors.Join(d.link.Keep(keptFUSE+m.rec.ID, dev), d.link.Keep(keptRequests+m.rec.ID, table.File())); err != nil {
		return nil, err
	}
	detached, err := fuse.New(dev, fuse.Options{Source: m.rec.Reference})
	if err != nil {
		return nil, err
	}
	d.answer(m, c)
	if err = detached.Identify(); err == nil {
		err = erofs.SetReadAhead(detached.BDI, m.rec.readAhead())
	}
	if err != nil {
		return nil, errors.Join(err, detached.Close())
	}
	return detached, nil
}

// connect gives m a connection, which owns dev and table. On an error they stay the caller's.
func (d *daemon) connect(m *mount, tree *rafs.Image, dev *os.File, table *fuse.Table) (*connection, error) {
	files, err := d.trees.get(m.rec.Bootstrap, tree)
	if err != nil {
		return nil, err
	}
	config := fuse.Config{Device: dev, Table: table, Tree: files, Limit: d.o.Limit + limitGrace, Log: d.log}
	for _, u := range m.uses {
		config.Blobs = append(config.Blobs, fuseBlob{d, u.b.st})
	}
	server, err := fuse.NewServer(config)
	if err != nil {
		return nil, err
	}
	c := &connection{dev: dev, table: table, server: server}
	m.conn.Store(c)
	return c, nil
}

// answer has the server of m run until its connection ends. Nobody waits for it: see [fuse.Server.Close]. When it cannot go on the connection
// ends, for good: what is read is ENOTCONN, and nobody waits for ever.
func (d *daemon) answer(m *mount, c *connection) {
	go func() {
		if err := c.server.Run(); err != nil && m.conn.CompareAndSwap(c, nil) {
			d.fail(m, errors.Join(fmt.Errorf("%w: %w", ErrFailed, err), d.hangUp(m, c)))
		}
		d.look()
	}()
}

// disconnectLimit bounds how long is waited for the kernel to let go of a connection that ends.
const disconnectLimit = 2 * time.Second

// disconnect ends the connection of m, if it has one: what is mounted still is ENOTCONN. Nothing of it uses the blobs when it returns, unless m is stuck.
func (d *daemon) disconnect(m *mount) error {
	c := m.conn.Swap(nil)
	if c == nil {
		return nil
	}
	return d.hangUp(m, c)
}

// hangUp ends a connection that m has no more. Its device is closed after everybody has let go of its number, which may be another's next.
func (d *daemon) hangUp(m *mount, c *connection) error {
	err := c.server.Close()
	if errors.Is(err, fuse.ErrStuck) {
		m.stuck.Store(c.server) // for release, which waits for it
	}
	err = errors.Join(err, d.link.Drop(keptFUSE+m.rec.ID, keptRequests+m.rec.ID))
	closed := closeAfter(c.server.Ended(), c.close)
	limit := time.NewTimer(disconnectLimit)
	defer limit.Stop()
	select {
	case closeErr := <-closed:
		return errors.Join(err, closeErr)
	case <-limit.C:
	}
	go func() {
		if err := <-closed; err != nil {
			d.log.Warn("close a connection", zap.String("dir", m.rec.Dir), zap.Error(err))
		}
	}()
	return errors.Join(err, fmt.Errorf("the connection of %s does not end yet", m.rec.Dir))
}

// closeAfter calls end once ended is closed, not before, and gives what it returned.
func closeAfter(ended <-chan struct{}, end func() error) <-chan error {
	closed := make(chan error, 1)
	go func() {
		<-ended
		closed <- end()
	}()
	return closed
}

// close closes what the connection has. Its server has ended.
func (c *connection) close() error { return errors.Join(c.dev.Close(), c.table.Close()) }

// lives reports whether the superblock of m exists, as far as anybody can tell.
func lives(rec *record, c *connection, backing map[string]bool) bool {
	switch {
	case rec.Driver != DriverFUSE:
		return backing == nil || backing[rec.BDI]
	case c != nil:
		return !c.server.Gone()
	}
	alive, err := fuse.Alive(rec.BDI, rec.BDIInode)
	return alive || err != nil
}

// recoverFUSE goes on with the connection of a mount that outlived its daemon.
func (d *daemon) recoverFUSE(ctx context.Context, m *mount, own *held) error {
	dev, kept := own.take(keptFUSE+m.rec.ID), own.take(keptRequests+m.rec.ID)
	if dev == nil || kept == nil {
		return errors.Join(ErrFailed, closeFiles(dev, kept))
	}
	table, err := fuse.OpenTable(kept)
	if err != nil {
		return errors.Join(ErrFailed, err, closeFiles(dev, kept))
	}
	tree, err := d.adopt(ctx, m)
	if err != nil {
		return errors.Join(ErrFailed, err, closeFiles(dev), table.Close(), d.link.Drop(keptFUSE+m.rec.ID, keptRequests+m.rec.ID))
	}
	c, err := d.connect(m, tree, dev, table)
	if err != nil {
		return errors.Join(ErrFailed, err, closeFiles(dev), table.Close(), d.link.Drop(keptFUSE+m.rec.ID, keptRequests+m.rec.ID))
	}
	d.answer(m, c)
	return nil
}

func closeFiles(files ...*os.File) error {
	var errs []error
	for _, f := range files {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// dropConnections gives up connections that no mount has: an earlier daemon died before it wrote a mount's record.
func (d *daemon) dropConnections() {
	known := map[string]bool{}
	d.mu.Lock()
	for id, m := range d.mounts {
		known[id] = m.conn.Load() != nil
	}
	d.mu.Unlock()
	for _, name := range d.link.Names() {
		for _, prefix := range []string{keptFUSE, keptRequests} {
			if id, ok := strings.CutPrefix(name, prefix); ok && !known[id] {
				if err := d.link.Drop(name); err != nil {
					d.log.Warn("drop a connection", zap.Error(err))
				}
			}
		}
	}
}

// keepsConnections reports whether the holder has connections.
func (d *daemon) keepsConnections() bool {
	if d.link == nil {
		return false
	}
	for _, name := range d.link.Names() {
		if strings.HasPrefix(name, keptFUSE) {
			return true
		}
	}
	return false
}
