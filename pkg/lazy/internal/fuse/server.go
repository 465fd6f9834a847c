package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Blob is a cache file. It is safe for concurrent use.
type Blob interface {
	// File returns the cache file, whose reads raise no event.
	File() *os.File
	// ReadyRange reports whether [offset, offset+length) is there.
	ReadyRange(offset, length int64) bool
	// Ensure returns nil when it is there, else why it cannot be. It returns soon when ctx ends.
	Ensure(ctx context.Context, offset, length int64) error
}

// Config says what a [Server] works with; all but Log is required, and stays the caller's.
type Config struct {
	// Device is the connection, from [Open], perhaps in another process. Table has what is pending on it. They are closed after Close.
	Device *os.File
	Table  *Table
	// Tree is the image, and Blobs are its cache files by index.
	Tree  *Tree
	Blobs []Blob
	// Limit is how long a read waits at most, whatever a Blob does: one that is stuck goes on by itself, and its read fails. 0: no bound.
	Limit time.Duration
	// Log is told of reads that failed; nil: nobody.
	Log *zap.Logger
}

// Server answers one connection. Run is called once; Close may overlap with it.
type Server struct {
	c      Config
	fd     int
	ctx    context.Context //nolint:containedctx // its life: requests come from the kernel
	cancel context.CancelFunc

	begun   atomic.Bool // Run, or Close before it
	ready   *readiness  // whoever begins closes it
	leading sync.Mutex  // held by the reader that leads

	gate     sync.RWMutex // held for reading while a request is handled
	stopping atomic.Bool
	gone     atomic.Bool
	readers  sync.WaitGroup
	fetches  sync.WaitGroup
	asked    sync.WaitGroup // those of Blobs that were asked for something
	idle     func() <-chan struct{}
	ended    chan struct{} // closed when Run has returned

	slotMu    sync.Mutex
	freeSlots []uint16 // the last is taken first, so that few pages are touched

	failed atomic.Int64
	warned atomic.Int64 // when a read from the connection failed last that was logged, in ns since 1970
}

// NewServer returns a server that has not read anything yet; the device need not be mounted before Run. The caller calls Close, unless Run has returned. It is an error when the
// process has no descriptor or no memory left.
func NewServer(c Config) (*Server, error) {
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	s := &Server{c: c, fd: int(c.Device.Fd()), ended: make(chan struct{})}
	var err error
	if s.ready, err = newReadiness(); err != nil {
		return nil, err
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.idle = sync.OnceValue(func() <-chan struct{} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.asked.Wait()
		}()
		return done
	})
	s.freeSlots = make([]uint16, 0, slots)
	used := c.Table.used()
	for n := slots - 1; n >= 0; n-- {
		if n >= used || !c.Table.pending(n) {
			s.freeSlots = append(s.freeSlots, uint16(n))
		}
	}
	return s, nil
}

// Run goes on with what is pending in the table, then answers requests until the connection has ended, which is no error,
// or Close is called. What is pending at that moment stays in the table. Another error is one of the connection: nothing is answered any more, and
// to close the device is left to do, since readers would wait for ever.
func (s *Server) Run() error {
	if s.begun.Swap(true) {
		return nil // it was closed
	}
	defer close(s.ended)
	defer s.fetches.Wait()
	defer func() { _ = s.ready.close() }() // nothing is written to it
	stop := context.AfterFunc(s.ctx, s.ready.wake)
	defer stop()
	if err := s.ready.watch(s.fd); err != nil {
		s.cancel()
		return err
	}
	s.takeOver()
	errs := make(chan error, inboxes)
	for n := range inboxes {
		s.readers.Go(func() { errs <- (&reader{s: s, n: n}).serve() })
	}
	s.readers.Wait()
	stopped := s.stopping.Load()
	s.cancel()
	close(errs)
	if stopped {
		return nil
	}
	var all []error
	for err := range errs {
		all = append(all, err)
	}
	return errors.Join(all...)
}

// Gone reports whether the connection has ended.
func (s *Server) Gone() bool { return s.gone.Load() }

// Ended is closed when Run has returned.
func (s *Server) Ended() <-chan struct{} { return s.ended }

// Failed returns how many requests got an error because data was not to be had.
func (s *Server) Failed() int64 { return s.failed.Load() }

// Close makes the server stop: when it returns nothing is handled any more, and nothing of the blobs is used. It is [ErrStuck] when a Blob
// does not return although its context has ended: such blobs must stay what they are. Requests that wait stay pending. Until
// [Server.Ended] is closed, which takes a moment, table and device must stay open, and nobody else may go on with the connection.
func (s *Server) Close() error {
	s.stopping.Store(true)
	s.cancel()
	var err error
	if !s.begun.Swap(true) {
		err = s.ready.close()
		close(s.ended)
	}
	s.gate.Lock()
	s.gate.Unlock() //nolint:staticcheck // waits for who handles a request
	s.fetches.Wait()
	limit := time.NewTimer(stuckLimit)
	defer limit.Stop()
	select {
	case <-s.idle():
		return err
	case <-limit.C:
		return errors.Join(err, ErrStuck)
	}
}

// Idle is closed when nothing that was asked of a Blob is on its way any more. It may be called after Close alone.
func (s *Server) Idle() <-chan struct{} { return s.idle() }

// ErrStuck is returned for something that ignores the end of its context.
var ErrStuck = errors.New("what fetches for a read does not end")

