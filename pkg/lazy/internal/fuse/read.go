package fuse

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/hanwen/go-fuse/v2/splice"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// read answers a READ at once when its data is there; else it gets a slot, and a goroutine that waits. false: it stays pending where it is.
func (s *Server) read(r *reader, in *fuse.ReadIn, h *fuse.InHeader) bool {
	if in == nil {
		s.fail(h.Unique, unix.EINVAL)
		return true
	}
	var few [4]extent
	where, n, errno := s.find(in, few[:0])
	switch {
	case errno != 0 || n == 0:
		s.fail(in.Unique, errno)
	case s.has(where):
		s.data(r, in, where, n)
	default:
		slot, ok := s.takeSlot()
		if !ok { // thousands wait: this reader does, too
			r.yield()
			return s.wait(in, slices.Clone(where), n) // which others are given: few stays here
		}
		if r != nil {
			r.busy = false
		}
		s.c.Table.put(slot, raw(in))
		s.fetch(slot, *in)
	}
	return true
}

// find returns where the data of a READ is.
func (s *Server) find(in *fuse.ReadIn, into []extent) (where []extent, n int64, errno unix.Errno) {
	node := s.c.Tree.node(in.NodeId)
	switch {
	case node == nil:
		return nil, 0, unix.ESTALE
	case node.isDir():
		return nil, 0, unix.EISDIR
	case !node.isRegular() || in.Offset > 1<<62:
		return nil, 0, unix.EINVAL
	}
	if node.size > in.Offset && min(uint64(in.Size), node.size-in.Offset) > maxRead {
		return nil, 0, unix.EIO // it was agreed on otherwise; less than what is asked for would be taken as the end of the file
	}
	where, n, ok := s.c.Tree.extents(node, int64(in.Offset), int64(in.Size), into)
	if !ok {
		return nil, 0, unix.EIO
	}
	for _, e := range where {
		if e.blob >= len(s.c.Blobs) {
			return nil, 0, unix.EIO
		}
	}
	return where, n, 0
}

func (s *Server) has(where []extent) bool {
	for _, e := range where {
		if !s.c.Blobs[e.blob].ReadyRange(e.off, e.n) {
			return false
		}
	}
	return true
}

// fetch answers the READ in slot n when its data is there. The caller holds gate.
func (s *Server) fetch(slot int, in fuse.ReadIn) {
	s.fetches.Go(func() {
		where, n, errno := s.find(&in, nil)
		if errno != 0 || n == 0 {
			s.fail(in.Unique, errno)
		} else if !s.wait(&in, where, n) {
			return // it stays pending, for the next process
		}
		s.giveBack(slot)
	})
}

// wait answers a READ when its data is there. false: the server stops, and there is no answer.
func (s *Server) wait(in *fuse.ReadIn, where []extent, n int64) bool {
	err := s.ensure(where)
	if s.ctx.Err() != nil {
		return false
	}
	if err == nil && !s.has(where) {
		err = errors.New("not ready after all")
	}
	if err != nil {
		s.failed.Add(1)
		s.c.Log.Error("a read of a lazy mount failed", zap.Uint64("inode", in.NodeId), zap.Uint64("offset", in.Offset), zap.Int64("bytes", n), zap.Error(err))
		s.fail(in.Unique, unix.EIO)
		return true
	}
	s.data(nil, in, where, n)
	return true
}

// ensure returns when all data is there, or cannot be, or does not come in time. What is stuck goes on by itself.
func (s *Server) ensure(where []extent) error {
	result := make(chan error, 1)
	s.asked.Go(func() {
		g, ctx := errgroup.WithContext(s.ctx)
		for _, e := range where {
			g.Go(func() error { return s.c.Blobs[e.blob].Ensure(ctx, e.off, e.n) })
		}
		result <- g.Wait()
	})
	var late <-chan time.Time
	if s.c.Limit > 0 {
		limit := time.NewTimer(s.c.Limit)
		defer limit.Stop()
		late = limit.C
	}
	select {
	case err := <-result:
		return err
	case <-s.ctx.Done():
		return s.ctx.Err()
	case <-late:
		return fmt.Errorf("%w after %v", ErrStuck, s.c.Limit)
	}
}

