package lazy

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/backend"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/share"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// record is what is stored about a mount, as JSON: all that a daemon needs that takes it over. It has no
// secrets; daemons of other versions ignore fields that they do not know.
type record struct {
	ID        string         `json:"id"`
	Boot      string         `json:"boot"` // BDI and Device mean something during this boot only
	BDI       string         `json:"bdi"`
	Device    uint64         `json:"device"`
	Dir       string         `json:"dir"`
	Since     time.Time      `json:"since"`
	Request   Request        `json:"request"`
	Reference string         `json:"reference"`
	Origin    backend.Origin `json:"origin"`
	Bootstrap string         `json:"bootstrap"` // sha256 of the file
	Blobs     []string       `json:"blobs"`     // names of the cache files, in the order of the table
	// Complete: everything is local and durable, and nobody has to watch any more. Total is how much that is, in bytes.
	Complete bool  `json:"complete,omitempty"`
	Total    int64 `json:"total,omitempty"`
	// Driver is empty in the records of daemons that had EROFS alone. BDIInode tells backing devices of one name apart; of FUSE mounts only.
	Driver   Driver `json:"driver,omitempty"`
	Reason   string `json:"driver_reason,omitempty"`
	BDIInode uint64 `json:"bdi_inode,omitempty"`
	// Scope is that of the image: see backend.Blobs.Scope.
	Scope string `json:"scope,omitempty"`
	// Own is what the mount may borrow from besides what is public: see backend.Blobs.Own. Empty in the records of daemons that did not tell them apart.
	Own string `json:"own_scope,omitempty"`
}

// driver is what answers the mount's reads.
func (r *record) driver() Driver { return cmp.Or(r.Driver, DriverEROFS) }

// mount is a mount of this daemon. Its fields are guarded by daemon.mu, but for those that are written before
// others see the mount and by release alone.
type mount struct {
	rec  record
	uses []*use
	src  imageSource // nil when it is closed
	run  *fill.Run

	share *fill.Share // of the memory for what is fetched
	claim share.Claim // on chunks of other mounts
	// narrow returns what has become of a scope since: see backend.Blobs.Narrow. nil: nobody knows, and nothing is lent as public.
	narrow func(scope string) string
	phase  sync.Mutex // held by who makes a mount complete, lazy again, or ends it; taken before daemon.blobMu

	conn  atomic.Pointer[connection]  // of a FUSE mount, until it ends
	stuck atomic.Pointer[fuse.Server] // of a connection that has ended, but for what fetches for it

	dir      string
	failed   string
	final    *Mount // of a complete mount: what it was when it became complete
	gone     bool
	over     chan struct{} // closed when the mount is complete, failed or gone
	ended    chan struct{} // closed when everything was given back
	overDone bool
	booted   bool // the bootstrap counts this mount as one of its users
}

// backendOptions says how the image of a request is reached.
func (d *daemon) backendOptions(r *Request) backend.Options {
	o := backend.Options{Remote: r.Remote.options(), Platform: r.Platform, TempDir: d.o.StateDir}
	o.Remote.Log = d.log
	if !r.NoPrefetch {
		o.Early = func(id string) bool { return !d.store.Has(id) }
	}
	return o
}

// open finds the image of a request.
func (d *daemon) open(ctx context.Context, r *Request) (*backend.Image, error) {
	if r.Bootstrap != "" {
		return backend.OpenFiles(r.Bootstrap, r.BlobDir)
	}
	return backend.Open(ctx, r.Reference, d.backendOptions(r))
}

