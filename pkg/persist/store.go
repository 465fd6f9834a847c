package persist

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/headstart-oci/headstart/internal/atomicfile"
)

// KeepLists is how many native lists of one image and platform a [Store] keeps.
const KeepLists = 32

const (
	tempDir  = ".tmp"  // below the store; upstream's names never begin with a dot
	listsDir = "lists" // native lists: lists/DIGEST/PLATFORM/CONTAINER.list
	listExt  = ".list"
	csvExt   = ".csv"
	jsonExt  = ".json"
	lossExt  = ".incomplete" // beside upstream's files: they come from a list with loss, and with which
)

// Store keeps lists in a directory: the native list of every run, and for the image's
// reference the files that upstream's optimizer would have written. Every file appears
// whole or not at all, and none is written outside the directory, whatever an image
// or a container is called. A Store is safe for concurrent use; several processes may
// have one on the same directory.
type Store struct {
	dir  string
	root *os.Root
	// mu makes the files of one Save follow each other and guards the pruning.
	mu sync.Mutex
}

// SaveOptions are upstream's settings for the files at upstream's names.
type SaveOptions struct {
	// Readable makes the table show sizes and times with units.
	Readable bool
	// Overwrite replaces files that are there; without it they stay as they are, unless
	// they came from a list with loss.
	Overwrite bool
	// Partial says that the list lacks the start of the container: it replaces no list of the whole run, which
	// is kept under another name, and no file that is there unless Overwrite says so.
	Partial bool
	// Timeout is the recording's time limit. From 1 s on, the files get a second name
	// that says so, as upstream gives them.
	Timeout time.Duration
}

// Saved tells what [Store.Save] wrote, as paths that begin with the store's directory.
type Saved struct {
	Native string // the native list
	// Paths, CSV and JSON are upstream's path list, its table and Nydus' JSON; empty when
	// they were there and were kept.
	Paths, CSV, JSON string
	// OmittedPaths, OmittedCSV and OmittedJSON count accesses whose path the format cannot
	// hold: with a newline, with a carriage return and newline, not UTF-8.
	OmittedPaths, OmittedCSV, OmittedJSON int
}

// OpenStore opens the store in dir, which is made when it is missing, and removes what
// killed writers left. The caller closes it.
func OpenStore(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("open list store: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open list store: %w", err)
	}
	s := &Store{dir: dir, root: root}
	if err := errors.Join(root.MkdirAll(tempDir, 0o755), atomicfile.Clean(root, tempDir)); err != nil {
		return nil, errors.Join(fmt.Errorf("open list store %s: %w", dir, err), root.Close())
	}
	return s, nil
}

// Close gives the directory back. It does not wait for a Save.
func (s *Store) Close() error { return s.root.Close() }

// Save writes l: its native list, which replaces one of the same image, platform and
// container, then the files at upstream's names when the reference is one. The oldest
// native lists of the image and platform beyond [KeepLists] go. When Save fails, every
// file is either the old one or the new one; what was written before the failure is in
// the result. A list beyond the format's bounds is written as [List.Fit] has it. It returns
// [ErrInvalid] when [List.Validate] does.
func (s *Store) Save(l *List, o SaveOptions) (Saved, error) {
	l = l.Fit()
	s.mu.Lock()
	defer s.mu.Unlock()
	var saved Saved
	native := nativeName(l, o.Partial)
	err := s.write(native, func(w io.Writer) error { _, err := l.WriteTo(w); return err })
	if err != nil {
		return saved, fmt.Errorf("save access list: %w", err)
	}
	saved.Native = s.hostPath(native)
	err = s.saveUpstream(l, o, &saved)
	if perr := s.prune(path.Dir(native), path.Base(native)); perr != nil {
		err = errors.Join(err, fmt.Errorf("prune old lists: %w", perr))
	}
	if err != nil {
		return saved, fmt.Errorf("save access list: %w", err)
	}
	return saved, nil
}

func (s *Store) hostPath(name string) string { return filepath.Join(s.dir, filepath.FromSlash(name)) }

func (s *Store) saveUpstream(l *List, o SaveOptions, saved *Saved) error {
	name, alias, ok := upstreamNames(l.Reference)
	if !ok {
		return nil
	}
	// A link there is a short name of another image, which yields to the image's own.
	info, err := s.root.Lstat(name)
	_, lossErr := s.root.Lstat(name + lossExt)
	others := otherNames(name, alias, o.Timeout)
	if o.Overwrite || (lossErr == nil && !o.Partial) || err != nil || !info.Mode().IsRegular() {
		if err := s.writeUpstream(l, o.Readable, name, others, saved); err != nil {
			return err
		}
	}
	return s.links(name, others)
}

