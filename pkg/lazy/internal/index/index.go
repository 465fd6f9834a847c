package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"go.uber.org/zap"
)

// Errors of this package; others are those of the file.
var (
	// ErrBroken: the file is not what this package writes. From then on every call returns it, until [Index.Reset].
	ErrBroken = errors.New("the index of chunks is broken")
	// ErrClosed: the index was closed.
	ErrClosed = errors.New("the index of chunks is closed")
)

// Options configures [Open]; the zero value is the default.
type Options struct {
	Log *zap.Logger // is told when an index is begun anew; nil: nobody
}

// Index is an open index. Safe for concurrent use.
type Index struct {
	path string
	log  *zap.Logger

	mu     sync.RWMutex // held for writing while there is no file, or another one
	db     *bolt.DB     // nil: there is no file, which is closed, or broken
	closed bool

	broken atomic.Bool
	calls  atomic.Uint64
	torn   atomic.Bool // the file's own locks may be held for ever: it cannot be closed
	fresh  atomic.Bool

	beginMu sync.Mutex // held while a view begins
	changes sync.Mutex // held by who changes the index, for a step

	namesMu sync.RWMutex // guards what follows
	contents
}

// buckets of the file.
var (
	bucketMeta   = []byte("meta")
	bucketChunks = []byte("chunks") // key: places
	bucketCaches = []byte("caches") // id: cache
	bucketLists  = []byte("lists")  // id, sequence: the keys that one call added for the cache
	keyVersion   = []byte("version")
	keyLast      = []byte("last")
)

// Open opens the index in the file at path, of which this process must be the only user, and makes it where it is missing.
// One that is damaged or of another version is thrown away: [Index.Fresh]. One that cannot be opened now, such as by somebody else's lock or
// a full disk, stays as it is. The caller closes it.
func Open(path string, o Options) (*Index, error) {
	x := &Index{path: path, log: o.Log}
	if x.log == nil {
		x.log = zap.NewNop()
	}
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		x.fresh.Store(true)
	} else if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	err = x.open()
	if err != nil && !x.fresh.Load() && (damaged(err) || info.IsDir() || info.Size() < least()) {
		x.log.Warn("begin the index of chunks anew", zap.String("path", path), zap.Error(err))
		err = x.Reset()
	}
	if err != nil {
		return nil, err
	}
	return x, nil
}

// least is the size of the smallest file that can be one of bbolt's, in bytes: it refuses less than two pages with an error of no kind.
func least() int64 { return 2 * int64(os.Getpagesize()) }

// damaged reports whether an error of opening the file is one of what it has, which time does not heal.
func damaged(err error) bool {
	for _, sign := range []error{ErrBroken, berrors.ErrInvalid, berrors.ErrVersionMismatch, berrors.ErrChecksum, io.ErrUnexpectedEOF, io.EOF} {
		if errors.Is(err, sign) {
			return true
		}
	}
	return false
}

// mapped is how much address space is taken for the file at once: beyond it, readers and the writer wait for each other when it grows.
const mapped = 1 << 30

// contents is what is kept in memory of a file.
type contents struct {
	caches map[uint32]*cache
	names  map[string]*cache // those that are not dying
	last   uint32            // id that was given last; none is given twice
}

// lockLimit is how long a new process waits for the file's lock: one that ends has it until its last thread is gone, and a child that another
// process forks until its execve.
const lockLimit = 10 * time.Second

// open opens the file. The caller is alone, or holds mu.
func (x *Index) open() (err error) {
	got := contents{caches: map[uint32]*cache{}, names: map[string]*cache{}}
	var db *bolt.DB
	err = shield(func() (err error) {
		db, err = bolt.Open(x.path, 0o600, &bolt.Options{Timeout: lockLimit, InitialMmapSize: mapped, FreelistType: bolt.FreelistMapType})
		return err
	})
	if err != nil {
		return fmt.Errorf("index %s: %w", x.path, err)
	}
	if err := shield(func() error { return db.Update(func(tx *bolt.Tx) error { return x.load(tx, &got) }) }); err != nil {
		return errors.Join(fmt.Errorf("index %s: %w", x.path, err), shield(db.Close))
	}
	if wasted(db) {
		return errors.Join(fmt.Errorf("index %s: %w: most of it is free", x.path, ErrBroken), shield(db.Close))
	}
	x.namesMu.Lock()
	got.last = max(got.last, x.last) // who works on a cache of the file before must not meet another one of its number
	x.contents = got
	x.namesMu.Unlock()
	x.db = db
	x.broken.Store(false)
	return nil
}

// load reads what is kept in memory, and makes the buckets of a new file.
func (x *Index) load(tx *bolt.Tx, got *contents) error {
	meta, err := tx.CreateBucketIfNotExists(bucketMeta)
	if err != nil {
		return err
	}
	v := meta.Get(keyVersion)
	if want := []byte{version}; v == nil && x.fresh.Load() {
		err = meta.Put(keyVersion, want)
	} else if !bytes.Equal(v, want) {
		err = fmt.Errorf("%w: version %x, want %x", ErrBroken, v, want)
	}
	if err != nil {
		return err
	}
	for _, name := range [][]byte{bucketChunks, bucketCaches, bucketLists} {
		if _, err := tx.CreateBucketIfNotExists(name); err != nil {
			return err
		}
	}
	if v := meta.Get(keyLast); len(v) == 4 {
		got.last = binary.BigEndian.Uint32(v)
	}
	return tx.Bucket(bucketCaches).ForEach(func(k, v []byte) error {
		c, err := parseCache(k, v)
		if err != nil {
			return err
		}
		got.last = max(got.last, c.id)
		got.caches[c.id] = c
		if !c.dying {
			got.names[c.name] = c
		}
		return nil
	})
}

