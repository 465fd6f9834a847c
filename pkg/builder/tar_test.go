package builder_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
)

// makeTree makes files that tar formats differ in.
func makeTree(t *testing.T, root, format string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, data string) string {
		p := filepath.Join(root, name)
		must(os.MkdirAll(filepath.Dir(p), 0o755))
		must(os.WriteFile(p, []byte(data), 0o640))
		return p
	}
	write("plain", "1")
	must(os.Symlink("plain", filepath.Join(root, "symlink")))
	must(os.Link(filepath.Join(root, "plain"), filepath.Join(root, "zlink")))
	must(os.MkdirAll(filepath.Join(root, "empty dir"), 0o1777))
	must(os.Chmod(write("suid", "x"), 0o755|os.ModeSetuid))
	must(os.Chown(write("owned", "x"), 12, 34))
	if format != "v7" {
		must(unix.Mkfifo(filepath.Join(root, "fifo"), 0o600))
		must(unix.Mknod(filepath.Join(root, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
		must(unix.Mknod(filepath.Join(root, "block"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 300))))
		write(strings.Repeat("d", 90)+"/"+strings.Repeat("f", 90), "ustar has room for this") // prefix and name
	}
	if format == "gnu" || format == "posix" {
		write(strings.Repeat("long/", 60)+strings.Repeat("n", 255), "2")
		must(os.Symlink(strings.Repeat("target/", 50), filepath.Join(root, "long symlink")))
		write("new\nline and \xff byte", "3")
		must(os.Chown(write("big ids", "x"), 3_000_000_000, 4_000_000_000))
		sparse, err := os.OpenFile(filepath.Join(root, "sparse"), os.O_CREATE|os.O_WRONLY, 0o600)
		must(err)
		must(sparse.Truncate(5 << 20))
		for i := range 30 { // more pieces than an old header holds
			_, err = sparse.WriteAt([]byte("island"), int64(i*150_000+7))
			must(err)
		}
		must(sparse.Close())
	}
	if format == "posix" {
		must(unix.Setxattr(filepath.Join(root, "plain"), "user.test", []byte("a\x00b=c\n"), 0))
		must(unix.Setxattr(filepath.Join(root, "suid"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	}
	must(filepath.Walk(root, func(p string, _ os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		at := unix.NsecToTimespec(time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC).UnixNano())
		if format == "posix" {
			at.Nsec = 123456789
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW)
	}))
}

// TestTarFormats reads what GNU tar writes in each of its formats; the tree it was made of
// is the judge.
func TestTarFormats(t *testing.T) {
	testenv.Root(t)
	tool := testenv.Tool(t, "tar")
	tests := map[string][]string{
		"v7":                {"--format=v7"},
		"ustar":             {"--format=ustar"},
		"gnu":               {"--format=gnu"},
		"gnu, sparse":       {"--format=gnu", "--sparse"},
		"gnu, blocked":      {"--format=gnu", "--blocking-factor=100"},
		"posix":             {"--format=posix"},
		"posix, sparse 0.0": {"--format=posix", "--sparse", "--sparse-version=0.0"},
		"posix, sparse 0.1": {"--format=posix", "--sparse", "--sparse-version=0.1"},
		"posix, sparse 1.0": {"--format=posix", "--sparse", "--sparse-version=1.0"},
	}
	for name, args := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			format := strings.TrimPrefix(args[0], "--format=")
			makeTree(t, root, format)
			if format == "posix" {
				args = append(slices.Clone(args), "--xattrs", "--xattrs-include=*")
			}
			cmd := exec.Command(tool, append(args, "--numeric-owner", "-C", root, "-cf", "-", ".")...)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			b, err := cmd.Output()
			if err != nil {
				t.Fatalf("tar: %v: %s", err, &stderr)
			}
			o := builder.DefaultOptions()
			o.ChunkSize = 1 << 16
			res := convert(t, tars(t, b), o)
			if diff := cmp.Diff(dumpDir(t, root), dumpImage(t, res)); diff != "" {
				t.Errorf("image differs (-tree +image):\n%s", diff)
			}
			checkTools(t, res)
		})
	}
}
