package builder

import (
	"fmt"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// An image of many symlinks that each go through many others keeps a pattern busy for a bounded time; what is no symlink is found in any case.
func TestPatternThroughManySymlinks(t *testing.T) {
	t.Parallel()
	file := &rafs.Inode{Mode: 0o100644, Size: 1}
	many, root := &rafs.Inode{Mode: 0o40755}, &rafs.Inode{Mode: 0o40755}
	add := func(dir *rafs.Inode, name string, ino *rafs.Inode) {
		dir.Children = append(dir.Children, rafs.Dirent{Name: name, Inode: ino})
	}
	const links = maxLinks - 1
	for i := range links {
		add(root, fmt.Sprintf("c%04d", i), &rafs.Inode{Mode: 0o120777, Target: fmt.Sprintf("c%04d", i+1)})
	}
	add(root, fmt.Sprintf("c%04d", links), file)
	for i := range 1000 {
		add(many, fmt.Sprintf("l%04d", i), &rafs.Inode{Mode: 0o120777, Target: "/c0000"})
	}
	plain := &rafs.Inode{Mode: 0o100644, Size: 2}
	add(many, "plain", plain)
	add(root, "many", many)
	if !file.IsRegular() || !many.IsDir() || !many.Children[0].Inode.IsSymlink() {
		t.Fatal("the modes are none of a file, a directory and a symlink")
	}
	for steps, want := range map[int]int{1 << 20: 2, 300: 2, 200: 1, 0: 1} {
		g := globber{root: root, steps: steps, found: map[*rafs.Inode]struct{}{}, visited: map[globState]struct{}{}}
		g.match(nil, root, strings.Split("many/*", "/"))
		if len(g.files) != want || g.files[len(g.files)-1] != plain || steps < 1<<20 && g.steps >= 0 {
			t.Errorf("with %d steps %d files are found, and %d steps are left; want %d, the last one without a link", steps, len(g.files), g.steps, want)
		}
	}
}