// Fresh reports whether the index was begun anew, by Open or [Index.Reset], and is to be filled from what caches
// say; [Index.Filled] ends that.
func (x *Index) Fresh() bool { return x.fresh.Load() }

// Filled says that the index has been filled.
func (x *Index) Filled() { x.fresh.Store(false) }

// Broken reports whether calls return [ErrBroken].
func (x *Index) Broken() bool { return x.broken.Load() }

// Reset throws everything away and begins anew. It waits for calls that are running. On an error there is no file, nothing is in the index, and calls return
// [ErrBroken] until a Reset succeeds.
func (x *Index) Reset() error {
	x.changes.Lock()
	defer x.changes.Unlock()
	return x.reset()
}

// reset is Reset for who holds changes.
func (x *Index) reset() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return ErrClosed
	}
	if err := x.drop(); err != nil {
		x.log.Warn("close a broken index", zap.Error(err))
	}
	x.namesMu.Lock()
	x.contents = contents{last: x.last} // also if there will be no file
	x.namesMu.Unlock()
	x.fresh.Store(true)
	if err := os.RemoveAll(x.path); err != nil {
		return fmt.Errorf("index: %w", err)
	}
	return x.open()
}

// small is a file that is not worth being made smaller, in bytes.
const small = 1 << 20

// Shrink begins anew when the index has nothing and its file is large: the file never gets smaller by itself.
func (x *Index) Shrink() error {
	x.changes.Lock()
	defer x.changes.Unlock()
	x.namesMu.RLock()
	empty := len(x.caches) == 0
	x.namesMu.RUnlock()
	if !empty || x.Size() <= small || x.Fresh() {
		return nil
	}
	if err := x.reset(); err != nil {
		return err
	}
	x.Filled() // there was nothing
	return nil
}

// wasted reports whether most of a file that is not small is free: to fill it anew costs less than to keep it.
func wasted(db *bolt.DB) bool {
	size, free := int64(0), int64(db.Stats().FreePageN)*int64(db.Info().PageSize)
	_ = db.View(func(tx *bolt.Tx) error { size = tx.Size(); return nil })
	return size > 64*small && free > size/4*3
}

// Close closes the file. It waits for calls that are running; later ones return [ErrClosed].
func (x *Index) Close() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.closed = true
	return x.drop()
}

// drop closes the file. The caller holds mu.
func (x *Index) drop() error {
	db := x.db
	if x.db = nil; db == nil || x.torn.Swap(false) {
		return nil // of a torn one the mapping stays
	}
	return shield(db.Close)
}

// Size returns what the file takes on disk, in bytes: it is longer.
func (x *Index) Size() int64 {
	info, err := os.Stat(x.path)
	if err != nil {
		return 0
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return info.Size()
	}
	return st.Blocks * 512 // st_blocks in inode(7)
}

// shield runs f and makes an error of what a damaged file does to who reads it through a mapping: a page that is not what another one
// says, or one that is not there at all.
func shield(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = &damage{p}
		}
	}()
	return f()
}

// damage is what was met in a file.
type damage struct{ what any }

func (d *damage) Error() string        { return fmt.Sprintf("%v: %v", ErrBroken, d.what) }
func (d *damage) Is(target error) bool { return target == ErrBroken }

// view runs f with the file as it is, update with one that changes; what is broken is not used again.
func (x *Index) view(f func(*bolt.Tx) error) error {
	defer x.relieve()
	return x.look(f)
}

func (x *Index) look(f func(*bolt.Tx) error) error {
	return x.do(func(db *bolt.DB) (err error) {
		tx, err := x.begin(db)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, tx.Rollback()) }() // also while a panic passes
		return f(tx)
	})
}

// begin begins a view. A file that ends before its first page would leave the lock of all beginnings held.
func (x *Index) begin(db *bolt.DB) (*bolt.Tx, error) {
	x.beginMu.Lock()
	defer x.beginMu.Unlock()
	if x.broken.Load() {
		return nil, ErrBroken
	}
	defer x.tear()
	return db.Begin(false)
}

// tear notes that a panic is passing.
func (x *Index) tear() {
	if p := recover(); p != nil {
		x.torn.Store(true)
		x.broken.Store(true)
		panic(p)
	}
}

func (x *Index) update(f func(*bolt.Tx) error) error {
	defer x.relieve()
	return x.do(func(db *bolt.DB) error { return db.Update(f) })
}

func (x *Index) do(f func(*bolt.DB) error) error {
	x.mu.RLock()
	defer x.mu.RUnlock()
	switch {
	case x.closed:
		return ErrClosed
	case x.db == nil || x.broken.Load():
		return ErrBroken
	}
	err := shield(func() error { return f(x.db) })
	if _, met := errors.AsType[*damage](err); met {
		x.torn.Store(true)
	}
	if errors.Is(err, ErrBroken) && !x.broken.Swap(true) {
		x.log.Error("the index of chunks is not used any more", zap.Error(err))
	}
	return err
}
