package lazy

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/hold"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/watch"
)

// DaemonOptions configures [RunDaemon].
type DaemonOptions struct {
	// StateDir and RunDir are those of [ClientOptions].
	StateDir, RunDir string
	// Idle is how long the daemon stays with nothing mounted; 0: 30 s. Negative: for ever, but 30 s for one that its holder has
	// started again: who started the first one starts another when it is gone.
	Idle time.Duration
	// Limit is how long a reader waits at most, whatever a backend does; 0: 60 s. Then its read fails (EIO).
	Limit time.Duration
	// Cache says what is removed of what was fetched, and CachePause how often is looked; 0: [DefaultCachePause].
	Cache      CachePolicy
	CachePause time.Duration
	// Holder is the command line of this program that calls [RunHolder], Daemon that which calls
	// RunDaemon with the same options. Both begin with the program's name.
	Holder, Daemon []string
	// Version is told to clients.
	Version string
	// Ready gets one line when the daemon listens, or why it does not, and is closed. A [Client] that
	// starts a daemon gives it as standard output. nil: nobody asks.
	Ready io.WriteCloser
	Log   *zap.Logger // nil: nothing is logged
}

// RunHolder is the holder's process: see the package's comment. It is started by [RunDaemon] alone,
// and returns when the daemon has ended for good.
func RunHolder(ctx context.Context, log *zap.Logger) error { return hold.Run(ctx, log) }

// TakesOver reports whether this process is to call [RunDaemon] at once: its holder has started it in the place of one that ended, whose
// readers and clients wait. They would wait for ever for one that asks whether a daemon runs.
func TakesOver() bool { return hold.Restarted() }

// Names of kept descriptors. Those of blobs are followed by [store.Blob.Name].
const (
	keptLock     = "lock"
	keptListener = "listener"
	keptSocket   = "socket" // the listener's file
	keptGroup    = "group"  // of events
	keptTable    = "table"  // of pending events
	keptData     = "data/"
	keptBits     = "bits/"
	keptFUSE     = "fuse/"     // connections, by mount
	keptRequests = "requests/" // pending ones of a connection
)

const defaultIdle = 30 * time.Second

// daemon is a running daemon.
type daemon struct {
	o        DaemonOptions
	log      *zap.Logger
	link     *hold.Link
	store    *store.Store
	fill     *fill.Scheduler
	group    *fanotify.Group
	table    *watch.Table
	watch    *watch.Watcher // nil where there are no events: then there are no EROFS mounts
	sharing  *sharing       // nil: mounts share no chunks
	listener *net.UnixListener
	socket   *os.File // its name's file, which nobody reads or writes
	boot     string   // the id of this boot

	probeMu         sync.Mutex // guards what follows
	noEROFS, noFUSE error      // why a driver cannot be had, nil when it can

	restarted bool // by the holder, with what an earlier daemon left
	lost      bool // not with all of it

	mu     sync.Mutex // guards what follows
	mounts map[string]*mount
	busy   int       // calls being answered
	last   time.Time // when something was mounted last, or began to be

	dropMu sync.Mutex // held by who makes chunks not ready that are wrong, until they are; taken before mount.phase
	blobMu sync.Mutex // held by who opens or closes blobs, which takes time: no reader waits for it. Taken before usedMu and mu

	usedMu sync.Mutex // guards blobs, blob.fillings and mount.uses, for a moment each; to change them takes blobMu too
	blobs  map[string]*blob

	bootMu     sync.Mutex     // guards what follows
	bootstraps map[string]int // users by digest

	keeper *keeper // of the cache
	trees  trees   // of FUSE mounts

	stuck      atomic.Bool  // something uses what this daemon has and does not end
	late       atomic.Int32 // mounts that something uses still that was to end
	calls      sync.WaitGroup
	poke       chan struct{}      // makes the janitor look at once
	collectNow chan struct{}      // and the collector
	gcAsked    atomic.Int64       // how often it was to look, at the start and later
	gcDone     atomic.Int64       // the last of these that it has done all for
	quit       context.CancelFunc // ends run
}

