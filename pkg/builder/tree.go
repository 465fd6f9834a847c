package builder

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

const (
	maxName  = 255  // bytes of one name: NAME_MAX, and the kernel's limit for EROFS entries
	maxPath  = 4096 // bytes of a whole path: PATH_MAX; it bounds the depth of trees too
	maxLinks = 255  // symlinks followed for one path, as containerd's fs.RootPath does
)

// lowerLink is a hard link whose target no earlier entry of its layer has.
type lowerLink struct {
	name, target string
	attrs        attrs
	turn         int // of the last entry that gave it attributes, while its layer is read
}

// tree is a layer's tree, or the merged one.
type tree struct {
	root  entry
	links []*lowerLink
	turns int // entries that were or are links to them
	// shared holds the inodes that may have several names.
	shared map[*rafs.Inode]struct{}
}

func newTree() *tree {
	return &tree{root: newDir(inventedDir()), shared: map[*rafs.Inode]struct{}{}}
}

// nextTurn returns a number that is larger than those before.
func (t *tree) nextTurn() int {
	t.turns++
	return t.turns
}

func newDir(ino *rafs.Inode) entry {
	return entry{ino: ino, dir: &dir{}}
}

// inventedDir has the attributes of a directory that no entry describes.
func inventedDir() *rafs.Inode { return &rafs.Inode{Mode: unix.S_IFDIR | 0o755} }

func (e entry) isSymlink() bool { return e.ino != nil && e.ino.Mode&unix.S_IFMT == unix.S_IFLNK }

// split cuts a path that is cleaned and has no leading slash; "" and "." have no names.
func split(p string) []string {
	if p == "" || p == "." {
		return nil
	}
	return strings.Split(p, "/")
}

// locate finds the entry at name, a cleaned path without leading slash, and its path with
// symlinks resolved inside the root. The last name's symlink is followed only with follow.
// Names that do not exist are taken as they are, and the entry is then the zero value.
// This is how containerd resolves an entry's parent (continuity fs.RootPath).
func (t *tree) locate(name string, follow bool) (realPath []string, e entry, err error) {
	todo := split(name)
	links := 0
	e = t.root
	for len(todo) > 0 {
		next := todo[0]
		todo = todo[1:]
		var child entry
		if e.dir != nil {
			child = e.dir.get(next)
		}
		if !child.isSymlink() || len(todo) == 0 && !follow {
			realPath = append(realPath, next)
			e = child
			continue
		}
		if links++; links > maxLinks {
			return nil, entry{}, fmt.Errorf("%w: %q goes through more than %d symlinks", ErrInvalid, name, maxLinks)
		}
		target := child.ino.Target
		if !path.IsAbs(target) {
			target = strings.Join(realPath, "/") + "/" + target
		}
		// Cleaning below "/" keeps ".." inside the root.
		todo = slices.Concat(split(path.Clean("/" + target)[1:]), todo)
		realPath, e = nil, t.root
	}
	return realPath, e, nil
}

// mkdirs returns the directory at name, symlinks resolved, and invents what is missing.
func (t *tree) mkdirs(name string) (*dir, error) {
	names, e, err := t.locate(name, true)
	if err != nil {
		return nil, err
	}
	if e.dir != nil {
		return e.dir, nil
	}
	if err := checkNames(names); err != nil {
		return nil, err
	}
	d := t.root.dir
	for i, n := range names {
		child := d.get(n)
		if !child.exists() {
			child = newDir(inventedDir())
			d.put(strings.Clone(n), child)
		}
		if child.dir == nil {
			return nil, fmt.Errorf("%w: %q is not a directory", ErrInvalid, strings.Join(names[:i+1], "/"))
		}
		d = child.dir
	}
	return d, nil
}

// checkNames bounds a path as the kernel does.
func checkNames(names []string) error {
	total := 0
	for _, n := range names {
		if len(n) > maxName {
			return fmt.Errorf("%w: name of %d bytes, at most %d", ErrInvalid, len(n), maxName)
		}
		total += len(n) + 1
	}
	if total > maxPath {
		return fmt.Errorf("%w: path of %d bytes, at most %d", ErrInvalid, total, maxPath)
	}
	return nil
}

