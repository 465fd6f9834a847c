package lazy

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/share"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// blob is a cache file that mounts use. refs is guarded by daemon.blobMu, fillings by usedMu.
type blob struct {
	st   *store.Blob
	refs int
	// fillings are what fills it: one for each set of chunks that images use of the blob, mostly one. The list is never
	// changed, only replaced.
	fillings []*filling
	users    []*use // guarded by usedMu

	syncMu  sync.Mutex // guards what follows, and st against the end while it is synced
	closed  bool
	settled bool // complete, durable, and without a mark
	making  int  // mounts that are being made of it

	narrowed time.Time // when narrow tried last; of the janitor
}

// sync makes the blob durable, unless it is closed, which has done so.
func (b *blob) sync() error {
	b.syncMu.Lock()
	defer b.syncMu.Unlock()
	if b.closed {
		return nil
	}
	return b.st.Sync()
}

// filling fills one set of chunks.
type filling struct {
	chunks [sha256.Size]byte
	fb     *fill.Blob
	refs   int
}

// use is a mount's part in a blob.
type use struct {
	b   *blob
	f   *filling
	src fill.Source

	share   *fill.Share // of the mount
	claim   share.Claim // of the mount
	narrow  func(scope string) string
	watched bool
	making  bool // the mount is; guarded by b.syncMu
}

// begin says that an image uses the blob, and may use more of it than others, for a mount that is being made or is there.
func (u *use) begin(making bool) {
	u.b.syncMu.Lock()
	defer u.b.syncMu.Unlock()
	u.b.settled = false
	if u.making = making; making {
		u.b.making++
	}
}

// made says that a use's mount has the data file open, or will not: until then it keeps its mark, since the kernel decides when a file is opened whether it will
// ever raise events.
func (u *use) made() {
	u.b.syncMu.Lock()
	defer u.b.syncMu.Unlock()
	if u.making {
		u.making = false
		u.b.making--
	}
}

// chunkSet identifies what an image uses of a blob.
func chunkSet(chunks []rafs.Chunk) (sum [sha256.Size]byte) {
	h := sha256.New()
	var rec [8 + 4 + len(rafs.Digest{})]byte
	for i := range chunks {
		binary.LittleEndian.PutUint64(rec[:], chunks[i].UncompressedOffset)
		binary.LittleEndian.PutUint32(rec[8:], chunks[i].UncompressedSize)
		copy(rec[12:], chunks[i].Digest[:])
		_, _ = h.Write(rec[:]) // never fails
	}
	h.Sum(sum[:0])
	return sum
}

// openBlob opens the cache file of blob n of img for m and has it watched. name is that of the file which
// a mount has already, empty for a new mount. Who waits with patience for others to close the file keeps nobody else waiting.
func (d *daemon) openBlob(m *mount, img *rafs.Image, n int, src fill.Source, name string, patience store.Patience) (*use, error) {
	u, err := d.openUse(m, img, n, src, name, patience)
	for said := false; u == nil && errors.Is(err, store.ErrInUse); u, err = d.openUse(m, img, n, src, name, patience) {
		if !said {
			said = true
			d.log.Info("a data file is in use: waiting for its end", zap.String("dir", m.rec.Dir), zap.Error(err))
		}
		patience.Wait()
	}
	if err != nil && u != nil {
		err = errors.Join(err, d.letGo(m.rec.Dir, parts{uses: []*use{u}}))
		u = nil
	}
	return u, err
}