// RunDaemon answers the kernel and clients until nothing was mounted for a while, or ctx is done: then, with
// something mounted, the holder starts another daemon, and readers wait for it.
func RunDaemon(ctx context.Context, o DaemonOptions) error {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	d := &daemon{
		o: o, log: o.Log, mounts: map[string]*mount{}, blobs: map[string]*blob{}, bootstraps: map[string]int{}, last: time.Now(), poke: make(chan struct{}, 1), collectNow: make(chan struct{}, 1),
	}
	d.gcAsked.Store(1)
	d.o.Idle, d.o.Limit = cmp.Or(o.Idle, defaultIdle), cmp.Or(o.Limit, time.Minute)
	d.o.CachePause = cmp.Or(max(0, o.CachePause), DefaultCachePause)
	err := d.start(ctx)
	tellReady(o, err)
	if err != nil {
		// What an earlier daemon left must not be let go because this one cannot take it over: the holder tries again.
		return errors.Join(err, d.close(len(d.mounts) == 0 && (!d.restarted || nothingLives() && !d.keepsConnections())))
	}
	return d.run(ctx)
}

// tellReady tells who waits whether the daemon runs.
func tellReady(o DaemonOptions, err error) {
	if o.Ready == nil {
		return
	}
	a := answer{}
	if err != nil {
		a = failure(err)
	}
	a.Protocol, a.Version = Protocol, o.Version
	b, err := json.Marshal(a)
	if err == nil {
		_, err = o.Ready.Write(append(b, '\n'))
	}
	// Nobody may listen any more, which is no reason to end.
	if err = errors.Join(err, o.Ready.Close()); err != nil {
		o.Log.Info("nobody waits for the daemon", zap.Error(err))
	}
}

