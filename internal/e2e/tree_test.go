package e2e_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// node is everything that a merged root says of one name.
type node struct {
	mode     uint32 // type and permission bits
	uid, gid uint32
	mtime    string
	size     int64  // regular files and symbolic links
	rdev     uint64 // devices
	first    string // first name of the same inode; itself where there is one name
	target   string // of a symbolic link
	content  string // sha256 of a regular file
	xattrs   string
}

// readTree reads everything below root, and root itself as "/".
func readTree(root string) (map[string]node, error) {
	type inode struct{ dev, ino uint64 }
	nodes := map[string]node{}
	links := map[inode]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := "/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		n := node{mode: st.Mode, uid: st.Uid, gid: st.Gid, mtime: fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec), first: name}
		if n.xattrs, err = readXattrs(path); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			n.size = st.Size
			id := inode{st.Dev, st.Ino}
			if first, ok := links[id]; ok && st.Nlink > 1 {
				n.first, n.content = first, nodes[first].content
				break
			}
			links[id] = name
			n.content, err = hashFile(path)
		case unix.S_IFLNK:
			n.size = st.Size
			n.target, err = os.Readlink(path)
		case unix.S_IFCHR, unix.S_IFBLK:
			n.rdev = st.Rdev
		}
		nodes[name] = n
		return err
	})
	return nodes, err
}

func hashFile(path string) (sum string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// readXattrs returns the extended attributes that an image can hold, sorted.
func readXattrs(path string) (string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("list xattrs: %w", err)
	}
	var all []string
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value := make([]byte, 64<<10)
		m, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return "", fmt.Errorf("xattr %s: %w", name, err)
		}
		all = append(all, fmt.Sprintf("%s=%q", name, value[:m]))
	}
	slices.Sort(all)
	return strings.Join(all, " "), nil
}

// diffTrees returns one line per difference, at most limit of them. The root directory's
// time is the moment of unpacking where no layer names the root, so it is not compared.
func diffTrees(got, want map[string]node, limit int) []string {
	var diff []string
	for name, w := range want {
		g, ok := got[name]
		if name == "/" {
			g.mtime, w.mtime = "", ""
		}
		switch {
		case !ok:
			diff = append(diff, "missing: "+name)
		case g != w:
			diff = append(diff, fmt.Sprintf("%s:\n got %+v\nwant %+v", name, g, w))
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			diff = append(diff, "too many: "+name)
		}
	}
	slices.Sort(diff)
	if len(diff) > limit {
		diff = append(diff[:limit], fmt.Sprintf("and %d more", len(diff)-limit))
	}
	return diff
}

// TestTreesDiffer holds the comparison itself to account: each single change must show.
func TestTreesDiffer(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	fill := func(name string) string {
		dir := filepath.Join(root, name)
		for _, d := range []string{dir, filepath.Join(dir, "d")} {
			if err := os.Mkdir(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, f := range []string{"a", "d/b"} {
			if err := os.WriteFile(filepath.Join(dir, f), []byte(f), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		must(t, os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "z")))
		must(t, os.Symlink("a", filepath.Join(dir, "s")))
		for _, f := range []string{"a", "d/b", "d", "s", "."} {
			ts := []unix.Timespec{{Sec: 5, Nsec: 7}, {Sec: 5, Nsec: 7}}
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, f), ts, unix.AT_SYMLINK_NOFOLLOW))
		}
		return dir
	}
	want, err := readTree(fill("want"))
	must(t, err)
	changes := map[string]func(dir string) error{
		"none":    func(string) error { return nil },
		"content": func(dir string) error { return rewrite(filepath.Join(dir, "d/b"), "d/c") },
		"mode":    func(dir string) error { return os.Chmod(filepath.Join(dir, "a"), 0o640) },
		"time": func(dir string) error {
			ts := []unix.Timespec{{Sec: 5}, {Sec: 5}}
			return unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, "s"), ts, unix.AT_SYMLINK_NOFOLLOW)
		},
		"link":  func(dir string) error { return replaceByCopy(filepath.Join(dir, "z")) },
		"extra": func(dir string) error { return os.Symlink("x", filepath.Join(dir, "x")) },
		"gone":  func(dir string) error { return os.Remove(filepath.Join(dir, "s")) },
		"target": func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "s")), os.Symlink("b", filepath.Join(dir, "s")))
		},
		"xattr": func(dir string) error { return unix.Setxattr(filepath.Join(dir, "a"), "user.x", []byte("1"), 0) },
	}
	for name, change := range changes {
		dir := fill(name)
		if err := change(dir); err != nil {
			if errors.Is(err, unix.EOPNOTSUPP) {
				continue
			}
			t.Fatalf("%s: %v", name, err)
		}
		got, err := readTree(dir)
		must(t, err)
		if diff := diffTrees(got, want, 10); (len(diff) == 0) != (name == "none") {
			t.Errorf("%s: differences = %q", name, diff)
		}
	}
}

// rewrite changes a file's content and keeps its time.
func rewrite(path, data string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{st.Atim, st.Mtim}, 0)
}

// replaceByCopy replaces a hard link by a file of its own with equal content and times.
func replaceByCopy(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{st.Atim, st.Mtim}, 0)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
