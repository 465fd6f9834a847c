package persist_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func openStore(t *testing.T, dir string) *persist.Store {
	t.Helper()
	s, err := persist.OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// tree returns every name below dir, links with their target.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 {
			to, err := os.Readlink(p)
			if err != nil {
				return err
			}
			rel += " -> " + to
		}
		out = append(out, rel)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

func one(ref, container, path string) *persist.List {
	return &persist.List{
		Reference: ref, Platform: "linux/amd64", Container: container,
		Digest: "sha256:4c1d000000000000000000000000000000000000000000000000000000000000",
		Trace:  trace.Trace{Accesses: []trace.Access{{Path: path, How: trace.Opened}}},
	}
}

const hex4c1d = "4c1d000000000000000000000000000000000000000000000000000000000000"

func TestStoreNames(t *testing.T) {
	t.Parallel()
	hex := strings.Repeat("ab", 32)
	native := "lists/" + hex4c1d + "/linux-amd64/c1.list"
	three := func(names ...string) []string {
		var out []string
		for _, n := range names {
			name, link, isLink := strings.Cut(n, " -> ")
			for _, ext := range []string{"", ".csv", ".json"} {
				if isLink {
					out = append(out, name+ext+" -> "+link+ext)
				} else {
					out = append(out, name+ext)
				}
			}
		}
		return out
	}
	for name, c := range map[string]struct {
		list    *persist.List
		timeout time.Duration
		want    []string
	}{
		"official":           {one("nginx", "c1", "/a"), 0, three("library/nginx:latest", "nginx:latest -> library/nginx:latest")},
		"official, full":     {one("docker.io/library/nginx:1.27", "c1", "/a"), 0, three("library/nginx:1.27", "nginx:1.27 -> library/nginx:1.27")},
		"official, timeout":  {one("nginx", "c1", "/a"), 90 * time.Second, three("library/nginx:latest", "library/nginx:latest.timeout90s -> nginx:latest", "nginx:latest -> library/nginx:latest", "nginx:latest.timeout90s -> library/nginx:latest")},
		"docker hub":         {one("docker.io/me/app:v1", "c1", "/a"), 500 * time.Millisecond, three("me/app:v1")},
		"other host":         {one("registry.example:5000/team/sub/app:v1", "c1", "/a"), 0, three("team/sub/app:v1")},
		"other host, short":  {one("ghcr.io/nginx:latest", "c1", "/a"), time.Second, three("nginx:latest", "nginx:latest.timeout1s -> nginx:latest")},
		"digest":             {one("ghcr.io/a/b@sha256:"+hex, "c1", "/a"), 0, three("a/b@sha256-" + hex)},
		"tag and digest":     {one("nginx:1@sha256:"+hex, "c1", "/a"), 0, three("library/nginx@sha256-"+hex, "nginx@sha256-"+hex+" -> library/nginx@sha256-"+hex)},
		"official, nested":   {one("docker.io/library/a/b:c", "c1", "/a"), 0, three("library/a/b:c", "a/b:c -> ../library/a/b:c")},
		"image id":           {one(hex, "c1", "/a"), 0, nil},
		"no reference":       {one("", "c1", "/a"), 0, nil},
		"parent in the name": {one("docker.io/../../etc/passwd:x", "c1", "/a"), 0, nil},
		"absolute":           {one("/etc/passwd", "c1", "/a"), 0, nil},
		"newline":            {one("nginx\n:latest", "c1", "/a"), 0, nil},
		"very long":          {one("ghcr.io/"+strings.Repeat("a", 225)+":x", "c1", "/a"), 0, nil},
	} {
		dir := t.TempDir()
		saved, err := openStore(t, dir).Save(c.list, persist.SaveOptions{Timeout: c.timeout})
		if err != nil {
			t.Errorf("%s: Save: %v", name, err)
			continue
		}
		want := append(slices.Clone(c.want), native)
		slices.Sort(want)
		if d := cmp.Diff(want, tree(t, dir)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
		if saved.Native != filepath.Join(dir, native) || (saved.Paths == "") != (c.want == nil) {
			t.Errorf("%s: Save = %+v", name, saved)
		}
		for _, n := range c.want {
			n, _, _ = strings.Cut(n, " -> ")
			b, err := os.ReadFile(filepath.Join(dir, n))
			if err != nil || !strings.Contains(string(b), "/a") {
				t.Errorf("%s: %s holds %q, %v", name, n, b, err)
			}
		}
	}
}

// Nothing that an image or a container is called leads out of the store, and hostile
// names do not collide.
func TestStoreHostileNames(t *testing.T) {
	t.Parallel()
	outer := t.TempDir()
	dir := filepath.Join(outer, "store")
	s := openStore(t, dir)
	var want int
	for _, bad := range []string{"", "..", ".", "../../escape", "/abs", "a/b", "a\nb", "-rf", ".hidden", "\xff\x00", strings.Repeat("x", 300)} {
		for _, field := range []func(l *persist.List){
			func(l *persist.List) { l.Container = bad },
			func(l *persist.List) { l.Digest = bad },
			func(l *persist.List) { l.Platform = bad },
			func(l *persist.List) { l.Digest, l.Reference = "", bad },
		} {
			l := one("", "c1", "/a")
			field(l)
			saved, err := s.Save(l, persist.SaveOptions{})
			if err != nil {
				t.Fatalf("Save with %q: %v", bad, err)
			}
			if !strings.HasPrefix(saved.Native, dir+"/lists/") || strings.Count(saved.Native[len(dir):], "/") != 4 {
				t.Errorf("Save with %q wrote %s", bad, saved.Native)
			}
		}
	}
	for _, n := range tree(t, outer) {
		if !strings.HasPrefix(n, "store/") {
			t.Errorf("%s is outside the store", n)
		}
		if strings.HasSuffix(n, ".list") {
			want++
		}
	}
	// Digest and reference only make a hash of the reference: 11 references, of which 1 is empty.
	if least := 11 + 11 + 11; want < least {
		t.Errorf("%d native lists, want at least %d: names collide", want, least)
	}
}

// A link in the store that leads out of it is not followed.
func TestStoreLinksOut(t *testing.T) {
	t.Parallel()
	outer := t.TempDir()
	dir := filepath.Join(outer, "store")
	s := openStore(t, dir)
	if err := os.Mkdir(filepath.Join(outer, "victim"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"me", "lists"} {
		if err := os.Symlink("../victim", filepath.Join(dir, n)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Save(one("docker.io/me/app:1", "c1", "/a"), persist.SaveOptions{}); err == nil {
		t.Error("Save through a link that leaves the store: no error")
	}
	if got := tree(t, filepath.Join(outer, "victim")); len(got) != 0 {
		t.Errorf("written outside the store: %v", got)
	}
}

func TestStoreOverwrite(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	read := func(n string) string {
		b, err := os.ReadFile(filepath.Join(dir, n))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	save := func(l *persist.List, o persist.SaveOptions) persist.Saved {
		saved, err := s.Save(l, o)
		if err != nil {
			t.Fatal(err)
		}
		return saved
	}
	save(one("nginx", "c1", "/first"), persist.SaveOptions{})
	kept := save(one("nginx", "c2", "/second"), persist.SaveOptions{})
	if kept.Paths != "" || kept.Native == "" || read("nginx:latest") != "/first\n" {
		t.Errorf("without Overwrite: %+v, holds %q", kept, read("nginx:latest"))
	}
	save(one("nginx", "c3", "/third"), persist.SaveOptions{Overwrite: true, Readable: true})
	if read("nginx:latest") != "/third\n" || read("library/nginx:latest.csv") != "path,size,elapsed\n/third,0 B,0 us\n" {
		t.Errorf("with Overwrite: holds %q", read("nginx:latest"))
	}
	// An image whose own name is another's short name gets it, and keeps it.
	save(one("ghcr.io/nginx", "c4", "/fourth"), persist.SaveOptions{})
	save(one("nginx", "c5", "/fifth"), persist.SaveOptions{Overwrite: true})
	if read("nginx:latest") != "/fourth\n" || read("library/nginx:latest") != "/fifth\n" {
		t.Errorf("two images: %q and %q", read("nginx:latest"), read("library/nginx:latest"))
	}
}

// A list of a part of a run replaces nothing, be it of the same container or better than what is there.
func TestStorePartial(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	lossy := one("nginx", "c1", "/whole")
	lossy.Losses = []trace.Loss{{Reason: "overrun", Count: 1}}
	whole, err := s.Save(lossy, persist.SaveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	files := func() map[string]string {
		m := make(map[string]string)
		for _, name := range tree(t, dir) {
			name, _, _ = strings.Cut(name, " ") // of a link
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			m[name] = string(b)
		}
		return m
	}
	before := files()
	part, err := s.Save(one("nginx", "c1", "/part"), persist.SaveOptions{Partial: true})
	if err != nil {
		t.Fatal(err)
	}
	if part.Native == whole.Native || part.Paths != "" {
		t.Errorf("saved %+v beside %+v", part, whole)
	}
	after := files()
	for name, text := range before {
		if after[name] != text {
			t.Errorf("%s holds %q, held %q", name, after[name], text)
		}
	}
	if len(after) != len(before)+1 {
		t.Errorf("files %v, want one more than %v", after, before)
	}
	// Where nothing is, it is better than nothing.
	if saved, err := s.Save(one("redis", "c2", "/part"), persist.SaveOptions{Partial: true}); err != nil || saved.Paths == "" {
		t.Errorf("the first list: %+v, %v", saved, err)
	}
}

func TestStoreKeepsTheNewest(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	for i := range persist.KeepLists + 5 {
		saved, err := s.Save(one("nginx", fmt.Sprintf("c%02d", i), "/a"), persist.SaveOptions{})
		if err != nil {
			t.Fatal(err)
		}
		at := time.Unix(1700000000-int64(i%7)*10000+int64(i), 0)
		if i == 3 {
			at = time.Now().Add(time.Hour)
		}
		if err := os.Chtimes(saved.Native, at, at); err != nil {
			t.Fatal(err)
		}
	}
	other := one("nginx", "other", "/a")
	other.Platform = "linux/arm64"
	if _, err := s.Save(other, persist.SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	got := tree(t, filepath.Join(dir, "lists", hex4c1d, "linux-amd64"))
	if len(got) != persist.KeepLists || !slices.Contains(got, "c03.list") || !slices.Contains(got, "c36.list") || slices.Contains(got, "c06.list") {
		t.Errorf("%d lists are left: %v", len(got), got)
	}
}

func TestStoreInvalidList(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	saved, err := openStore(t, dir).Save(one("nginx", "c1", "relative"), persist.SaveOptions{})
	if !errors.Is(err, persist.ErrInvalid) || saved != (persist.Saved{}) || len(tree(t, dir)) != 0 {
		t.Errorf("Save = %+v, %v and %v, want nothing and ErrInvalid", saved, err, tree(t, dir))
	}
}

func TestStoreConcurrent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 8 {
		s := openStore(t, dir)
		wg.Go(func() {
			for j := range 10 {
				if _, err := s.Save(one("nginx", fmt.Sprintf("c%d", i), fmt.Sprintf("/%d/%d", i, j)), persist.SaveOptions{Overwrite: true}); err != nil {
					t.Error(err)
				}
				again, err := persist.OpenStore(dir) // cleans, and must not take what others write
				if err != nil {
					t.Error(err)
					continue
				}
				if err := again.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := len(tree(t, dir)); got != 8+6 {
		t.Errorf("%d files, want 14: %v", got, tree(t, dir))
	}
}

// A full disk leaves the old files as they were and no temporary file.
func TestStoreFullDisk(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	testenv.MountNamespace(t, func() error {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"); err != nil {
			return err
		}
		s, err := persist.OpenStore(dir)
		if err != nil {
			return err
		}
		defer s.Close()
		if _, err := s.Save(one("nginx", "c1", "/first"), persist.SaveOptions{}); err != nil {
			return err
		}
		before := tree(t, dir)
		big := one("nginx", "c1", "/second")
		for i := range 5000 {
			big.Accesses = append(big.Accesses, trace.Access{Path: fmt.Sprintf("/usr/lib/python3/%d", i)})
		}
		saved, err := s.Save(big, persist.SaveOptions{Overwrite: true})
		if !errors.Is(err, unix.ENOSPC) || saved.Native != "" {
			return fmt.Errorf("Save on a full disk = %+v, %w, want ENOSPC", saved, err)
		}
		t.Logf("full disk: %v", err)
		if d := cmp.Diff(before, tree(t, dir)); d != "" {
			return fmt.Errorf("files changed:\n%s", d)
		}
		b, err := os.ReadFile(filepath.Join(dir, "nginx:latest"))
		if err != nil || string(b) != "/first\n" {
			return fmt.Errorf("holds %q, %w", b, err)
		}
		f, err := os.Open(filepath.Join(dir, "lists", hex4c1d, "linux-amd64", "c1.list"))
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = persist.Read(f)
		return err
	})
}

// TestKilledWriter kills a process that saves in a loop, many times: at every moment each
// file is whole, and the next OpenStore removes what is left.
func TestKilledWriter(t *testing.T) {
	const env = "PERSIST_TEST_WRITER"
	if dir := os.Getenv(env); dir != "" {
		s, err := persist.OpenStore(dir)
		if err != nil {
			t.Fatal(err)
		}
		l := one("nginx", "c1", "/a")
		for i := range 4000 {
			l.Accesses = append(l.Accesses, trace.Access{Path: fmt.Sprintf("/usr/lib/python3/dist-packages/%d", i)})
		}
		for {
			if _, err := s.Save(l, persist.SaveOptions{Overwrite: true}); err != nil {
				t.Fatal(err)
			}
			if _, err := fmt.Println("saved"); err != nil {
				return
			}
		}
	}
	dir := t.TempDir()
	left, whole := 0, 0
	for i := 0; i < 12 || i < 200 && left == 0; i++ {
		killWriter(t, env+"="+dir, i%3, time.Duration(i%17)*3*time.Millisecond)
		for _, n := range tree(t, dir) {
			n, _, _ = strings.Cut(n, " -> ")
			if strings.HasPrefix(n, ".tmp/") {
				left++
				continue
			}
			b, err := os.ReadFile(filepath.Join(dir, n))
			if err != nil {
				t.Fatalf("%s: %v", n, err)
			}
			if l, err := persist.ReadAny(bytes.NewReader(b)); err != nil || len(l.Accesses) != 4001 {
				t.Fatalf("%s is not whole: %v", n, err)
			}
			whole++
		}
		s, err := persist.OpenStore(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadDir(filepath.Join(dir, ".tmp")); err != nil || len(got) != 0 {
			t.Fatalf("after OpenStore: %v, %v, want no temporary files", got, err)
		}
	}
	if left == 0 || whole == 0 {
		t.Errorf("%d leftovers and %d whole files seen: the kills missed the writes", left, whole)
	}
}

// killWriter starts a writer and kills it some time after it has saved some lists.
func killWriter(t *testing.T, env string, saved int, after time.Duration) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledWriter$")
	cmd.Env = append(os.Environ(), env)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for n := 0; n <= saved && lines.Scan(); n++ {
	}
	time.Sleep(after)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
}

func TestOpenStoreErrors(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := persist.OpenStore(file); err == nil || s != nil || !strings.Contains(err.Error(), "open list store: ") {
		t.Errorf("OpenStore(a file) = %v, %v, want an error", s, err)
	}
}
