package lazy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// helloLimit bounds how long a client may take to say what it wants, and to attach its mount.
const helloLimit = 30 * time.Second

// serve answers one connection.
func (d *daemon) serve(ctx context.Context, c *net.UnixConn) {
	defer func() {
		if err := c.Close(); err != nil {
			d.log.Debug("close connection", zap.Error(err))
		}
	}()
	defer endWith(ctx, c)()
	if err := permitted(c); err != nil { // before a byte of theirs is read
		d.say(c, failure(err), nil)
		return
	}
	if err := c.SetReadDeadline(time.Now().Add(helloLimit)); err != nil || ctx.Err() != nil {
		return
	}
	var q call
	if err := d.hear(c, &q); err != nil {
		d.log.Debug("call", zap.Error(err))
		return
	}
	if err := c.SetReadDeadline(time.Time{}); err != nil || ctx.Err() != nil {
		return
	}
	if q.Protocol != Protocol {
		d.say(c, failure(fmt.Errorf("%w: the client (%s) speaks protocol %d, the daemon (%s) %d; unmount all to end it", ErrVersion, q.Version, q.Protocol, d.o.Version, Protocol)), nil)
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	switch q.Op {
	case opMount:
		d.serveMount(ctx, cancel, c, &q)
	case opStatus:
		d.say(c, answer{Status: d.status(q.Detail)}, nil)
	case opCheck:
		d.serveCheck(ctx, c, q.Device)
	case opRestart:
		d.serveRestart(c, q.Program)
	case opWait:
		d.serveWait(ctx, cancel, c, q.Device)
	case opCacheList, opCacheGC, opCacheVerify, opCachePin, opCacheUnpin:
		d.serveCache(ctx, c, &q)
	default:
		d.say(c, failure(fmt.Errorf("%w: operation %q is not known", ErrVersion, q.Op)), nil)
	}
}

// byeLimit is how long a client may take to read its answer when the daemon ends.
const byeLimit = time.Second

// endWith makes whoever reads from c or writes to it stop soon when ctx ends: a daemon that is to end waits for no client. The
// caller calls done before it closes c.
func endWith(ctx context.Context, c *net.UnixConn) (done func()) {
	served := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		limit := time.NewTimer(byeLimit)
		defer limit.Stop()
		for {
			// Again and again: who works for the client sets deadlines, too.
			_ = c.SetReadDeadline(time.Unix(1, 0))
			select {
			case <-served:
				return
			case <-limit.C:
				_ = c.Close()
				return
			case <-time.After(byeLimit / 20):
			}
		}
	})
	return func() {
		stop()
		close(served)
	}
}

// hear reads a call; a descriptor that comes with it is not wanted.
func (d *daemon) hear(c *net.UnixConn, q *call) error {
	f, err := readMessage(c, q)
	if f != nil {
		err = errors.Join(err, f.Close())
	}
	return err
}

// permitted reports whether the process at the other end is root's, or that of this process' user.
func permitted(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	ctlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, ctlErr); err != nil {
		return err
	}
	if uid := os.Geteuid(); cred.Uid != 0 && int(cred.Uid) != uid {
		return fmt.Errorf("%w: user %d may not ask the daemon of user %d", ErrPermission, cred.Uid, uid)
	}
	return nil
}

// say sends an answer and reports whether it went out.
func (d *daemon) say(c *net.UnixConn, a answer, f *os.File) bool {
	a.Protocol, a.Version = Protocol, d.o.Version
	err := c.SetWriteDeadline(time.Now().Add(helloLimit))
	if err == nil {
		err = writeMessage(c, a, f)
	}
	if err != nil {
		d.log.Info("a client did not wait for its answer", zap.Error(err))
	}
	return err == nil
}

// hearing is a client that is listened to while it is worked for.
type hearing struct {
	next chan call     // what it says
	gone chan struct{} // closed when it hung up, or end was called, before it said anything
	done chan struct{} // closed when nobody listens any more
	end  func()
}

// hearOn listens for one more call. cancel is called when the client hangs up before. The caller calls end.
func (d *daemon) hearOn(c *net.UnixConn, cancel context.CancelFunc) *hearing {
	h := &hearing{next: make(chan call, 1), gone: make(chan struct{}), done: make(chan struct{})}
	h.end = func() {
		_ = c.SetReadDeadline(time.Unix(1, 0))
		<-h.done
	}
	d.calls.Go(func() {
		defer close(h.done)
		var q call
		if err := d.hear(c, &q); err != nil {
			close(h.gone)
			cancel()
			return
		}
		h.next <- q
	})
	return h
}