// mount makes a superblock and everything behind it. The caller closes the Detached. On an error nothing is left.
func (d *daemon) mount(ctx context.Context, r *Request, dir string) (_ *mount, _ detached, err error) {
	d.mu.Lock()
	d.last = time.Now()
	d.mu.Unlock()
	if err := r.check(); err != nil {
		return nil, nil, err
	}
	img, err := d.open(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if img != nil {
			err = errors.Join(err, img.Close())
		}
	}()
	driver, why, err := d.choose(r, img)
	if err != nil {
		return nil, nil, err
	}
	if driver == DriverFUSE {
		if err := fuse.Align(img.RAFS); err != nil {
			return nil, nil, fmt.Errorf("%s: %w: %w", img.Reference, ErrUnsupported, err)
		}
	}
	if err := store.Check(img.RAFS.Blobs); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", img.Reference, err)
	}
	if err := d.store.Present(); err != nil {
		return nil, nil, fmt.Errorf("%w; unmount everything that this daemon (%d) serves, which ends it, and mount again", err, os.Getpid())
	}
	m := &mount{dir: dir, share: d.fill.Share(), over: make(chan struct{}), ended: make(chan struct{}), rec: record{
		ID: rand.Text(), Boot: d.boot, Dir: dir, Since: time.Now().UTC(), Request: *r, Reference: img.Reference, Origin: img.Origin(),
		Driver: driver, Reason: why,
	}}
	m.rec.Scope, m.rec.Own = img.Scope(), img.Own()
	m.narrow = img.Narrow
	m.claim, err = r.claim(m.rec.Scope, m.rec.Own)
	defer func() {
		if err != nil {
			err = errors.Join(err, d.end(m))
		}
	}()
	if err != nil {
		return nil, nil, err
	}
	boot, size := img.Bootstrap()
	path, sum, err := d.putBootstrap(m, boot, size)
	if err != nil {
		return nil, nil, err
	}
	m.rec.Bootstrap = sum
	tree, patience := img.RAFS, store.NewPatience()
	for n := range tree.Blobs {
		u, err := d.openBlob(m, tree, n, img.Blob(n), "", patience)
		if err != nil {
			return nil, nil, err
		}
		m.uses = append(m.uses, u)
		m.rec.Blobs = append(m.rec.Blobs, u.b.st.Name())
	}
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	detached, err := d.superblock(ctx, m, tree, path)
	if err != nil {
		return nil, nil, err
	}
	for _, u := range m.uses {
		u.made()
	}
	err = d.store.PutMount(m.rec.ID, m.rec)
	if err == nil {
		img.RAFS = nil
		m.src, err = img.Detach()
		img = nil
	}
	if err != nil {
		return nil, nil, errors.Join(err, detached.Close())
	}
	d.prefetch(m, tree)
	d.mu.Lock()
	d.mounts[m.rec.ID] = m
	d.mu.Unlock()
	return m, detached, nil
}

// detached is a mount that is attached nowhere: see [erofs.Detached].
type detached interface {
	File() *os.File
	Close() error
}

// superblock makes the superblock of m over its blobs.
func (d *daemon) superblock(ctx context.Context, m *mount, tree *rafs.Image, bootstrap string) (detached, error) {
	if m.rec.driver() == DriverFUSE {
		f, err := d.newFUSE(m, tree)
		if err != nil {
			return nil, err
		}
		m.rec.BDI, m.rec.BDIInode, m.rec.Device = f.BDI, f.BDIInode, f.Device
		return f, nil
	}
	o := erofs.Options{Bootstrap: bootstrap, ReadAhead: m.rec.readAhead()}
	for _, u := range m.uses {
		o.Devices = append(o.Devices, u.b.st.Path())
	}
	e, err := erofs.New(ctx, o)
	if err != nil {
		return nil, err
	}
	m.rec.BDI, m.rec.Device = e.BDI, e.Device
	return e, nil
}

// plan is what a mount fetches by its policy, without lists.
func (d *daemon) plan(m *mount) fill.Plan {
	background, err := m.rec.Request.background()
	if err != nil {
		background = fill.BackgroundNone // checked before; a record of another version
	}
	p := fill.Plan{Stream: -1, Background: background, Rate: m.rec.Request.Rate}
	d.usedMu.Lock()
	defer d.usedMu.Unlock()
	for _, u := range m.uses {
		p.Blobs = append(p.Blobs, u.f.fb)
	}
	return p
}

// background fetches what is missing of m by its policy, when what did is over. The caller holds its phase.
func (d *daemon) background(m *mount) {
	p := d.plan(m)
	d.mu.Lock()
	defer d.mu.Unlock()
	if p.Background != fill.BackgroundNone && len(p.Blobs) > 0 && m.run != nil && !m.gone && !m.run.Again() {
		m.run = d.fill.Start(p)
	}
}

// prefetch begins with what lists name, and with the rest by policy.
func (d *daemon) prefetch(m *mount, tree *rafs.Image) {
	p := d.plan(m)
	src := m.src
	p.Listed = func() { // what was asked for before the bootstrap was here may be of no use
		if err := src.DropEarly(); err != nil {
			d.log.Debug("end a stream that nobody wants", zap.Error(err))
		}
	}
	if !m.rec.Request.NoPrefetch {
		p.Stream = m.rec.Origin.Prefetch
		p.Table = fill.TableChunks(tree)
	}
	run := d.fill.Start(p)
	d.mu.Lock()
	m.run = run // others may see the mount already
	d.mu.Unlock()
}