// stuckLimit is how long after the end of its context it may.
const stuckLimit = 2 * time.Second

// reader reads requests into an inbox of its own. One of them leads: it waits for requests, answers what costs little, and goes on waiting; before
// anything that may take time it lets another lead.
type reader struct {
	s     *Server
	n     int // inbox
	leads bool
	busy  bool // it has answered the last request
	near  follower
}

// lead makes r the one that waits.
func (r *reader) lead() {
	if !r.leads {
		r.s.leading.Lock()
		r.leads = true
	}
}

// yield lets another lead. A nil reader never does.
func (r *reader) yield() {
	if r != nil && r.leads {
		r.leads = false
		r.s.leading.Unlock()
	}
}

// serve reads and answers requests until the connection ends or the server stops.
func (r *reader) serve() error {
	defer r.yield()
	s, in := r.s, r.s.c.Table.inbox(r.n)
	for {
		r.lead()
		if err := s.ready.wait(r.busy); err != nil || s.stopping.Load() || s.gone.Load() {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = nil // Close was called
			}
			return err
		}
		size, err := unix.Read(s.fd, in)
		r.busy = err == nil
		switch {
		case err == nil:
			if !r.handle(in[:size]) {
				return nil
			}
		case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ECONNABORTED):
			s.gone.Store(true)
			return nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOENT):
		case errors.Is(err, unix.EBADF), errors.Is(err, unix.EPERM): // it is no connection
			return fmt.Errorf("read from /dev/fuse: %w", err)
		default:
			s.pause(err)
		}
	}
}

// pause lets an error of a read pass, like ENOMEM: who gave up would leave everybody waiting. It leads on: the others would see the same.
func (s *Server) pause(err error) {
	now, last := time.Now().UnixNano(), s.warned.Load()
	if now-last >= int64(10*time.Second) && s.warned.CompareAndSwap(last, now) {
		s.c.Log.Error("read from /dev/fuse; it is tried again", zap.Error(err))
	}
	select {
	case <-s.ctx.Done():
	case <-time.After(10 * time.Millisecond):
	}
}

// handle answers the request in the inbox, or gives it a slot. false: the server stops, and the request stays pending.
func (r *reader) handle(in []byte) bool {
	s := r.s
	s.gate.RLock()
	defer s.gate.RUnlock()
	if s.stopping.Load() {
		return false
	}
	h := view[fuse.InHeader](in)
	if h == nil {
		s.c.Log.Error("a request of the kernel is short", zap.Int("bytes", len(in)))
		return true
	}
	if h.Opcode != opRead {
		s.simple(h, in)
	} else if !s.read(r, view[fuse.ReadIn](in), h) {
		return false
	}
	pid, small := h.Pid, false
	if in := view[fuse.ReadIn](in); h.Opcode == opRead && in != nil {
		small = in.Size <= cheapLimit
	}
	s.c.Table.clearInbox(r.n)
	if r.leads {
		r.near.saw(pid, small, s.ready.gap)
	}
	return true
}

// takeOver handles what another process left.
func (s *Server) takeOver() {
	s.gate.RLock()
	defer s.gate.RUnlock()
	if s.stopping.Load() {
		return
	}
	for n := range s.c.Table.used() {
		if in := view[fuse.ReadIn](s.c.Table.slot(n)); s.c.Table.pending(n) {
			s.fetch(n, *in)
		}
	}
	for n := range inboxes {
		in := s.c.Table.inbox(n)
		h := view[fuse.InHeader](in)
		if h.Length == 0 {
			continue
		}
		if size := int(h.Length); size < sizeInHeader || size > len(in) {
			s.c.Log.Error("a request that another process read is broken", zap.Uint32("bytes", h.Length))
		} else if h.Opcode != opRead {
			s.simple(h, in[:size])
		} else if !s.read(nil, view[fuse.ReadIn](in[:size]), h) {
			return
		}
		s.c.Table.clearInbox(n)
	}
}

// takeSlot returns a free slot, false when there is none.
func (s *Server) takeSlot() (int, bool) {
	s.slotMu.Lock()
	defer s.slotMu.Unlock()
	last := len(s.freeSlots) - 1
	if last < 0 {
		return 0, false
	}
	n := s.freeSlots[last]
	s.freeSlots = s.freeSlots[:last]
	return int(n), true
}

func (s *Server) giveBack(n int) {
	s.c.Table.free(n)
	s.slotMu.Lock()
	defer s.slotMu.Unlock()
	s.freeSlots = append(s.freeSlots, uint16(n)) //nolint:gosec // below slots
}

// send gives an answer to the kernel. A request that it does not know any more was answered before, or nobody waits for it.
func (s *Server) send(p []byte) {
	for {
		_, err := unix.Write(s.fd, p)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EPERM):
		default:
			s.c.Log.Error("an answer to the kernel failed", zap.Int("bytes", len(p)), zap.Error(err))
			if len(p) > sizeOutHeader { // who waits for it must not wait for ever
				putHeader(p, view[fuse.OutHeader](p).Unique, int32(unix.EIO), sizeOutHeader)
				p = p[:sizeOutHeader]
				continue
			}
		}
		return
	}
}

// fail answers with an errno, 0 for an answer that has nothing else in it.
func (s *Server) fail(unique uint64, errno unix.Errno) {
	var p [sizeOutHeader]byte
	putHeader(p[:], unique, int32(errno), sizeOutHeader) //nolint:gosec // an errno
	s.send(p[:])
}