// serveMount makes a mount and hands it to the client, who attaches it. A client that does not leaves a superblock that
// nobody has, which ends by itself.
func (d *daemon) serveMount(ctx context.Context, cancel context.CancelFunc, c *net.UnixConn, q *call) {
	h := d.hearOn(c, cancel)
	defer h.end()
	if q.Request == nil {
		d.say(c, failure(fmt.Errorf("%w: nothing to mount", ErrVersion)), nil)
		return
	}
	if err := d.sameFiles(q.Files); err != nil {
		d.say(c, failure(err), nil)
		return
	}
	m, detached, err := d.mount(ctx, q.Request, q.Dir)
	if err != nil {
		d.log.Info("mount", zap.String("dir", q.Dir), zap.Error(err))
		if ctx.Err() == nil { // else the client is gone, or asks the next daemon
			d.say(c, failure(err), nil)
		}
		return
	}
	defer d.look() // at the superblock, if nobody took it
	described := d.describe(m, false)
	sent := d.say(c, answer{Mount: &described}, detached.File())
	if err := detached.Close(); err != nil {
		d.log.Warn("close mount", zap.Error(err))
	}
	if !sent {
		return
	}
	limit := time.NewTimer(helloLimit)
	defer limit.Stop()
	select {
	case <-h.next:
		described = d.describe(m, false)
		d.say(c, answer{Mount: &described}, nil)
		d.log.Info("mounted", zap.String("dir", q.Dir), zap.String("reference", m.rec.Reference), zap.String("bdi", m.rec.BDI))
	case <-h.gone:
		d.log.Info("client is gone before it said that it attached its mount", zap.String("dir", q.Dir))
	case <-limit.C:
	case <-ctx.Done():
	}
}

// find returns the mount with this st_dev, also while it is being given back; nil when there is none.
func (d *daemon) find(device uint64) (found *mount) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		// The kernel may have given the number of one that is gone to another.
		if m.rec.Device == device && (found == nil || !m.gone) {
			found = m
		}
	}
	return found
}

// checkLimit bounds how long serveCheck waits: somebody else may have the same superblock mounted.
const checkLimit = 2 * time.Second

// serveCheck has the janitor look, until the mount of device is gone or for a moment.
func (d *daemon) serveCheck(ctx context.Context, c *net.UnixConn, device uint64) {
	d.look()
	if m := d.find(device); m != nil && device != 0 {
		tick, limit := time.NewTicker(5*time.Millisecond), time.NewTimer(checkLimit)
		defer tick.Stop()
		defer limit.Stop()
	wait:
		for {
			select {
			case <-m.ended:
				break wait
			case <-tick.C:
				d.look()
			case <-limit.C:
				break wait
			case <-ctx.Done():
				return
			}
		}
	}
	d.say(c, answer{}, nil)
}

// serveWait answers when the mount of device is complete.
func (d *daemon) serveWait(ctx context.Context, cancel context.CancelFunc, c *net.UnixConn, device uint64) {
	h := d.hearOn(c, cancel)
	defer h.end()
	m := d.find(device)
	if m == nil {
		d.say(c, failure(fmt.Errorf("%w with device %d", ErrNotMounted, device)), nil)
		return
	}
	d.mu.Lock()
	over := m.over
	d.mu.Unlock()
	select {
	case <-over:
	case <-ctx.Done():
		return
	}
	described := d.describe(m, false)
	switch described.State {
	case StateComplete:
		d.say(c, answer{Mount: &described}, nil)
	case StateFailed:
		d.say(c, failure(fmt.Errorf("%s: %w: %s", described.Dir, ErrFailed, described.Error)), nil)
	default:
		d.say(c, failure(fmt.Errorf("%s: %w any more", described.Dir, ErrNotMounted)), nil)
	}
}

// all returns the mounts, in no order. They may end while the caller looks at them.
func (d *daemon) all() []*mount {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Values(d.mounts))
}

// status describes everything, mounts in the order in which they were made.
func (d *daemon) status(detail bool) *Status {
	mounts := d.all()
	slices.SortFunc(mounts, func(a, b *mount) int {
		return cmp.Or(a.rec.Since.Compare(b.rec.Since), strings.Compare(a.rec.ID, b.rec.ID))
	})
	s := &Status{PID: os.Getpid(), Holder: d.link.Holder(), Spare: d.link.Spare(), Version: d.o.Version, StateDir: d.o.StateDir, Mounts: []Mount{}}
	for _, m := range mounts {
		s.Mounts = append(s.Mounts, d.describe(m, detail))
	}
	return s
}

// sameFiles compares the files that a client named with what this process sees. They may not lie on mounts of this daemon.
func (d *daemon) sameFiles(files []fileID) error {
	for _, want := range files {
		if err := d.elsewhere(want.Path); err != nil {
			return err
		}
		got, err := identify(want.Path)
		if err == nil && got != want {
			err = fmt.Errorf("%s is another file", want.Path)
		}
		if err != nil {
			return fmt.Errorf("%w for the daemon: it lives in another mount namespace", err)
		}
	}
	return nil
}
