package store

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/atomicfile"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/shm"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Errors of this package; all answer to errors.Is.
var (
	// ErrLocked is returned when another daemon has the state directory.
	ErrLocked = errors.New("state directory is in use by another daemon")
	// ErrUnsupported is returned for blobs that EROFS cannot read from a data file.
	ErrUnsupported = errors.New("not supported by lazy mounts")
	// ErrInUse is returned for a data file that somebody else has open.
	ErrInUse = errors.New("data file is in use")
	// ErrUnknownChunk is returned by [Blob.Put] for a chunk that no image has.
	ErrUnknownChunk = errors.New("no image has this chunk")
)

// Kept are the descriptors of one blob that outlive the process.
type Kept struct {
	Data *os.File // the data file, opened before any mark was set
	Bits *os.File // the ready bits
}

// Options says how [Open] opens a state directory. The zero value is a fresh start.
type Options struct {
	// Lock is the locked file of an earlier process ([Store.LockFile]), kept together with
	// the group of its marks; nil: the lock is taken, and no mark lives. The Store owns it when Open succeeds.
	Lock *os.File
	// Kept are the descriptors of an earlier process by [Blob.Name]. Blobs that are not
	// in it have nobody who guards them. The Store owns them when Open succeeds.
	Kept map[string]Kept
	// Index is told which data files go; nil: there is none. It stays the caller's.
	Index Index
	// Unmark takes a mark of an earlier process off a data file, and reports whether there was one; nil: there are no marks.
	Unmark func(data *os.File) (bool, error)
	// Log is told what was put aside; nil: nobody.
	Log *zap.Logger
}

// Store is an open state directory. Its methods are safe for concurrent use, except for
// Close.
type Store struct {
	path  string
	root  *os.Root
	lock  *os.File
	log   *zap.Logger
	index Index

	unmark func(data *os.File) (bool, error) // nil: there are no marks
	copies atomic.Bool                       // the file system cannot share blocks: see Clone

	mu    sync.Mutex // guards what follows
	kept  map[string]Kept
	blobs map[string]*Blob
	busy  map[string]bool // blobs that are not open, and that somebody works on without mu: nobody opens them
	left  map[string]file // blobs that were open here: see foreign
	wrong sync.Map        // keys are of type file: blobs of which something was wrong; see Blob.narrow
	idle  *sync.Cond      // of mu: one is not busy any more
}

// directories below the state directory.
var directories = []string{"blobs", "bootstraps", "mounts", pinsDir}

// Open opens the state directory at path and creates it where it is missing. It returns
// [ErrLocked] while another process has it, half a second later.
//
// Without o.Lock nothing of an earlier process lives: incomplete data files that
// somebody has open are cut to nothing, so that their mounts read errors where they would
// read zeros. Whether the file system is
// fit for lazy mounts is not asked here: see [Probe].
func Open(path string, o Options) (_ *Store, err error) {
	path, err = filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	s := &Store{path: path, root: root, lock: o.Lock, log: o.Log, index: o.Index, unmark: o.Unmark, kept: map[string]Kept{}, blobs: map[string]*Blob{}, busy: map[string]bool{}, left: map[string]file{}}
	s.idle = sync.NewCond(&s.mu)
	if s.log == nil {
		s.log = zap.NewNop()
	}
	defer func() {
		if err == nil {
			s.copies.Store(!s.sharing())
		}
	}()
	if s.lock == nil {
		if s.lock, err = takeLock(root); err != nil {
			return nil, fmt.Errorf("state directory %s: %w", path, errors.Join(err, root.Close()))
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, s.lock.Close())
			}
		}()
	}
	for _, d := range directories {
		err = errors.Join(err, root.MkdirAll(d, 0o700), atomicfile.Clean(root, d))
	}
	if err == nil {
		err = s.guard(o.Kept, o.Lock == nil)
	}
	if err != nil {
		return nil, fmt.Errorf("state directory %s: %w", path, errors.Join(err, root.Close()))
	}
	maps.Copy(s.kept, o.Kept)
	return s, nil
}

