package nriplugin

import (
	"errors"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// pagesWait is how long a container's start waits for page events when no instance is ready, before the
// tracer is started without, and gets them later: making one takes tens of milliseconds, and where many containers start
// at once the kernel makes one after the other. It leaves the tracer most of [DefaultStartDeadline].
const pagesWait = 30 * time.Millisecond

// OpenPages makes the pool that all recordings of a process get their page events from, and removes the
// instances that dead processes left. Nil means that there are none here, which is a line in the log.
// The caller calls closePages after the last recording.
func OpenPages(log *zap.Logger) (_ *tracefs.Pool, closePages func() error) {
	none := func() error { return nil }
	fs, err := tracefs.Open()
	if err == nil {
		if _, perr := fs.Probe(0); perr != nil {
			err = errors.Join(perr, fs.Close())
		}
	}
	if err != nil {
		log.Info("recordings are of whole files, not of ranges: " + oneLine(err.Error()))
		return nil, none
	}
	p, err := tracefs.NewPool(fs, tracefs.PoolOptions{Announced: true, Log: once(log)})
	if err != nil {
		log.Warn("recordings are of whole files, not of ranges: " + oneLine(errors.Join(err, fs.Close()).Error()))
		return nil, none
	}
	return p, func() error { return errors.Join(p.Close(), fs.Close()) }
}

// once logs an error unless it is the one that was logged last: the pool tries again every second.
func once(log *zap.Logger) func(error) {
	var mu sync.Mutex
	last := ""
	return func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if text := oneLine(err.Error()); text != last {
			last = text
			log.Warn("page events: " + text)
		}
	}
}
