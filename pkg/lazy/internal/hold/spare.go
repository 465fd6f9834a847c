package hold

import (
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

// Names that daemon and holders use between themselves.
const (
	// nameSpare begins the names under which the holder has duplicates of the daemon's sockets to spares.
	nameSpare = "hold/spare/"
	// namePrimary is the holder's pidfd; a spare has it, which makes it one.
	namePrimary = "hold/primary"
	// nameDaemon is the pidfd of a daemon that took over, for spares of an earlier one.
	nameDaemon = "hold/daemon"
)

func isSpare(name string) bool { return strings.HasPrefix(name, nameSpare) }

// spare is the second holder.
type spare struct {
	conn *net.UnixConn
	pid  int
	name string // of the duplicate of conn
}

// Spare returns the process of the second holder; 0: there is none yet.
func (l *Link) Spare() int { return int(l.sparePID.Load()) }

// inherit takes over a socket to a spare of an earlier daemon, which gets one of this daemon later. f is its own from then on.
func (l *Link) inherit(name string, f *os.File) error {
	mine, err := dup(f)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	c, err := net.FileConn(f) // duplicates
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, mine.Close())
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return errors.Join(fmt.Errorf("%s is no unix socket", name), c.Close(), mine.Close())
	}
	l.kept[name] = mine
	l.old = append(l.old, u)
	if self, err := unix.PidfdOpen(os.Getpid(), 0); err == nil { // else it takes the end of the socket for that of all our threads
		_ = send(u, message{Op: opKeep, Names: []string{nameDaemon}}, []int{self}) // it may be gone
		_ = unix.Close(self)
	}
	if l.primary != nil {
		_ = l.introduce(u, true) // it gave the socket
	}
	return nil
}

// spareLinks returns those of files that are duplicates of sockets to spares, withoutSpares the others.
func spareLinks(files map[string]*os.File) map[string]*os.File {
	links := maps.Clone(files)
	maps.DeleteFunc(links, func(name string, _ *os.File) bool { return !isSpare(name) })
	return links
}

func withoutSpares(files map[string]*os.File) map[string]*os.File {
	others := maps.Clone(files)
	maps.DeleteFunc(others, func(name string, _ *os.File) bool { return isSpare(name) })
	return others
}

// olderThan returns the duplicates of sockets to spares but that of one name.
func olderThan(name string, files map[string]*os.File) map[string]*os.File {
	links := spareLinks(files)
	delete(links, name)
	return links
}

// anyConnected reports whether a spare of which files has the socket lives.
func anyConnected(files map[string]*os.File) bool {
	return slices.ContainsFunc(slices.Collect(maps.Values(spareLinks(files))), connected)
}

// spareConns returns the sockets to all spares. The caller holds mu, or nobody else is there any more.
func (l *Link) spareConns() []*net.UnixConn {
	conns := l.old
	if l.spare != nil {
		conns = append(slices.Clip(conns), l.spare.conn)
	}
	return conns
}

// tellAll tells the holder and all spares. The caller holds mu.
func (l *Link) tellAll(m message, fds []int) {
	l.tell(m, fds)
	for _, c := range l.spareConns() {
		if err := send(c, m, fds); err != nil {
			l.o.Log.Debug("spare does not hear", zap.String("op", m.Op), zap.Error(err)) // watchSpare starts another
		}
	}
}

// tellPrimary tells spares who the holder is. The caller holds mu.
func (l *Link) tellPrimary() {
	if l.primary == nil {
		return
	}
	for _, c := range l.spareConns() {
		_ = l.introduce(c, true) // it may be gone; the holder got its socket before it was there
	}
}

// introduce tells a spare who the holder is. known: the holder has a duplicate of the socket, which ends with it. The caller holds mu, or nobody else is there yet.
func (l *Link) introduce(c *net.UnixConn, known bool) error {
	return send(c, message{Op: opKeep, Names: []string{namePrimary}, Known: known}, []int{int(l.primary.Fd())})
}

// endSpares ends all spares. The caller holds mu.
func (l *Link) endSpares() {
	for _, c := range l.spareConns() {
		_ = send(c, message{Op: opDone}, nil) // it may be gone
	}
}

// settled is how many times [Options].Spare a daemon lives before it replaces what an earlier one started, a spare and a holder of another
// program: one that ends soon must not take them with it.
const settled = 5

// soon is the part of [Options].Spare after which a daemon that took over starts a spare, where none lives.
const soon = 20

// watchSpare starts the spare, and another one when it is gone. Where a holder of another program started this process, the holder is
// replaced too, when this process has lived for a while and there is a spare.
func (l *Link) watchSpare(ctx context.Context, restarted bool) {
	began, renewed := time.Now(), !restarted
	first := l.o.Spare
	if first == 0 {
		first = DefaultSpare
	}
	pause := first
	if restarted { // nobody waits for its start, and who killed one may kill the next
		pause /= soon
	}
	if !sleep(ctx, pause) || !l.awaitOld(ctx, settled*first-pause) {
		return
	}
	for pause = 0; ; {
		born := time.Now()
		conn, err := l.startSpare()
		if err != nil {
			l.o.Log.Error("start a spare holder", zap.Error(err))
		}
		if err == nil && conn != nil {
			if !renewed {
				renewed = true
				if !sleep(ctx, settled*first-time.Since(began)) {
					return
				}
				l.renew()
			}
			for {
				if _, _, err := receive(conn); err != nil { // nothing comes but its end
					break
				}
			}
		}
		if ctx.Err() != nil {
			return
		}
		l.lostSpare()
		pause = backoff(pause, time.Since(born))
		if !sleep(ctx, pause) {
			return
		}
	}
}

