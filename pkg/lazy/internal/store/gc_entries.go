package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/headstart-oci/headstart/internal/atomicfile"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Entry is what the state directory has of one blob.
type Entry struct {
	Name string `json:"name"` // [Blob.Name], or that of a directory that waits for its users to go
	ID   string `json:"blob"` // of the blob
	// Bytes are allocated on disk for the data file and what belongs to it.
	Bytes int64 `json:"bytes"`
	// Shared of Bytes are blocks that other files have too: where the file system can, what was borrowed takes no room.
	Shared int64 `json:"shared_bytes"`
	// Local of Total bytes are ready: uncompressed, in blocks, of what any image ever used of it.
	Local int64     `json:"local_bytes"`
	Total int64     `json:"total_bytes"`
	Used  time.Time `json:"used"` // when a mount with it began or ended last
	InUse bool      `json:"in_use"`
	// Pinned ones are never removed by age or size.
	Pinned bool `json:"pinned"`
	// Aside: a mount that lost its daemon has the file; nobody else gets it, and it goes with that mount.
	Aside   bool   `json:"aside,omitempty"`
	Damaged string `json:"damaged,omitempty"` // why nothing of it can be used

	shared []extent // Shared bytes
}

const (
	usedName = "used" // an empty file whose modification time is the last use
	pinsDir  = "pins" // one empty file for each pinned blob, by name: it outlives the blob's directory
)