// lockWait is how long Open waits for the lock: a child that another thread of the process
// forks has it from a descriptor that was just closed, until its execve(2) closes that too.
const lockWait = 500 * time.Millisecond

// takeLock locks the directory until the file is closed everywhere.
func takeLock(root *os.Root) (*os.File, error) {
	f, err := root.OpenFile("lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(lockWait); ; <-time.After(5 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if retry := errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, unix.EINTR); !retry || time.Now().After(deadline) {
			break
		}
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrLocked
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Path returns the absolute path of the state directory.
func (s *Store) Path() string { return s.path }

// Has reports whether there is a cache directory of the blob with this id.
func (s *Store) Has(id string) bool {
	_, err := s.root.Lstat(filepath.Join("blobs", id))
	return err == nil
}

// LockFile returns the descriptor that holds the lock. Whoever keeps it keeps the
// directory locked. It stays the Store's.
func (s *Store) LockFile() *os.File { return s.lock }

// Close makes all ready bits durable and closes every descriptor.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, b := range s.blobs {
		errs = append(errs, b.Sync(), b.release())
		b.refs = 0
	}
	for _, k := range s.kept {
		errs = append(errs, k.Data.Close(), k.Bits.Close())
	}
	s.blobs, s.kept = map[string]*Blob{}, map[string]Kept{}
	if s.lock != nil {
		errs = append(errs, s.lock.Close(), s.root.Close())
		s.lock = nil
	}
	return errors.Join(errs...)
}

// Adopt is [Store.OpenBlob] for the one data file called name, which a mount has that outlived its
// daemon. fs.ErrNotExist when its descriptors were not kept.
func (s *Store) Adopt(name string, b rafs.Blob, chunks []rafs.Chunk) (*Blob, error) {
	recs, err := check(b, chunks)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.blobs[name] == nil && s.kept[name].Data == nil {
		return nil, fmt.Errorf("adopt blob %s: its descriptors were not kept: %w", name, fs.ErrNotExist)
	}
	blob, err := s.openBlob(name, b, recs, false)
	if err != nil {
		return nil, fmt.Errorf("adopt blob %s: %w", name, err)
	}
	return blob, nil
}

// Unadopted returns the kept descriptors of blobs that nobody has opened since [Open], by name. They are
// the Store's.
func (s *Store) Unadopted() map[string]Kept {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.kept)
}

// Release gives kept descriptors up that nobody opened: it has unmark take the mark off the data file, and
// closes them. [ErrInUse] while somebody else has the file open, such as a mount: without the mark its holes
// would read as zeros.
func (s *Store) Release(name string, unmark func(data *os.File) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, ok := s.kept[name]
	if !ok {
		return nil
	}
	if inUse(k.Data) {
		return fmt.Errorf("release blob %s: %w", name, ErrInUse)
	}
	return s.giveUp(name, k, unmark)
}

// maxImage bounds the data files of one image, to 512 GiB: their bits are at most 16 MiB, kept twice.
const maxImage = 2 * maxBlocks

// Check refuses an image by its blobs that would take too much memory or that EROFS cannot read, before anything is
// allocated for one of them: [ErrUnsupported], as for each of them from [Store.OpenBlob].
func Check(blobs []rafs.Blob) error {
	total := uint64(0)
	for i, b := range blobs {
		if err := checkBlob(b); err != nil {
			return fmt.Errorf("blob %d of %d: %w", i, len(blobs), err)
		}
		if total += b.UncompressedSize / BlockSize; total > maxImage {
			return fmt.Errorf("%w: the first %d of %d blobs have %d bytes uncompressed, want at most %d in all", ErrUnsupported, i+1, len(blobs), total*BlockSize, uint64(maxImage)*BlockSize)
		}
	}
	return nil
}