// awaitOld waits while a spare of an earlier daemon lives; false: ctx has ended.
func (l *Link) awaitOld(ctx context.Context, limit time.Duration) bool {
	const step = 100 * time.Millisecond
	for until := time.Now().Add(limit); time.Now().Before(until); {
		l.mu.Lock()
		lives := anyConnected(l.kept)
		l.mu.Unlock()
		if !lives {
			break
		}
		if !sleep(ctx, min(step, time.Until(until))) {
			return false
		}
	}
	return ctx.Err() == nil
}

// connected reports whether somebody has the other end of a socket.
func connected(f *os.File) bool {
	poll := []unix.PollFd{{Fd: int32(f.Fd())}} //nolint:gosec // a descriptor fits an int32
	n, err := unix.Poll(poll, 0)
	return err == nil && (n == 0 || poll[0].Revents&unix.POLLHUP == 0)
}

// lostSpare forgets the spare, which is gone. The holder forgets it when there is another.
func (l *Link) lostSpare() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ending || l.spare == nil {
		return
	}
	l.o.Log.Warn("the spare holder is gone; starting another", zap.Int("pid", l.spare.pid))
	_ = l.spare.conn.Close()
	l.spare = nil
	l.sparePID.Store(0)
	if err := l.reserve(); err != nil { // what it had
		l.o.Log.Warn("keep low descriptors", zap.Error(err))
	}
}

// sleep waits; false: ctx has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// startSpare starts a spare in the place of all that there are. Without an error and a socket the link is ending.
func (l *Link) startSpare() (*net.UnixConn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ending {
		return nil, nil
	}
	if l.primary == nil {
		return nil, errors.New("the holder is not known")
	}
	s := &spare{name: fmt.Sprintf("%s%d-%d", nameSpare, os.Getpid(), time.Now().UnixNano())}
	p, err := l.begin(func(conn *net.UnixConn) error {
		// The holder knows of a spare before its process is there: else both might start a daemon.
		f, err := conn.File()
		if err != nil {
			return err
		}
		mine, err := dup(f)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		l.kept[s.name] = mine
		known := l.tell(message{Op: opKeep, Names: []string{s.name}}, []int{int(mine.Fd())})
		// And it knows of those before it, which see the end of this process when it has ended too.
		if err := sendFiles(conn, olderThan(s.name, l.kept)); err != nil {
			return err
		}
		return l.introduce(conn, known)
	})
	if err != nil {
		if p.conn != nil {
			err = errors.Join(err, p.conn.Close())
		}
		return nil, errors.Join(err, l.dropSpares(s.name))
	}
	err = l.give(p.conn, withoutSpares(l.kept))
	if p.pidfd != nil {
		err = errors.Join(err, p.pidfd.Close())
	}
	if err != nil {
		_ = send(p.conn, message{Op: opDone}, nil) // it may be gone
		return nil, errors.Join(err, p.conn.Close(), l.dropSpares(s.name))
	}
	l.endSpares()
	names := slices.Collect(maps.Keys(olderThan(s.name, l.kept)))
	err = l.dropSpares(names...)
	for batch := range slices.Chunk(names, maxFiles) {
		err = errors.Join(err, send(p.conn, message{Op: opDrop, Names: batch}, nil))
	}
	for _, c := range l.spareConns() {
		err = errors.Join(err, c.Close())
	}
	s.conn, s.pid = p.conn, p.pid
	l.old, l.spare = nil, s
	l.sparePID.Store(int64(s.pid))
	if err = errors.Join(err, l.reserve()); err != nil {
		l.o.Log.Warn("forget a spare holder", zap.Error(err))
	}
	return p.conn, nil
}

// giveOld gives the spares of an earlier daemon everything: it may have died while it did so. The caller holds mu, or nobody else is there yet.
func (l *Link) giveOld() {
	for _, c := range l.old {
		if err := l.give(c, withoutSpares(l.kept)); err != nil {
			l.o.Log.Debug("spare does not hear", zap.Error(err)) // watchSpare starts another
		}
	}
}

// dropSpares makes the holder forget sockets to spares. The caller holds mu.
func (l *Link) dropSpares(names ...string) error {
	var errs []error
	for _, n := range names {
		if f := l.kept[n]; f != nil {
			errs = append(errs, f.Close())
			delete(l.kept, n)
			l.tell(message{Op: opDrop, Names: []string{n}}, nil)
		}
	}
	return errors.Join(errs...)
}

// renew ends a holder that runs another program than this process: watch starts one of this program's, and meanwhile there is the spare.
func (l *Link) renew() {
	l.mu.Lock()
	defer l.mu.Unlock()
	holder := l.Holder()
	if l.ending || l.spare == nil || holder == 0 {
		return
	}
	mine, err := os.Stat("/proc/self/exe")
	if err != nil {
		return
	}
	his, err := os.Stat(fmt.Sprintf("/proc/%d/exe", holder))
	if err != nil || os.SameFile(mine, his) {
		return // it is gone, or needs no other
	}
	l.o.Log.Info("the holder is of another program: replacing it", zap.Int("pid", holder))
	l.tell(message{Op: opDone}, nil)
}
