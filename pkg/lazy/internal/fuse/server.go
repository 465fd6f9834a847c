package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

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
	// Log is told of reads that failed; nil: nobody.
	Log *zap.Logger
}

// Server answers one connection. Run is called once; Close may overlap with it.
type Server struct {
	c      Config
	fd     int
	ctx    context.Context //nolint:containedctx // its life: requests come from the kernel
	cancel context.CancelFunc

	ready   *readiness // of Run
	leading sync.Mutex // held by the reader that leads

	gate     sync.RWMutex // held for reading while a request is handled
	stopping atomic.Bool
	gone     atomic.Bool
	readers  sync.WaitGroup
	fetches  sync.WaitGroup
	ended    chan struct{} // closed when Run has returned

	slotMu    sync.Mutex
	freeSlots []int // the last is taken first, so that few pages are touched

	failed atomic.Int64
}

// NewServer returns a server that has not read anything yet.
func NewServer(c Config) *Server {
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	s := &Server{c: c, fd: int(c.Device.Fd()), ended: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	for n := slots - 1; n >= 0; n-- {
		if !c.Table.pending(n) {
			s.freeSlots = append(s.freeSlots, n)
		}
	}
	return s
}

// Run goes on with what is pending in the table, then answers requests until the connection has ended, which is no error,
// or Close is called. What is pending at that moment stays in the table. Another error is one of the connection: nothing is answered any more.
func (s *Server) Run() error {
	defer close(s.ended)
	defer s.fetches.Wait()
	var err error
	if s.ready, err = newReadiness(s.fd); err != nil {
		return err
	}
	defer func() { _ = s.ready.close() }() // nothing is written to it
	stop := context.AfterFunc(s.ctx, s.ready.wake)
	defer stop()
	s.takeOver()
	errs := make(chan error, inboxes)
	for n := range inboxes {
		s.readers.Go(func() { errs <- (&reader{s: s, n: n}).serve() })
	}
	s.readers.Wait()
	if s.gone.Load() {
		s.cancel()
	}
	close(errs)
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

// Close makes the server stop: when it returns nothing is handled any more, and nothing of the blobs is used. Requests that wait
// stay pending. Until [Server.Ended] is closed, which takes a moment, the table must stay mapped, and nobody else may go on
// with the connection.
func (s *Server) Close() {
	s.stopping.Store(true)
	s.cancel()
	s.gate.Lock()
	s.gate.Unlock() //nolint:staticcheck // waits for who handles a request
	s.fetches.Wait()
}

// reader reads requests into an inbox of its own. One of them leads: it waits for requests, answers what costs little, and goes on waiting; before
// anything that may take time it lets another lead.
type reader struct {
	s     *Server
	n     int // inbox
	leads bool
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
		if err := s.ready.wait(); err != nil || s.stopping.Load() || s.gone.Load() {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = nil // Close was called
			}
			return err
		}
		size, err := unix.Read(s.fd, in)
		switch {
		case err == nil:
			if !r.handle(in[:size]) {
				return nil
			}
		case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ECONNABORTED):
			s.gone.Store(true)
			return nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOENT):
		default:
			return fmt.Errorf("read from /dev/fuse: %w", err)
		}
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
	s.c.Table.clearInbox(r.n)
	return true
}

// takeOver handles what another process left.
func (s *Server) takeOver() {
	s.gate.RLock()
	defer s.gate.RUnlock()
	if s.stopping.Load() {
		return
	}
	for n := range slots {
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
	return n, true
}

func (s *Server) giveBack(n int) {
	s.c.Table.free(n)
	s.slotMu.Lock()
	defer s.slotMu.Unlock()
	s.freeSlots = append(s.freeSlots, n)
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