// touch notes that the blob called name is used now. It is as durable as the file system's next commit, some seconds
// later: a machine that stops makes a blob look older by no more than that.
func (s *Store) touch(name string) error {
	file, now := path.Join("blobs", name, usedName), time.Now()
	err := s.root.Chtimes(file, now, now)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := s.root.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// Touch notes that the blobs called names are used now. Names of which there is nothing are left out.
func (s *Store) Touch(names ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, name := range names {
		if err := s.touch(name); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Pin keeps a blob from being removed by age or size, durably; fs.ErrNotExist when there is none called name.
func (s *Store) Pin(name string) error {
	if err := entryName(name); err != nil {
		return err
	}
	if _, err := s.root.Lstat(path.Join("blobs", name)); err != nil {
		return fmt.Errorf("pin %s: %w", name, err)
	}
	f, err := s.root.OpenFile(path.Join(pinsDir, name), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("pin %s: %w", name, err)
	}
	return errors.Join(f.Close(), atomicfile.SyncDir(s.root, pinsDir))
}

// Unpin ends Pin, durably. It is no error when name was not pinned.
func (s *Store) Unpin(name string) error {
	if err := entryName(name); err != nil {
		return err
	}
	return s.remove(pinsDir, name)
}

// entryName refuses what cannot be the name of a blob's directory.
func entryName(name string) error {
	if name == "" || len(name) > 200 || strings.HasPrefix(name, ".") || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("blob name %q: %w", name, fs.ErrNotExist)
	}
	return nil
}

// Entries returns all that is there of blobs, by name. With detail, Local, Total, InUse and Damaged are filled in, which
// reads the chunk tables of blobs that are not open.
func (s *Store) Entries(detail bool) ([]Entry, error) {
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	out := make([]Entry, 0, len(names))
	sharing := s.sharing()
	for _, name := range names {
		s.mu.Lock()
		for detail && s.busy[name] { // whoever works on it has it open, and is no mount
			s.idle.Wait()
		}
		e, err := s.entry(name, detail)
		s.mu.Unlock()
		if err == nil && sharing {
			e.shared, e.Shared, err = s.extentsOf(name)
			e.Shared = min(e.Shared, e.Bytes)
			if errors.Is(err, fs.ErrNotExist) { // a directory without a data file
				err = nil
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("blob %s: %w", name, err)
		}
		out = append(out, e)
	}
	return out, nil
}

// names returns the names of all directories of blobs.
func (s *Store) names() ([]string, error) {
	list, err := fs.ReadDir(s.root.FS(), "blobs")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range list {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// entry describes one directory. The caller holds mu.
func (s *Store) entry(name string, detail bool) (Entry, error) {
	e := Entry{Name: name}
	rest, aside := strings.CutPrefix(name, asidePrefix)
	if e.Aside = aside; aside {
		rest = rest[:max(0, strings.LastIndexByte(rest, '-'))]
	}
	e.ID, _, _ = strings.Cut(rest, ".")
	files, err := fs.ReadDir(s.root.FS(), path.Join("blobs", name))
	if err != nil {
		return e, err
	}
	for _, f := range files {
		info, err := f.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return e, err
		}
		e.Bytes += allocated(info)
		if f.Name() == usedName {
			e.Used = info.ModTime()
		}
	}
	if e.Used.IsZero() {
		e.Used = newest(files)
	}
	if _, err := s.root.Lstat(path.Join(pinsDir, name)); err == nil {
		e.Pinned = true
	} else if !errors.Is(err, fs.ErrNotExist) {
		return e, err
	}
	if detail {
		s.detail(&e)
	}
	return e, nil
}

// newest is when one of files changed last.
func newest(files []fs.DirEntry) (t time.Time) {
	for _, f := range files {
		if info, err := f.Info(); err == nil && info.ModTime().After(t) {
			t = info.ModTime()
		}
	}
	return t
}

// allocated returns the bytes that a file takes on disk. Source of 512: st_blocks in inode(7).
func allocated(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}

// detail fills in what takes more than a look at inodes. The caller holds mu.
func (s *Store) detail(e *Entry) {
	if b := s.blobs[e.Name]; b != nil {
		e.InUse, e.Local, e.Total = true, b.Local(), b.Total()
		return
	}
	if e.InUse = s.kept[e.Name].Data != nil; !e.InUse {
		used, err := s.used(e.Name)
		if err != nil {
			e.Damaged = err.Error()
		}
		e.InUse = used
	}
	if e.Aside {
		return
	}
	durable, recs, err := s.state(e.Name)
	if err != nil {
		e.Damaged = err.Error()
		return
	}
	for i := range recs {
		r := &recs[i]
		e.Total += int64(r.end()-r.first()) * BlockSize //nolint:gosec // at most maxBlocks
		if covered(durable, recs[i:i+1]) {
			e.Local += int64(r.end()-r.first()) * BlockSize //nolint:gosec // at most maxBlocks
		}
	}
}

// used reports whether anybody has the data file called name open, which nobody here has. The caller holds mu.
func (s *Store) used(name string) (bool, error) {
	f, err := s.root.OpenFile(path.Join("blobs", name, "data"), os.O_RDWR, 0)
	if err != nil {
		return false, err
	}
	return inUse(f), f.Close()
}

// state reads the durable state of a blob.
func (s *Store) state(name string) (durable []uint64, recs []chunkRecord, err error) {
	dir, err := s.root.OpenRoot(path.Join("blobs", name))
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	id, err := blobOf(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("chunks: %w: %w", errCorrupt, err)
	}
	size, recs, err := readTable(dir, id)
	if err != nil {
		return nil, nil, err
	}
	info, err := dir.Stat("data")
	if err != nil {
		return nil, nil, err
	}
	durable, err = readReady(dir, id, size, info.Size())
	return durable, recs, err
}

// ErrUnknownDigest is returned for a data file of which nobody can tell, by its name and its table, what its bytes should be.
var ErrUnknownDigest = errors.New("digests are of a kind that is not known")

// describe finds out which blob the directory called name has, by its name and its table.
func (s *Store) describe(name string) (b rafs.Blob, err error) {
	dir, err := s.root.OpenRoot(path.Join("blobs", name))
	if err != nil {
		return b, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if _, err := dir.Stat("data"); err != nil {
		return b, err
	}
	id, err := blobOf(dir)
	if err != nil {
		return b, fmt.Errorf("chunks: %w: %w", errCorrupt, err)
	}
	b.ID, _, _ = strings.Cut(name, ".")
	for _, b.Digester = range []rafs.Digester{rafs.DigesterBLAKE3, rafs.DigesterSHA256} {
		for _, b.Compressor = range []rafs.Compressor{rafs.CompressorNone, rafs.CompressorLZ4, rafs.CompressorGzip, rafs.CompressorZstd} {
			if identity(b) == id {
				size, _, err := readTable(dir, id)
				b.UncompressedSize = size
				return b, err
			}
		}
	}
	if _, _, err := readTable(dir, id); err != nil {
		return b, err
	}
	return b, ErrUnknownDigest
}

// openNamed opens a blob that is there as its own table describes it; a mount may share it. fs.ErrNotExist when
// there is none, errCorrupt when nothing of it can be used, [ErrInUse] when its descriptors are kept for somebody who has not come yet.
func (s *Store) openNamed(name string) (*Blob, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.busy[name] {
		s.idle.Wait()
	}
	if open := s.blobs[name]; open != nil {
		open.refs++
		return open, nil
	}
	if s.kept[name].Data != nil {
		return nil, ErrInUse
	}
	of, err := s.describe(name)
	if err != nil {
		return nil, err
	}
	b, err := s.load(name, of, nil)
	if err != nil {
		return nil, err
	}
	s.blobs[name] = b
	b.refs = 1
	return b, nil
}

// openUnmarked opens the data file anew when it was opened with a mark on it, of a process whose descriptors were lost: all that is written through such a
// descriptor is an event. Nobody else has the file open, or all of it is there.
func (b *Blob) openUnmarked(dir *os.Root) error {
	if b.store.unmark == nil {
		return nil
	}
	had, err := b.store.unmark(b.data)
	if err != nil || !had {
		return err
	}
	f, _, err := openData(dir)
	if err != nil {
		return err
	}
	old := b.data
	b.data = f
	return old.Close()
}