// copying is held by those who answer with data and are no reader, in all servers of the process: it bounds what their copies take to 16 MiB.
var copying = make(chan struct{}, 32)

// data answers with what the cache files have. A reader that leads lets another lead before it answers with what is large, or has to come from
// the disk, or while somebody else waits.
func (s *Server) data(r *reader, in *fuse.ReadIn, where []extent, n int64) {
	if r == nil { // thousands may begin at once
		copying <- struct{}{}
		defer func() { <-copying }()
	} else if n > cheapLimit && r.leads && (n > copyLimit || s.ready.pending()) {
		r.yield()
	}
	if n > copyLimit {
		err := s.splice(in.Unique, where, int(n))
		if err == nil {
			return
		}
		s.c.Log.Debug("a pipe is not to be had", zap.Error(err))
	}
	var p []byte
	if n <= copyLimit {
		buf := answers.Get().(*[]byte)
		defer answers.Put(buf)
		p = (*buf)[:sizeOutHeader+int(n)]
	} else {
		p = make([]byte, sizeOutHeader+int(n))
	}
	at := p[sizeOutHeader:]
	for _, e := range where {
		if err := readFull(r, int(s.c.Blobs[e.blob].File().Fd()), at[:e.n], e.off); err != nil {
			s.failed.Add(1)
			s.c.Log.Error("a cache file cannot be read", zap.Int("blob", e.blob), zap.Int64("offset", e.off), zap.Error(err))
			s.fail(in.Unique, unix.EIO)
			return
		}
		at = at[e.n:]
	}
	putHeader(p, in.Unique, 0, len(p))
	s.send(p)
}

// cheapLimit is the most that a reader that leads answers from the page cache before it looks whether somebody else waits.
const cheapLimit = 16 << 10

func readFull(r *reader, fd int, p []byte, off int64) error {
	if r != nil && r.leads {
		n, err := unix.Preadv2(fd, [][]byte{p}, off, unix.RWF_NOWAIT)
		if err == nil && n > 0 {
			p, off = p[n:], off+int64(n)
		}
		if len(p) > 0 {
			r.yield()
		}
	}
	for len(p) > 0 {
		n, err := unix.Pread(fd, p, off)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// splice answers with what the cache files have without copying it through this process. An error: nothing was answered.
func (s *Server) splice(unique uint64, where []extent, n int) error {
	pipe, err := getPipe()
	if err != nil {
		return err
	}
	whole := false
	defer func() {
		if whole {
			putPipe(pipe)
		} else {
			splice.Drop(pipe)
		}
	}()
	// A pipe has room for pages: one for the header, and each piece may begin and end in the middle of one.
	if err := pipe.Grow(n + (1+2*len(where))*blockSize); err != nil {
		return err
	}
	var h [sizeOutHeader]byte
	total := sizeOutHeader + n
	putHeader(h[:], unique, 0, total)
	if _, err := pipe.Write(h[:]); err != nil {
		return err
	}
	for _, e := range where {
		fd := s.c.Blobs[e.blob].File().Fd()
		for e.n > 0 {
			got, err := pipe.LoadFromAt(fd, int(e.n), e.off)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case err != nil:
				return err
			case got == 0:
				return io.ErrUnexpectedEOF
			}
			e.off, e.n = e.off+int64(got), e.n-int64(got)
		}
	}
	sent, err := pipe.WriteTo(uintptr(s.fd), total)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EPERM):
		return nil // nobody waits for it any more
	case err != nil:
		return err
	case sent != total:
		return fmt.Errorf("%d of %d bytes went to the kernel", sent, total)
	}
	whole = true
	return nil
}