// start makes everything ready, with what an earlier daemon left, if there was one.
func (d *daemon) start(ctx context.Context) (err error) {
	if err := d.o.Cache.check(); err != nil {
		return err
	}
	if d.boot, err = bootID(); err != nil {
		return err
	}
	if err := os.MkdirAll(d.o.StateDir, 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	link, taken, err := hold.Join(hold.Options{Holder: d.o.Holder, Daemon: d.o.Daemon, Log: d.log})
	if err != nil {
		return err
	}
	d.link = link
	if d.restarted = taken.Restarted; taken.Restarted {
		if d.o.Idle < 0 {
			d.o.Idle = defaultIdle
		}
		d.lost = !taken.Whole
		d.log.Warn("taking over from a daemon that ended", zap.Int("descriptors", len(taken.Files)), zap.Bool("whole", taken.Whole))
	}
	own := newHeld(taken.Files)
	defer func() { err = errors.Join(err, own.close()) }()
	// Before anything else is opened: numbers of descriptors belong to pending events.
	guarded, err := d.startWatch(own)
	noGroup := err
	if err != nil && !absent(err) {
		return err
	}
	ci := &cacheIndex{}
	if d.store, err = store.Open(d.o.StateDir, store.Options{Lock: own.take(keptLock), Kept: own.blobs(), Index: ci, Unmark: d.unmarkOld, Log: d.log}); err != nil {
		return err
	}
	if err := d.link.Keep(keptLock, d.store.LockFile()); err != nil {
		return err
	}
	if err := d.probe(noGroup); err != nil && !d.restarted {
		return err
	}
	if err := fuse.OpenPipes(); err != nil {
		d.log.Warn("answers of FUSE mounts are copied", zap.Error(err))
	}
	d.keeper = d.keep()
	d.startSharing(ci)
	d.fill = fill.New(fill.Options{Limit: d.o.Limit - d.o.Limit/10, Log: d.log}) // a moment for its own error
	d.recover(ctx, guarded, own)
	return d.listen(own)
}

// startWatch makes the group of events, or takes over the one that an earlier daemon left; guarded tells which.
func (d *daemon) startWatch(own *held) (guarded bool, err error) {
	var table *watch.Table
	group, kept := own.take(keptGroup), own.take(keptTable)
	if group != nil {
		guarded = true
		if d.group, err = fanotify.Adopt(group); err != nil {
			return false, errors.Join(err, group.Close())
		}
	} else if d.group, err = fanotify.New(fanotify.Options{PreContent: true}); err != nil {
		return false, err
	}
	if kept != nil && guarded {
		if table, err = watch.OpenTable(kept); err != nil {
			// What it knew is pending gets an error from the watcher's first look.
			d.log.Error("pending events are lost: their readers get an error", zap.Error(err))
		} else {
			kept = nil
		}
	}
	if kept != nil {
		if err := kept.Close(); err != nil {
			return false, err
		}
	}
	if table == nil {
		if table, err = watch.NewTable(0); err != nil {
			return false, err
		}
	}
	if !guarded {
		if err := d.link.Keep(keptGroup, d.group.File()); err != nil {
			return false, err
		}
	}
	if err = d.watchWith(table); errors.Is(err, watch.ErrTable) || errors.Is(err, fanotify.ErrInvalid) {
		d.log.Error("pending events are lost: their readers get an error", zap.Error(err))
		d.table = nil
		if err = table.Close(); err == nil {
			table, err = watch.NewTable(0)
		}
		if err == nil {
			err = d.watchWith(table)
		}
	}
	return guarded, err
}

// watchWith has events watched that are kept in table, which stays for who takes over.
func (d *daemon) watchWith(table *watch.Table) (err error) {
	d.table = table
	if err := d.link.Keep(keptTable, table.File()); err != nil {
		return err
	}
	d.watch, err = watch.New(watch.Config{Group: d.group, Table: table, Ensure: d.ensure, Touched: d.touched, Limit: d.o.Limit + limitGrace, Log: d.log})
	return err
}

// limitGrace is how long a read may be late that something keeps which no context ends, like a file on a disk that hangs.
const limitGrace = time.Second

// bootID names this boot: backing devices of earlier ones mean nothing.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// held are the descriptors of an earlier daemon until somebody takes them.
type held struct{ files map[string]*os.File }

func newHeld(files map[string]*os.File) *held { return &held{files} }

// take hands out a descriptor; nil when there is none of this name.
func (h *held) take(name string) *os.File {
	f := h.files[name]
	delete(h.files, name)
	return f
}

// under hands out all descriptors whose names begin with prefix, by what follows.
func (h *held) under(prefix string) map[string]*os.File {
	found := map[string]*os.File{}
	for name, f := range h.files {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			found[rest] = f
			delete(h.files, name)
		}
	}
	return found
}

// blobs hands out the pairs of blobs.
func (h *held) blobs() map[string]store.Kept {
	kept := map[string]store.Kept{}
	bits := h.under(keptBits)
	for name, data := range h.under(keptData) {
		if b := bits[name]; b != nil {
			kept[name] = store.Kept{Data: data, Bits: b}
			delete(bits, name)
		} else {
			h.files[keptData+name] = data
		}
	}
	for name, f := range bits {
		h.files[keptBits+name] = f
	}
	return kept
}

func (h *held) close() error {
	var errs []error
	for _, f := range h.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// accept answers clients, each in a goroutine of its own.
func (d *daemon) accept(ctx context.Context) {
	for {
		c, err := d.listener.AcceptUnix()
		if err != nil {
			if ctx.Err() == nil {
				d.log.Error("accept", zap.Error(err))
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond): // out of descriptors, for instance
					continue
				}
			}
			return
		}
		d.mu.Lock()
		d.busy++
		d.mu.Unlock()
		d.calls.Go(func() {
			d.serve(ctx, c)
			d.mu.Lock()
			d.busy--
			d.mu.Unlock()
		})
	}
}