// otherNames returns the other names of the files at name: the short one of an official image,
// and for each name the one with the time limit.
func otherNames(name, alias string, timeout time.Duration) []string {
	names := []string{name}
	if alias != "" {
		names = append(names, alias)
	}
	if seconds := timeout / time.Second; seconds > 0 {
		for _, n := range names {
			names = append(names, fmt.Sprintf("%s.timeout%ds", n, seconds))
		}
	}
	return names[1:]
}

// writeUpstream writes the files at name. Their formats have no place for losses, so a file
// beside them, and links to it beside those at others, say that there are some: they come
// before them and go after them.
func (s *Store) writeUpstream(l *List, readable bool, name string, others []string, saved *Saved) error {
	if !l.Complete() {
		err := s.write(name+lossExt, func(w io.Writer) error {
			for _, loss := range l.Losses {
				line := fmt.Appendf(appendEscaped(nil, loss.Reason, true), " %d ", loss.Count)
				if _, err := w.Write(append(appendEscaped(line, loss.Detail, false), '\n')); err != nil {
					return err
				}
			}
			return nil
		})
		if err == nil {
			err = s.linkLoss(name, others, true)
		}
		if err != nil {
			return err
		}
	}
	err := s.write(name, func(w io.Writer) (err error) { saved.OmittedPaths, err = l.WritePaths(w); return err })
	if err != nil {
		return err
	}
	saved.Paths = s.hostPath(name)
	err = s.write(name+csvExt, func(w io.Writer) (err error) { saved.OmittedCSV, err = l.WriteCSV(w, readable); return err })
	if err != nil {
		return err
	}
	saved.CSV = s.hostPath(name + csvExt)
	err = s.write(name+jsonExt, func(w io.Writer) (err error) { saved.OmittedJSON, err = l.WriteJSON(w); return err })
	if err != nil {
		return err
	}
	saved.JSON = s.hostPath(name + jsonExt)
	if !l.Complete() {
		return nil
	}
	if err := s.linkLoss(name, others, false); err != nil {
		return err
	}
	if err := s.root.Remove(name + lossExt); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// links gives the files at name their other names.
func (s *Store) links(name string, others []string) error {
	for _, ext := range []string{"", csvExt, jsonExt} {
		for _, other := range others {
			if err := s.link(name+ext, other+ext); err != nil {
				return err
			}
		}
	}
	return nil
}

// linkLoss makes or removes the links to the losses of name beside its other names, but not where
// another image's files have one of these names.
func (s *Store) linkLoss(name string, others []string, there bool) error {
	for _, other := range others {
		if info, err := s.root.Lstat(other); err == nil && info.Mode()&fs.ModeSymlink == 0 {
			continue
		}
		var err error
		if there {
			err = s.link(name+lossExt, other+lossExt)
		} else if info, lerr := s.root.Lstat(other + lossExt); lerr == nil && info.Mode()&fs.ModeSymlink != 0 {
			err = s.root.Remove(other + lossExt)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// link makes other a relative link to name, unless other is a file of its own.
func (s *Store) link(name, other string) error {
	target, err := filepath.Rel(path.Dir(other), name)
	if err != nil {
		return err
	}
	if info, err := s.root.Lstat(other); err == nil {
		if info.Mode()&fs.ModeSymlink == 0 {
			return nil
		}
		if at, err := s.root.Readlink(other); err == nil && at == target {
			return nil
		}
	}
	if err := s.makeDirs(path.Dir(other)); err != nil {
		return err
	}
	return atomicfile.Symlink(s.root, tempDir, target, other)
}

func (s *Store) write(name string, fill func(io.Writer) error) error {
	if err := s.makeDirs(path.Dir(name)); err != nil {
		return err
	}
	return atomicfile.Write(s.root, tempDir, name, 0o644, fill)
}

// makeDirs makes dir and its parents, each durable before a file is put in it.
func (s *Store) makeDirs(dir string) error {
	if dir == "." {
		return nil
	}
	if info, err := s.root.Stat(dir); err == nil && info.IsDir() {
		return nil
	}
	if err := s.makeDirs(path.Dir(dir)); err != nil {
		return err
	}
	if err := s.root.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return atomicfile.SyncDir(s.root, path.Dir(dir))
}

// prune removes the oldest lists in dir beyond KeepLists; never the one named keep.
func (s *Store) prune(dir, keep string) error {
	entries, err := fs.ReadDir(s.root.FS(), dir)
	if err != nil {
		return err
	}
	type old struct {
		name string
		time time.Time
	}
	var others []old
	for _, e := range entries {
		if !e.Type().IsRegular() || !strings.HasSuffix(e.Name(), listExt) || e.Name() == keep {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		others = append(others, old{e.Name(), info.ModTime()})
	}
	slices.SortFunc(others, func(a, b old) int {
		return cmp.Or(b.time.Compare(a.time), cmp.Compare(a.name, b.name))
	})
	var errs []error
	for i := KeepLists - 1; i < len(others); i++ {
		if err := s.root.Remove(path.Join(dir, others[i].name)); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
