package linksim

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// wire is one direction of a link: what is sent over it leaves one after the other.
type wire struct {
	profile Profile

	mu   sync.Mutex // guards the rest
	free time.Time  // when what was sent so far has left
}

// backlog is how far ahead of the wire a sender may be. It hides that timers are late: without it the
// wire would stand idle for as long as they are.
const backlog = 2 * time.Millisecond

// send waits for the wire to have room, puts n bytes on it and returns when the last of them arrives.
func (w *wire) send(ctx context.Context, n int) (time.Time, error) {
	for {
		w.mu.Lock()
		now := time.Now()
		if room := now.Add(backlog); w.free.After(room) {
			ahead := w.free.Sub(room)
			w.mu.Unlock()
			if err := pause(ctx, ahead); err != nil {
				return time.Time{}, err
			}
			continue
		}
		if w.free.Before(now) {
			w.free = now
		}
		w.free = w.free.Add(w.profile.Transfer(int64(n)))
		at := w.free.Add(w.profile.RTT / 2)
		w.mu.Unlock()
		return at, ctx.Err()
	}
}

// piece returns how many bytes are put on the wire at once: about half a millisecond's worth, so that
// connections share it, and at least a packet of Ethernet.
func (p Profile) piece() int {
	const most = 64 << 10
	if p.BitsPerSecond == 0 {
		return most
	}
	return int(min(max(p.BitsPerSecond/8/2000, 1500), most))
}

// inFlight returns how many pieces of one direction of a connection may be on their way: as much as the
// link holds, twice, and at least a mebibyte. It is what TCP's window would be.
func (p Profile) inFlight() int {
	held := float64(p.BitsPerSecond) / 8 * p.RTT.Seconds() * 2
	return int(max(held, 1<<20))/p.piece() + 1
}

// session is one connection of a client.
type session struct {
	link   *Link
	client net.Conn

	mu     sync.Mutex // guards the rest
	server net.Conn   // nil until it is connected
	broken bool
}

// reset ends both connections, with an error for who is at their ends.
func (s *session) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = true
	for _, c := range []net.Conn{s.client, s.server} {
		if t, ok := c.(*net.TCPConn); ok && t != nil {
			_ = t.SetLinger(0)
			_ = t.Close()
		}
	}
}

func (s *session) run() {
	defer s.reset()
	// A client connects at once on this machine. What the handshake takes passes here instead.
	if pause(s.link.ctx, s.link.profile.RTT) != nil {
		return
	}
	var d net.Dialer
	c, err := d.DialContext(s.link.ctx, "tcp", s.link.server)
	if err != nil {
		return
	}
	s.mu.Lock()
	s.server = c
	broken := s.broken
	s.mu.Unlock()
	if broken {
		return
	}
	var both sync.WaitGroup
	seen := requests{found: s.link.request}
	both.Go(func() {
		if s.carry(&s.link.up, c, s.client, func(p []byte) { s.link.count(true, len(p)); seen.write(p) }) != nil {
			s.reset()
		}
	})
	both.Go(func() {
		if s.carry(&s.link.down, s.client, c, func(p []byte) { s.link.count(false, len(p)) }) != nil {
			s.reset()
		}
	})
	both.Wait()
	s.finish()
}

// finish closes the connections of a session that ended in order, so that what was written still arrives.
func (s *session) finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.broken {
		_ = s.client.Close()
		_ = s.server.Close()
	}
}

// parcel is bytes on their way.
type parcel struct {
	at   time.Time
	data []byte
}

// carry forwards what comes from one connection to the other over the wire, until its end, which it
// hands on. seen is shown every piece before it is sent.
func (s *session) carry(w *wire, to, from net.Conn, seen func([]byte)) (err error) {
	ctx, cancel := context.WithCancel(s.link.ctx)
	defer cancel()
	way := make(chan parcel, s.link.profile.inFlight())
	delivered := make(chan error, 1)
	go func() {
		err := deliver(ctx, to, way)
		if err != nil {
			s.reset() // ends the read below
		}
		cancel()
		delivered <- err
	}()
	defer func() {
		close(way)
		err = errors.Join(err, <-delivered)
	}()
	for {
		buf := make([]byte, s.link.profile.piece())
		n, rerr := from.Read(buf)
		if n > 0 {
			seen(buf[:n])
			at, err := w.send(ctx, n)
			if err != nil {
				return err
			}
			select {
			case way <- parcel{at, buf[:n]}:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if errors.Is(rerr, io.EOF) {
			return nil
		}
		if rerr != nil {
			return rerr
		}
	}
}

// deliver writes parcels when they are due, and hands the end of them on.
func deliver(ctx context.Context, to net.Conn, way <-chan parcel) error {
	for p := range way {
		if err := pause(ctx, time.Until(p.at)); err != nil {
			return err
		}
		if _, err := to.Write(p.data); err != nil {
			return err
		}
	}
	if t, ok := to.(*net.TCPConn); ok {
		return t.CloseWrite()
	}
	return nil
}
