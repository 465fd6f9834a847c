package server

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"sort"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// To handle an event takes as long as the workload's opening of the file did: a descriptor is opened and closed. A workload
// that reads files as fast as it can on a machine that has no CPU to spare would go half as fast for it. So then events stay
// in the kernel until there is some to spare, the workload ends, or it is time. And since a long queue costs the workload even
// more (see crowd), the session goes on to an empty queue of another group each time.

const (
	// rush is how many events in one look are a burst: more than 25,000 a second. Workloads that begin many short
	// processes, which have to be asked for their names while they live, stay below it.
	rush = 256
	// tickTime is how many milliseconds apart it is looked how many events there are; so exact are the times of those that are held.
	tickTime = leanRest
	// maxHold is how long events stay in the kernel, at most: what it holds is lost if the tracer dies.
	maxHold = 2 * time.Second
	// long is how many events make a queue long.
	long = 4096
	// maxQueues bounds the events that the kernel holds, at 64 bytes and a reference to the file each, and the groups: see spare.
	maxQueues = 16
)

// queue is one group with what is known of the events in it.
type queue struct {
	group *fanotify.Group
	spare int    // the number of the group among the spare ones; -1: it is the first
	ticks []tick // in order
	taken int    // events that were read
}

// tick says how many events there had been at a point in time after arming.
type tick struct {
	n  int
	at time.Duration
}

// at returns when the next event came, at the latest.
func (q *queue) at(now time.Duration) time.Duration {
	i := sort.Search(len(q.ticks), func(i int) bool { return q.ticks[i].n > q.taken })
	if i == len(q.ticks) {
		return now
	}
	return q.ticks[i].at
}

// emptied forgets what was read.
func (q *queue) emptied() { q.ticks, q.taken = q.ticks[:0], 0 }

// hold leaves the events where they are while the machine has no CPU to spare for them and they crowd. Something else that
// happens ends it; wait sees that then. fresh says that the last events were of files that were not known.
func (s *session) hold(fresh bool, wake, in int) error {
	fds := []unix.PollFd{
		{Fd: pollFD(s.t.pidfd), Events: unix.POLLIN},
		{Fd: pollFD(wake), Events: unix.POLLIN},
		{Fd: pollFD(in), Events: unix.POLLIN},
	}
	s.out.flush() // what is known is not held
	idle, before := 0, 0
	for began := time.Now(); time.Since(began) < maxHold; {
		n, err := unix.Poll(fds, tickTime)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for events: %w", err)
		}
		have, err := s.count()
		if err != nil {
			return err
		}
		if n > 0 || have-before < rush/2 {
			return nil
		}
		if before = have; have >= long {
			if !s.rotate() {
				return nil
			}
			before = 0
		}
		if fresh { // else the parent would believe that nothing was touched
			s.out.send(stream.Pending{})
			s.out.flush()
		}
		if idle++; s.busy() {
			idle = 0
		}
		if idle > 1 {
			return nil
		}
	}
	return nil
}

// count notes how many events the queue has.
func (s *session) count() (int, error) {
	q := s.current()
	n, err := q.group.Queued()
	if err != nil {
		return 0, err
	}
	q.ticks = append(q.ticks, tick{n: q.taken + n, at: s.since()})
	return n, nil
}

// current returns the queue that events come to.
func (s *session) current() *queue { return s.queues[len(s.queues)-1] }

// rotate makes events come to an empty queue and reports whether that worked. For a moment they come to both.
func (s *session) rotate() bool {
	if len(s.queues) >= maxQueues {
		return false
	}
	if s.spare == nil {
		s.spare = openSpare(s.t.proc)
	}
	number, ok := s.spare.take()
	if !ok {
		return false // others have as many as there may be
	}
	g, err := fanotify.New(fanotify.Options{})
	if err != nil {
		s.spare.give(number)
		return false
	}
	if _, err := s.t.mark(g, s.lean != nil); err != nil {
		_ = g.Close()
		s.spare.give(number)
		return false
	}
	old := s.current().group
	s.queues = append(s.queues, &queue{group: g, spare: number})
	if errors.Join(old.Flush(fanotify.Filesystem), old.Flush(fanotify.Mount)) != nil {
		return false // it goes on getting events, which costs time and nothing else
	}
	return true
}

// newGroup makes a group. Where there are as many as there may be it waits for tracers that end to give theirs up.
func newGroup() (*fanotify.Group, error) {
	for began := time.Now(); ; _, _ = unix.Poll(nil, tickTime) {
		g, err := fanotify.New(fanotify.Options{})
		switch {
		case !errors.Is(err, unix.EMFILE):
			return g, err
		case time.Since(began) > maxHold:
			return nil, fmt.Errorf("%w: this process has as many files, or its user as many fanotify groups, as it may (fs.fanotify.max_user_groups: one for each container that is recorded at a time)", err)
		}
	}
}

// busy reports whether more runs on this machine than it has CPUs, the calling thread aside. What is not known is no.
func (t *target) busy() bool {
	var b [64]byte
	n, err := unix.Pread(t.load, b[:], 0)
	return err == nil && running(b[:n]) > runtime.NumCPU()
}

// running returns how many threads run or want to, as /proc/loadavg has it, -1 when it does not.
func running(loadavg []byte) int {
	fields := bytes.Fields(loadavg) // three averages, what runs of what there is, the last process: proc(5)
	if len(fields) < 4 {
		return -1
	}
	r, _, _ := bytes.Cut(fields[3], []byte("/"))
	n, err := strconv.Atoi(string(r))
	if err != nil {
		return -1
	}
	return n
}