// checkBlob refuses blobs that EROFS cannot read from a data file.
func checkBlob(b rafs.Blob) error {
	if b.ID == "" || len(b.ID) > 128 || strings.Trim(b.ID, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_") != "" {
		return fmt.Errorf("%w: blob id %q, want letters, digits, - and _", ErrUnsupported, b.ID)
	}
	if b.UncompressedSize%BlockSize != 0 || b.UncompressedSize/BlockSize > maxBlocks {
		return fmt.Errorf("%w: blob %s of %d bytes, want a multiple of %d of at most %d", ErrUnsupported, b.ID, b.UncompressedSize, BlockSize, int64(maxBlocks)*BlockSize)
	}
	return nil
}

// check returns the chunks of b as records.
func check(b rafs.Blob, chunks []rafs.Chunk) ([]chunkRecord, error) {
	if err := checkBlob(b); err != nil {
		return nil, err
	}
	recs, err := records(chunks, b.UncompressedSize)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", b.ID, err)
	}
	return recs, nil
}

// openBlob opens, loads or creates the data file called name. errConflict when it cannot
// be shared; with patience, ErrInUse for what it puts aside without. The caller holds mu.
func (s *Store) openBlob(name string, b rafs.Blob, recs []chunkRecord, patience bool) (*Blob, error) {
	for s.busy[name] {
		s.idle.Wait()
	}
	if open := s.blobs[name]; open != nil {
		// Without a mount since it was opened, by its name, somebody looks at what there is.
		if err := open.extend(b, recs, !open.used && open.opened.Load()); err != nil {
			return nil, err
		}
		open.refs++
		if !open.used {
			open.used = true
			open.touch()
		}
		return open, nil
	}
	blob, err := s.load(name, b, recs)
	if errors.Is(err, errCorrupt) && (!patience || !errors.Is(err, ErrInUse)) {
		s.log.Warn("start a blob's cache anew", zap.String("blob", name), zap.Error(err))
		if err = s.putAside(name, true); err == nil {
			blob, err = s.load(name, b, recs)
		}
	}
	if err != nil {
		return nil, err
	}
	delete(s.kept, name)
	s.blobs[name] = blob
	blob.refs, blob.used = 1, true
	blob.touch()
	return blob, nil
}

// extend makes an open blob have recs too; alone: no mount has it.
func (b *Blob) extend(of rafs.Blob, recs []chunkRecord, alone bool) error {
	if identity(of) != b.identity || of.UncompressedSize != b.blob.UncompressedSize {
		return errConflict
	}
	return b.inDir(func(dir *os.Root) error {
		_, old, err := readTable(dir, b.identity)
		if errors.Is(err, errCorrupt) { // mounts have the file: the other image gets one of its own
			return errors.Join(errConflict, err)
		}
		if err != nil {
			return err
		}
		all, added, err := merge(old, recs)
		if err != nil {
			return err
		}
		var t *table
		if alone {
			if t, all, err = b.narrow(dir, all, recs); err != nil {
				b.store.log.Info("chunks that no image needs stay in a blob", zap.String("blob", b.name), zap.Error(err))
			}
		}
		if t == nil && added {
			if t, err = writeTable(dir, b.blob, all); err != nil {
				return err
			}
		}
		return b.see(dir, t, all)
	})
}

