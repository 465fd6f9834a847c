package server

import (
	"errors"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// drain handles events, the oldest first, until there are none, which it reports, or, if limit is not 0, limit were handled.
func (s *session) drain(limit int) (empty bool, err error) {
	for n := 0; limit == 0 || n < limit; {
		q := s.queues[0]
		got, err := q.group.Read(s.events)
		if errors.Is(err, fanotify.ErrEmpty) {
			if q.emptied(); len(s.queues) == 1 {
				return true, nil
			}
			s.drop(q)
			continue
		}
		if err != nil {
			return false, err
		}
		for i := range s.events[:got] {
			s.take(q, &s.events[i])
			if err := s.events[i].Close(); err != nil {
				return false, err
			}
		}
		s.digested()
		if n += got; n >= crowd {
			s.pace.end()
		}
	}
	return false, nil
}

// take handles the next event of a queue. The caller closes it.
func (s *session) take(q *queue, e *fanotify.Event) {
	s.now = q.at(s.since())
	q.taken++
	s.handle(e)
}

// digested does what has to be done after some events.
func (s *session) digested() {
	if s.lean != nil && s.lean.fresh {
		s.lean.fresh, s.touched = false, true
		s.out.send(stream.Pending{})
	}
	if s.out.full() {
		s.out.flush()
	}
}

// drop gives up the first queue, which is empty and gets no more events. The kernel takes some milliseconds for it.
func (s *session) drop(q *queue) {
	s.queues = s.queues[1:]
	s.closeQueue(q)
}

func (s *session) closeQueue(q *queue) {
	s.closing.Go(func() error {
		err := q.group.Close()
		if q.spare >= 0 {
			s.spare.give(q.spare)
		}
		return err
	})
}

// closeQueues gives up all queues.
func (s *session) closeQueues() error {
	for _, q := range s.queues {
		s.closeQueue(q)
	}
	s.queues = nil
	err := s.closing.Wait()
	if s.spare != nil {
		err = errors.Join(err, s.spare.close())
	}
	return err
}

// taken are events that were read and not closed yet.
type taken struct {
	q      *queue
	events []fanotify.Event
}

func (b *taken) close() error {
	var err error
	for i := range b.events {
		err = errors.Join(err, b.events[i].Close())
	}
	return err
}

// ahead is how many batches drainRest reads ahead at most, plus one.
const ahead = 3

// drainRest handles all events that there are. While it handles some another thread reads more, which makes the kernel open files;
// whoever is ahead of the other closes them.
func (s *session) drainRest() error {
	cool := s.cool
	s.cool = false // a group is not for two threads
	defer func() { s.cool = cool }()
	read, handled := make(chan taken, ahead), make(chan taken, ahead)
	for range ahead {
		handled <- taken{}
	}
	var err, failed error
	go func() {
		defer close(read)
		for _, q := range s.queues {
			if failed = readAll(q, read, handled); failed != nil {
				return
			}
		}
	}()
	for b := range read {
		for i := range b.events {
			s.take(b.q, &b.events[i])
		}
		s.digested()
		if len(read) == 0 {
			err = errors.Join(err, b.close())
		}
		handled <- b
	}
	close(handled)
	for b := range handled {
		err = errors.Join(err, b.close())
	}
	return errors.Join(err, failed)
}

// readAll sends what a queue has in batches to read, in the room of those that come from handled.
func readAll(q *queue, read chan<- taken, handled <-chan taken) error {
	for {
		b := <-handled
		if err := b.close(); err != nil {
			return err
		}
		events := b.events[:cap(b.events)]
		if len(events) == 0 {
			events = make([]fanotify.Event, batch)
		}
		n, err := q.group.Read(events)
		empty := errors.Is(err, fanotify.ErrEmpty)
		if err != nil && !empty {
			return err
		}
		read <- taken{q, events[:n]} // with none it is only room that somebody else may use
		if empty {
			return nil
		}
	}
}
