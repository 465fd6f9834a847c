package main

import (
	"errors"

	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// recordPages is where the page events of a recording come from. The kernel takes tens of milliseconds
// to make an instance and to remove it, so that both go on beside what else there is to do.
type recordPages struct {
	fs      *tracefs.FS
	pool    *tracefs.Pool // nil: none; whole files are recorded
	opened  bool
	retired chan error // nil until retire
	closed  chan error // nil until release
}

// open begins to make an instance. Later calls do nothing.
func (p *recordPages) open(o *recordOptions) {
	if p.opened {
		return
	}
	p.opened = true
	fs, err := tracefs.Open()
	if err == nil {
		if _, perr := fs.Probe(0); perr != nil {
			err = errors.Join(perr, fs.Close())
		}
	}
	if err != nil {
		o.note("recording whole files, not ranges: %v", err)
		return
	}
	p.fs = fs
	warn := func(err error) { o.warn("page events: %v", err) }
	if p.pool, err = tracefs.NewPool(fs, tracefs.PoolOptions{Ready: 1, Max: 1, Log: warn}); err != nil {
		warn(err)
	}
}

// retire says that no further instance is needed: the one in use is removed when it is given back, beside what the
// recorder does then. Later calls do nothing.
func (p *recordPages) retire() {
	if p.retired != nil {
		return
	}
	p.retired = make(chan error, 1)
	go func() {
		var err error
		if p.pool != nil {
			err = p.pool.Close()
		}
		p.retired <- err
	}()
}

// release begins to remove what open made; nothing of it is in use any more. Later calls do nothing.
func (p *recordPages) release() {
	if p.closed != nil {
		return
	}
	p.retire()
	p.closed = make(chan error, 1)
	go func() {
		err := <-p.retired
		if p.fs != nil {
			err = errors.Join(err, p.fs.Close())
		}
		p.closed <- err
	}()
}

// close waits until nothing is left.
func (p *recordPages) close() error {
	p.release()
	return <-p.closed
}