// load opens the data file called name, or creates it, with recs. errCorrupt when what is there
// cannot be used; kept descriptors are used in any case.
func (s *Store) load(name string, of rafs.Blob, recs []chunkRecord) (_ *Blob, err error) {
	b := &Blob{store: s, name: name, blob: of, identity: identity(of), done: make(chan struct{})}
	path := filepath.Join("blobs", name)
	kept, adopted := s.kept[name]
	b.opened.Store(!adopted)
	if err := s.root.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	dir, err := s.root.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if cerr := dir.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			if adopted { // they are still the store's
				b.data, b.ready = nil, nil
			}
			err = errors.Join(err, b.release())
		}
	}()
	fresh := false
	if adopted {
		b.data = kept.Data
	} else if b.data, fresh, err = openData(dir); err != nil {
		return nil, err
	}
	if err := errors.Join(b.stat(), atomicfile.Clean(dir, ".")); err != nil {
		return nil, err
	}
	used := !fresh && !adopted && s.foreign(b)
	b.known = !adopted && !used
	old, all, err := b.loadTable(dir, recs, fresh, adopted)
	if err != nil {
		return nil, err
	}
	if err := b.loadBits(dir, kept.Bits, fresh, adopted); err != nil {
		return nil, err
	}
	if used && !covered(b.durable, old) {
		return nil, fmt.Errorf("%w: %w: incomplete, and open in a mount that nobody guards", errCorrupt, ErrInUse)
	}
	t := b.view.Load().table
	if !fresh && !adopted {
		if err := b.openUnmarked(dir); err != nil {
			return nil, err
		}
		if len(recs) > 0 { // else a look at what there is
			less, left, err := b.narrow(dir, all, recs)
			if err != nil {
				s.log.Info("chunks that no image needs stay in a blob", zap.String("blob", name), zap.Error(err))
			}
			if less != nil {
				err := t.file.Close()
				if t, all = less, left; err != nil {
					return nil, err
				}
			}
		}
	}
	b.view.Store(newView(t, all, len(b.ready.Words())))
	b.recount()
	if fresh {
		return b, atomicfile.SyncDir(s.root, "blobs")
	}
	return b, nil
}

// openData opens the data file, and creates it in a new directory.
func openData(dir *os.Root) (f *os.File, fresh bool, err error) {
	f, err = dir.OpenFile("data", os.O_RDWR, 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, false, err
	}
	f, err = dir.OpenFile("data", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	return f, true, err
}

// loadTable sets a view with the blob's table and returns the records that it had, and
// those that it has with recs.
func (b *Blob) loadTable(dir *os.Root, recs []chunkRecord, fresh, adopted bool) (old, all []chunkRecord, err error) {
	size, old, err := readTable(dir, b.identity)
	if fresh || adopted && errors.Is(err, errCorrupt) {
		// The bits of a kept file say what is there, whatever became of the table.
		size, old, err = b.blob.UncompressedSize, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	if size != b.blob.UncompressedSize {
		return nil, nil, errConflict
	}
	all, added, err := merge(old, recs)
	if err != nil {
		return nil, nil, err
	}
	var t *table
	if added || fresh || len(old) == 0 {
		t, err = writeTable(dir, b.blob, all)
	} else {
		t, err = openTable(dir, all)
	}
	if err != nil {
		return nil, nil, err
	}
	b.view.Store(&view{table: t})
	return old, all, nil
}

// loadBits sets the ready bits: the kept ones, else the durable ones.
func (b *Blob) loadBits(dir *os.Root, kept *os.File, fresh, adopted bool) error {
	words := max(1, int((b.blob.UncompressedSize/BlockSize+63)/64)) //nolint:gosec // at most maxBlocks
	durable, err := readReady(dir, b.identity, b.blob.UncompressedSize, b.written.Load())
	if fresh || adopted && errors.Is(err, errCorrupt) {
		durable, err = nil, nil
	}
	if err != nil {
		return err
	}
	b.durable = durable
	if adopted {
		info, err := kept.Stat()
		if err == nil && info.Size() != int64(words)*8 {
			err = fmt.Errorf("kept ready bits: %d bytes, want %d", info.Size(), words*8)
		}
		if err != nil {
			return err
		}
		if b.ready, err = shm.Open(kept); err == nil {
			b.claim() // what the process before has not confirmed
		}
		return err
	}
	if b.ready, err = shm.New("headstart-ready", words); err != nil {
		return err
	}
	if b.stamped = readStamp(dir); b.stamped == 0 || b.stamped != b.change() {
		b.claim()
		return nil
	}
	for i, w := range durable {
		b.ready.Words()[i].Store(w)
	}
	return nil
}
