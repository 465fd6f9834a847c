package tracer

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
)

const (
	// maxReserve bounds the servers that stand by, some 10 MiB each, most of it shared. More containers that
	// are created at once wait for the start of their server's process.
	maxReserve = 8
	// reserveTime is how long a server stands by: from a container's creation to its start it is less than
	// a second, unless somebody creates many before he starts any.
	reserveTime = 10 * time.Second
	// standLimit is how long a server may take until it stands by.
	standLimit = 10 * time.Second
	// dismissTime is how long one that is dismissed may take to end by itself.
	dismissTime = 100 * time.Millisecond
)

// Reserve starts servers before they are needed: the start of a process takes longer than arming, and
// the container waits. All methods are safe for concurrent use, also on a nil *Reserve, which has none.
type Reserve struct {
	server string
	log    *zap.Logger
	keep   time.Duration // how long one stands by
	work   sync.WaitGroup

	// mu guards what follows.
	mu       sync.Mutex
	ready    []*process // the oldest first
	starting int
	missed   int // of those that start: the starts that they were for have come already
	closed   bool
}

// NewReserve returns a Reserve of servers of the binary at path; log may be nil. The caller closes it.
func NewReserve(server string, log *zap.Logger) *Reserve {
	if log == nil {
		log = zap.NewNop()
	}
	return &Reserve{server: server, log: log, keep: reserveTime}
}

// Expect says that Start is likely to be called once within the next seconds. It returns at once.
func (r *Reserve) Expect() {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.starting+len(r.ready) >= maxReserve {
		return
	}
	r.starting++
	r.work.Go(r.add)
}

// add starts a server, which ends by itself when this process dies.
func (r *Reserve) add() {
	p, err := standBy(r.server)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.starting--
	switch {
	case err != nil:
		r.missed = max(r.missed-1, 0)
		r.log.Debug("no server stands by", zap.Error(err)) // the start of a recording says it too
	case r.closed, r.missed > 0:
		r.missed = max(r.missed-1, 0)
		r.work.Go(p.dismiss)
	default:
		p.expiry = time.AfterFunc(r.keep, func() { r.expire(p) })
		r.ready = append(r.ready, p)
	}
}

// order has a server that stands by do what args and instance say, and returns it; nil when none does. It is the caller's from then on. One that
// is being killed at that moment may take its orders all the same, and its session ends as one whose server died.
func (r *Reserve) order(args []string, instance *os.File) *process {
	if r == nil {
		return nil
	}
	for first := true; ; first = false {
		p := r.take(first)
		if p == nil {
			return nil
		}
		err := p.order(args, instance)
		if err == nil {
			return p
		}
		r.log.Debug("a tracer that stood by is of no use", zap.Error(err))
		r.discard(p)
	}
}

// discard ends a server that was taken. Nobody waits for that but Close: a container's start may be under way.
func (r *Reserve) discard(p *process) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		go p.dismiss()
		return
	}
	r.work.Go(p.dismiss)
}

// take returns the server that has stood by longest, nil when there is none. first: a start asks for the first time.
func (r *Reserve) take(first bool) *process {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.ready) == 0 {
		if first {
			r.missed = min(r.missed+1, r.starting) // its own comes too late for it, and nobody else expects it
		}
		return nil
	}
	p := r.ready[0]
	r.ready = slices.Delete(r.ready, 0, 1)
	p.expiry.Stop()
	return p
}

// expire ends a server that nobody took.
func (r *Reserve) expire(p *process) {
	r.mu.Lock()
	i := slices.Index(r.ready, p)
	if i >= 0 {
		r.ready = slices.Delete(r.ready, i, i+1)
		r.work.Add(1)
	}
	r.mu.Unlock()
	if i >= 0 {
		p.dismiss()
		r.work.Done()
	}
}

// Close ends the servers that stand by and waits for their ends. Those that were taken go on.
func (r *Reserve) Close() {
	if r == nil {
		return
	}
	r.mu.Lock()
	r.closed = true
	rest := r.ready
	r.ready = nil
	r.mu.Unlock()
	for _, p := range rest {
		p.expiry.Stop()
		r.work.Go(p.dismiss)
	}
	r.work.Wait()
}

// standBy starts a server that waits for its orders on its standard input, a socket, and returns when it does.
func standBy(server string) (*process, error) {
	p, cmd := newProcess(server)
	cmd.Args = append(cmd.Args, "--standby")
	if err := p.start(unix.SOCK_SEQPACKET); err != nil {
		return nil, err
	}
	if err := p.standsBy(); err != nil {
		p.dismiss()
		return nil, err
	}
	return p, nil
}

// standsBy waits until the server says so.
func (p *process) standsBy() error {
	conn, ok := p.stdin.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("a tracer that is to stand by: its input is a %T, want a socket", p.stdin)
	}
	var b [64]byte
	err := conn.SetReadDeadline(time.Now().Add(standLimit))
	n := 0
	if err == nil {
		n, err = conn.Read(b[:])
	}
	if err != nil {
		return fmt.Errorf("a tracer that is to stand by: %w%s", err, quoted(p.stderr.String()))
	}
	if string(b[:n]) != stream.StandsBy {
		return fmt.Errorf("a tracer that is to stand by says %q, want %q", b[:n], stream.StandsBy)
	}
	return nil
}

// order tells a server that stands by what to do. An error means that it is of no use.
func (p *process) order(args []string, instance *os.File) error {
	conn, ok := p.stdin.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("order a tracer: its input is a %T, want a socket", p.stdin)
	}
	var rights []byte
	if instance != nil {
		rights = unix.UnixRights(int(instance.Fd()))
	}
	_, _, err := conn.WriteMsgUnix([]byte(strings.Join(args, "\x00")), rights, nil)
	return err
}

// dismiss ends a server that has no orders, and so nothing to finish, and waits for its end.
func (p *process) dismiss() {
	_ = p.stdin.Close() // which is what it waits for
	kill := time.AfterFunc(dismissTime, func() { _ = p.cmd.Process.Kill() })
	defer kill.Stop()
	_ = p.cmd.Wait() // however it ended
}
