package unpack_test

import (
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/unpack"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// The root of an image has attributes like any other directory.
func TestRootAttributes(t *testing.T) {
	testenv.Root(t)
	t.Parallel()
	root := dirOf(rafs.Dirent{Name: "d", Inode: dirOf()})
	root.Mode, root.UID, root.GID, root.Mtime = 0o041751, 7, 9, -5
	root.Xattrs = []rafs.Xattr{{Name: "user.a", Value: []byte("v")}}
	dir := filepath.Join(t.TempDir(), "root")
	if err := unpack.Dir(t.Context(), source(root), dir); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		t.Fatal(err)
	}
	if got := time.Unix(st.Mtim.Unix()); st.Mode != root.Mode || st.Uid != root.UID || st.Gid != root.GID || got.Unix() != root.Mtime {
		t.Errorf("root is %#o %d:%d %v, want %#o %d:%d %d s", st.Mode, st.Uid, st.Gid, got, root.Mode, root.UID, root.GID, root.Mtime)
	}
	value := make([]byte, 8)
	if n, err := unix.Lgetxattr(dir, "user.a", value); err != nil || string(value[:max(n, 0)]) != "v" {
		t.Errorf("user.a of the root = %q, %v", value[:max(n, 0)], err)
	}
}
