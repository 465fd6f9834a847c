// Package linksim is a network link with a bandwidth and a round-trip time, in front of a server on this
// machine: tests and benchmarks put it before a real registry.
//
// A [Link] listens on the loopback interface and forwards every connection to the server. Bytes of one
// direction share the bandwidth of that direction, whatever the number of connections, in the order in
// which they come; each byte arrives half a round trip after its last bit was sent. A connection costs
// one round trip before its first byte is sent, as TCP's handshake does.
//
//	link, err := linksim.Start(registry.Host, linksim.Profile{RTT: 20 * time.Millisecond, BitsPerSecond: 100e6})
//	defer link.Close()
//	ref := link.Host() + "/app:latest"
//	…
//	fmt.Println(link.Stats().Down, "bytes in", link.Stats().Requests, "requests")
//
// What it leaves out, all of it in favour of whoever is measured: slow start, loss, TLS, and
// the 3 % that TCP's and IP's headers take.
package linksim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Profile says what a link is like. The zero value is one that costs nothing.
type Profile struct {
	// RTT is the round-trip time; 0: none.
	RTT time.Duration
	// BitsPerSecond is the bandwidth of each direction; 0: not limited.
	BitsPerSecond int64
}

// String returns the profile as it stands in tables: "20 ms, 100 Mbit/s".
func (p Profile) String() string {
	rate := "unlimited"
	switch {
	case p.BitsPerSecond >= 1e9 && p.BitsPerSecond%1e9 == 0:
		rate = fmt.Sprintf("%d Gbit/s", p.BitsPerSecond/1e9)
	case p.BitsPerSecond > 0:
		rate = fmt.Sprintf("%g Mbit/s", float64(p.BitsPerSecond)/1e6)
	}
	return fmt.Sprintf("%g ms, %s", float64(p.RTT)/float64(time.Millisecond), rate)
}

// Transfer returns how long n bytes occupy one direction of the link.
func (p Profile) Transfer(n int64) time.Duration {
	if p.BitsPerSecond == 0 {
		return 0
	}
	return time.Duration(float64(n) * 8 / float64(p.BitsPerSecond) * float64(time.Second))
}

// Stats are what has passed a link.
type Stats struct {
	Connections int   // that were accepted
	Requests    int   // HTTP/1.1 requests, seen in what clients sent
	Up, Down    int64 // bytes to the server and from it, headers of HTTP included
}

// Request is one HTTP request that passed.
type Request struct {
	At     time.Time // when its header had been read from the client
	Method string
	Target string // as in the request line
	Range  string // the Range header, empty: none
}

// maxRequests is the number of requests a link remembers; more are counted only.
const maxRequests = 1 << 16

// Link is a running link. Its methods are safe for concurrent use.
type Link struct {
	profile  Profile
	server   string
	listener net.Listener
	up, down wire
	done     sync.WaitGroup
	ctx      context.Context // of all connections; ends with Close
	stop     context.CancelFunc

	mu       sync.Mutex // guards the rest
	open     map[*session]bool
	cut      bool
	stats    Stats
	requests []Request
}

// Start returns a link to server ("127.0.0.1:5000") that listens on a free port. The caller closes it.
func Start(server string, p Profile) (*Link, error) {
	if p.RTT < 0 || p.BitsPerSecond < 0 {
		return nil, fmt.Errorf("linksim: got a round trip of %s and %d bit/s, want at least 0", p.RTT, p.BitsPerSecond)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	link := &Link{profile: p, server: server, listener: l, open: make(map[*session]bool)}
	link.up, link.down = wire{profile: p}, wire{profile: p}
	link.ctx, link.stop = context.WithCancel(context.Background())
	link.done.Go(link.accept)
	return link, nil
}

// Host returns the host and port that clients speak to.
func (l *Link) Host() string { return l.listener.Addr().String() }

// Profile returns what the link is like.
func (l *Link) Profile() Profile { return l.profile }

// Stats returns what has passed since the start or the last [Link.Reset].
func (l *Link) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stats
}

// Requests returns the HTTP requests that have passed since the start or the last [Link.Reset], in order, the
// first 65,536 of them.
func (l *Link) Requests() []Request {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]Request(nil), l.requests...)
}

// Reset sets what has passed to nothing. Connections stay.
func (l *Link) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stats, l.requests = Stats{}, nil
}

// Cut breaks the link: open connections are reset, and new ones are until [Link.Mend].
func (l *Link) Cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = true
	for s := range l.open {
		s.reset()
	}
}

// Mend takes a [Link.Cut] back.
func (l *Link) Mend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = false
}

// Close ends the link and its connections and returns when nothing of it runs. It is safe to call twice.
func (l *Link) Close() error {
	l.stop()
	err := l.listener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	l.Cut()
	l.done.Wait()
	return err
}

func (l *Link) accept() {
	for {
		c, err := l.listener.Accept()
		if err != nil {
			if l.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			// Too many open files, say: connections that wait are taken later.
			_ = pause(l.ctx, 10*time.Millisecond)
			continue
		}
		s := &session{link: l, client: c}
		if !l.add(s) {
			s.reset()
			continue
		}
		l.done.Go(func() {
			s.run()
			l.remove(s)
		})
	}
}

// add registers a connection, unless the link is cut.
func (l *Link) add(s *session) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut || l.ctx.Err() != nil {
		return false
	}
	l.open[s] = true
	l.stats.Connections++
	return true
}

func (l *Link) remove(s *session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.open, s)
}

func (l *Link) count(up bool, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if up {
		l.stats.Up += int64(n)
	} else {
		l.stats.Down += int64(n)
	}
}

func (l *Link) request(r Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stats.Requests++
	if len(l.requests) < maxRequests {
		l.requests = append(l.requests, r)
	}
}

// pause waits for d, or returns why ctx has ended.
func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