// release gives back what fills a mount: it is complete, or nobody has it any more. What a complete mount
// reads from stays, with nobody in between.
func (d *daemon) release(m *mount) error {
	err := d.disconnect(m)
	d.mu.Lock()
	p := parts{run: m.run, src: m.src, server: m.stuck.Swap(nil)}
	d.mu.Unlock()
	m.src = nil
	d.usedMu.Lock()
	p.uses, m.uses = m.uses, nil
	d.usedMu.Unlock()
	return errors.Join(err, d.letGo(m.rec.Dir, p))
}

// end forgets a mount whose superblock is gone or never was, and gives back everything. Errors are of what was lost on
// the way; everything is tried. Later calls do nothing.
func (d *daemon) end(m *mount) error {
	d.mu.Lock()
	if m.gone {
		d.mu.Unlock()
		return nil
	}
	m.gone = true
	m.finish()
	d.mu.Unlock()
	err := errors.Join(d.release(m), d.store.Touch(m.rec.Blobs...), d.store.RemoveMount(m.rec.ID), d.dropBootstrap(m))
	d.mu.Lock()
	delete(d.mounts, m.rec.ID)
	d.last = time.Now()
	d.mu.Unlock()
	close(m.ended)
	d.collectSoon()
	return err
}

// putBootstrap stores the bootstrap of m, which becomes one of its users.
func (d *daemon) putBootstrap(m *mount, r io.ReaderAt, size int64) (path, sum string, err error) {
	d.bootMu.Lock()
	defer d.bootMu.Unlock()
	path, sum, err = d.store.PutBootstrap(r, size)
	if err == nil {
		m.booted = true
		d.bootstraps[sum]++
	}
	return path, sum, err
}

// dropBootstrap removes the bootstrap of m with its last user.
func (d *daemon) dropBootstrap(m *mount) error {
	d.bootMu.Lock()
	defer d.bootMu.Unlock()
	if !m.booted {
		return nil
	}
	m.booted = false
	sum := m.rec.Bootstrap
	if d.bootstraps[sum]--; d.bootstraps[sum] > 0 {
		return nil
	}
	delete(d.bootstraps, sum)
	return d.store.RemoveBootstrap(sum)
}

// finish wakes who waits for the mount to be over. The caller holds mu.
func (m *mount) finish() {
	if !m.overDone {
		m.overDone = true
		close(m.over)
	}
}

// describe is what clients are told about a mount.
func (d *daemon) describe(m *mount, detail bool) Mount {
	d.mu.Lock()
	out := Mount{
		ID: m.rec.ID, Dir: m.dir, Reference: m.rec.Reference, Digest: m.rec.Origin.Digest.String(), State: StateLazy, Error: m.failed,
		Since: m.rec.Since, Device: m.rec.Device, BDI: m.rec.BDI, Bootstrap: m.rec.Bootstrap, Blobs: len(m.rec.Blobs),
		Driver: m.rec.driver(), DriverReason: m.rec.Reason,
	}
	if m.final != nil {
		out = *m.final
		out.Dir, out.State = m.dir, StateComplete
		out.Misses = append([]Miss(nil), out.Misses...)
	}
	if m.failed != "" {
		out.State = StateFailed
	}
	run, gone := m.run, m.gone
	d.mu.Unlock()
	if !gone && out.State == StateLazy {
		d.measure(m, &out)
		out.Prefetched = run != nil && isClosed(run.Listed())
	}
	if !detail {
		out.Misses = nil
	} else if len(out.Misses) > 0 {
		d.name(m, out.Misses)
	}
	return out
}

// measure fills in what the blobs of m say.
func (d *daemon) measure(m *mount, out *Mount) {
	d.usedMu.Lock()
	uses := m.uses
	d.usedMu.Unlock()
	out.Local, out.Total, out.Stats, out.Misses = 0, 0, Stats{}, nil
	for _, u := range uses { // those that are closed meanwhile say what they had
		out.Local += u.b.st.Local()
		out.Total += u.b.st.Total()
		out.Stats.Add(u.f.fb.Stats())
		out.Misses = append(out.Misses, u.f.fb.Misses()...)
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// name finds the files of misses in the bootstrap.
func (d *daemon) name(m *mount, misses []Miss) {
	path, err := d.store.Bootstrap(m.rec.Bootstrap)
	if err == nil {
		var tree *rafs.Image
		if tree, err = readBootstrap(path); err == nil {
			fill.Name(tree, misses)
		}
	}
	if err != nil {
		d.log.Warn("names of misses", zap.Error(err))
	}
}

func readBootstrap(path string) (_ *rafs.Image, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return rafs.Open(f, info.Size())
}