// openUse is openBlob. What it returns with an error is the caller's to let go.
func (d *daemon) openUse(m *mount, img *rafs.Image, n int, src fill.Source, name string, patience store.Patience) (u *use, err error) {
	info, chunks := img.Blobs[n], img.BlobChunks(n)
	d.blobMu.Lock()
	defer d.blobMu.Unlock()
	var st *store.Blob
	if name == "" {
		st, err = d.store.TryOpenBlob(info, chunks, patience)
	} else {
		st, err = d.store.Adopt(name, info, chunks)
	}
	if err != nil {
		return nil, err
	}
	b := d.blobs[st.Name()]
	if b == nil {
		b = &blob{st: st}
		d.usedMu.Lock()
		d.blobs[st.Name()] = b
		d.usedMu.Unlock()
	}
	b.refs++
	u = &use{b: b, src: src, share: m.share, claim: m.claim, narrow: m.narrow}
	u.begin(name == "")
	if err := d.attachSource(u, info, chunks); err != nil {
		return u, err
	}
	d.usedMu.Lock()
	b.users = append(b.users, u)
	d.usedMu.Unlock()
	if err := d.guard(b); err != nil {
		return u, err
	}
	if err := d.lendToFailed(b); err != nil {
		return u, err
	}
	if m.rec.driver() == DriverFUSE {
		return u, nil // who reads asks before
	}
	if err := d.watch.Add(b.st); err != nil {
		return u, err
	}
	u.watched = true
	return u, nil
}

// attachSource finds or makes what fills the chunks. The caller holds blobMu.
func (d *daemon) attachSource(u *use, info rafs.Blob, chunks []rafs.Chunk) error {
	set := chunkSet(chunks)
	for _, f := range u.b.fillings {
		if f.chunks == set {
			f.refs++
			f.fb.AddSource(u.src)
			u.f = f
			return nil
		}
	}
	fb, err := u.share.Open(d.cacheOf(u.b, info.Digester), u.src, info, chunks)
	if err != nil {
		return err
	}
	u.f = &filling{chunks: set, fb: fb, refs: 1}
	d.usedMu.Lock()
	defer d.usedMu.Unlock()
	u.b.fillings = append(slices.Clip(u.b.fillings), u.f)
	return nil
}

// guard keeps the descriptors of a blob. The caller holds blobMu.
func (d *daemon) guard(b *blob) error {
	name, kept := b.st.Name(), b.st.Descriptors()
	if err := errors.Join(d.link.Keep(keptData+name, kept.Data), d.link.Keep(keptBits+name, kept.Bits)); err != nil {
		return err
	}
	return nil
}

// lendToFailed has each mount that cannot be filled any more keep b as if it used it: with its last user b would lose its mark, and what is not
// there would read as zeros. Nothing is fetched for such a mount. The caller holds blobMu.
func (d *daemon) lendToFailed(b *blob) error {
	if d.watch == nil {
		return nil
	}
	return d.lend(b, d.failedWith(b.st.Name()))
}

// failedWith returns the mounts with the blob called name that cannot be filled any more and that nobody asks for when they are read.
func (d *daemon) failedWith(name string) (failed []*mount) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if m.failed != "" && !m.gone && m.rec.driver() == DriverEROFS && slices.Contains(m.rec.Blobs, name) {
			failed = append(failed, m)
		}
	}
	return failed
}

// lend has mounts keep b that cannot be filled any more. The caller holds blobMu.
func (d *daemon) lend(b *blob, failed []*mount) (err error) {
	if len(failed) == 0 {
		return nil
	}
	// Until all have it: one that ends meanwhile would take the mark away, from others too.
	if err := d.watch.Add(b.st); err != nil {
		return err
	}
	defer func() {
		_, endErr := d.watch.End(b.st)
		err = errors.Join(err, endErr)
	}()
	for _, m := range failed {
		if slices.ContainsFunc(d.blobsOf(m), func(o *blob) bool { return o == b }) {
			continue
		}
		if _, err := d.store.ReopenNow(b.st.Name()); err != nil { // closed by closeUse
			return err
		}
		if err := d.watch.Add(b.st); err != nil {
			return errors.Join(err, b.st.Close())
		}
		b.refs++
		u := &use{b: b, watched: true}
		d.usedMu.Lock()
		m.uses = append(slices.Clip(m.uses), u)
		d.usedMu.Unlock()
		if err := d.takeFromGone(m, u); err != nil {
			return err
		}
	}
	return nil
}