// merge lays the tree of a layer over t, which becomes the merged tree; upper must not be
// used afterwards. The rules are those of an overlay mount of containerd's unpacked layers:
// a directory over anything but a directory replaces it, and a directory that the layer has
// no entry for keeps the attributes it has below.
func (t *tree) merge(upper *tree) error {
	for _, l := range upper.links {
		if err := t.resolveLink(l, upper); err != nil {
			return err
		}
	}
	for ino := range upper.shared {
		t.shared[ino] = struct{}{}
	}
	if upper.root.dir.explicit {
		t.root.ino = upper.root.ino
	}
	mergeDir(t.root.dir, upper.root.dir, len(upper.links) > 0)
	return nil
}

// resolveLink finds the file of the lower layers that l names and gives it l's attributes.
func (t *tree) resolveLink(l *lowerLink, upper *tree) error {
	_, e, err := t.locate(l.target, false)
	if err != nil {
		return fmt.Errorf("entry %q: hard link to %q: %w", l.name, l.target, err)
	}
	switch {
	case e.dir != nil:
		return fmt.Errorf("entry %q: %w: hard link to directory %q", l.name, ErrInvalid, l.target)
	case e.ino == nil:
		return fmt.Errorf("entry %q: %w: hard link to %q, which neither an earlier entry nor a lower layer has", l.name, ErrInvalid, l.target)
	}
	l.attrs.apply(e.ino)
	l.attrs.ino = e.ino
	upper.shared[e.ino] = struct{}{}
	return nil
}

// mergeDir lays upper over lower; links says that upper may have entries that are links
// to lower layers.
func mergeDir(lower, upper *dir, links bool) {
	if upper.opaque {
		lower.clear()
	}
	for name := range upper.whiteouts {
		lower.remove(name)
	}
	for name, e := range upper.all() {
		if e.link != nil {
			e = entry{ino: e.link.attrs.ino}
		}
		below := lower.get(name)
		switch {
		case e.dir == nil, below.dir == nil && !links:
			// A whole new subtree needs no visit: its markers have nothing to hide.
			lower.put(name, e)
		case below.dir == nil:
			fresh := newDir(e.ino)
			mergeDir(fresh.dir, e.dir, links)
			lower.put(name, fresh)
		default:
			if e.dir.explicit {
				below.ino = e.ino
				lower.put(name, below)
			}
			mergeDir(below.dir, e.dir, links)
		}
	}
	upper.clear() // for the garbage collector
}

// finalTree is a merged tree as inodes.
type finalTree struct {
	root    *rafs.Inode
	files   []*rafs.Inode // regular files, each once
	entries int           // names, the root not counted
}

// finalize turns t into inodes with sorted children. t is used up.
func (t *tree) finalize() finalTree {
	f := finalTree{root: t.root.ino}
	seen := map[*rafs.Inode]bool{}
	var walk func(ino *rafs.Inode, d *dir)
	walk = func(ino *rafs.Inode, d *dir) {
		var subdirs map[*rafs.Inode]*dir
		ino.Children, subdirs = d.take()
		f.entries += len(ino.Children)
		for i := range ino.Children {
			c := &ino.Children[i]
			if sub := subdirs[c.Inode]; sub != nil {
				walk(c.Inode, sub)
				continue
			}
			again := false
			if _, ok := t.shared[c.Inode]; ok {
				again = seen[c.Inode]
				seen[c.Inode] = true
			}
			switch regular := c.Inode.Mode&unix.S_IFMT == unix.S_IFREG; {
			case regular && !again:
				f.files = append(f.files, c.Inode)
			case !regular && again:
				// The format has hard links of regular files only.
				clone := *c.Inode
				c.Inode = &clone
			}
		}
	}
	walk(t.root.ino, t.root.dir)
	return f
}