// takeFromGone ends a failed mount's part in a blob when the mount has ended meanwhile and does not do so itself. The caller holds blobMu.
func (d *daemon) takeFromGone(m *mount, u *use) error {
	d.mu.Lock()
	gone := m.gone
	d.mu.Unlock()
	if !gone {
		return nil
	}
	d.usedMu.Lock()
	at := slices.Index(m.uses, u)
	if at >= 0 {
		m.uses = slices.Delete(slices.Clone(m.uses), at, at+1)
	}
	d.usedMu.Unlock()
	if at < 0 {
		return nil
	}
	u.b.refs-- // there is another
	_, err := d.watch.End(u.b.st)
	return errors.Join(err, u.b.st.Close())
}

// patience is how long one set of chunks may keep a reader waiting before others are asked too, whose source may live.
const patience = 2 * time.Second

// errLimit is the error of a read that took too long.
var errLimit = errors.New("the data did not come in time")

// ensure gets what a reader of st waits for. Which of the blob's sets of chunks have it does not matter: it is there or not.
// It returns within DaemonOptions.Limit, whatever sources do.
func (d *daemon) ensure(ctx context.Context, st *store.Blob, off, n int64) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d.o.Limit, fmt.Errorf("given up after %v: %w", d.o.Limit, errLimit))
	defer cancel()
	if err := st.Confirm(ctx, off, n); err != nil {
		return err
	}
	fillings := d.fillingsOf(st)
	var err error
	if len(fillings) == 1 {
		err = notRange(fillings[0].fb.Ensure(ctx, off, n))
	} else if len(fillings) > 1 {
		err = ensureAny(ctx, st, fillings, off, n)
	}
	switch {
	case st.ReadyRange(off, n): // who calls keeps it open
		return nil
	case err != nil:
		return err
	case len(fillings) == 0:
		return fmt.Errorf("blob %s: no mount has it any more", st.ID())
	}
	return fmt.Errorf("blob %s: no mount has a source of all chunks in %d bytes at %d", st.Name(), n, off)
}

// touched says that somebody reads what is there of st: what follows may be fetched ahead of him.
func (d *daemon) touched(st *store.Blob, off, n int64) {
	if st.Complete() {
		return
	}
	for _, f := range d.fillingsOf(st) {
		f.fb.Touched(off, n)
	}
}

// ensureAny asks one of fillings after the other until all is there: the next one when one has said what it can, or takes long.
func ensureAny(ctx context.Context, st *store.Blob, fillings []*filling, off, n int64) error {
	ctx, cancel := context.WithCancel(ctx)
	var asked sync.WaitGroup
	defer asked.Wait()
	defer cancel()
	answers := make(chan error, len(fillings))
	late := time.NewTicker(patience)
	defer late.Stop()
	begun, ended := 0, 0
	next := func() {
		if begun < len(fillings) {
			f := fillings[begun]
			begun++
			asked.Go(func() { answers <- f.fb.Ensure(ctx, off, n) })
		}
	}
	var errs []error
	for next(); ended < begun; next() {
		select {
		case err := <-answers:
			ended++
			errs = append(errs, notRange(err))
			if st.ReadyRange(off, n) {
				return nil
			}
		case <-late.C:
		}
	}
	return errors.Join(errs...)
}

// notRange drops the error of a set that has no chunk there: another one has.
func notRange(err error) error {
	if errors.Is(err, fill.ErrRange) {
		return nil
	}
	return err
}

// fillingsOf returns what fills st. It waits for nobody who opens or closes blobs: every reader of every mount comes here.
func (d *daemon) fillingsOf(st *store.Blob) []*filling {
	d.usedMu.Lock()
	defer d.usedMu.Unlock()
	if b := d.blobs[st.Name()]; b != nil && b.st == st {
		return b.fillings
	}
	return nil
}
