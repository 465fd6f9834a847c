package creation_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/creation"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestMerge(t *testing.T) {
	run := []trace.Access{
		{Path: "/bin/app", How: trace.Opened | trace.Executed, Size: 9, Ranges: []trace.Range{{Length: 9}}},
		{Path: "/etc/passwd", How: trace.Opened | trace.Read, Size: 5, Elapsed: time.Second, PID: 3, Ranges: []trace.Range{{Length: 5, Certain: true}}},
	}
	before := []trace.Access{run[0], run[1]}
	got := creation.Merge(run, []trace.Access{
		{Path: "/etc/passwd", How: trace.Runtime, Size: 5},
		{Path: "/etc/group", How: trace.Runtime, Size: 7},
		{Path: "/etc/group", How: trace.Runtime, Size: 7},
	})
	want := []trace.Access{
		{Path: "/etc/group", How: trace.Runtime, Size: 7},
		run[0],
		{Path: "/etc/passwd", How: trace.Opened | trace.Read | trace.Runtime, Size: 5, Elapsed: time.Second, PID: 3},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Merge (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(before, run); diff != "" {
		t.Errorf("Merge changed its input (-before +after):\n%s", diff)
	}
	if got := creation.Merge(run, nil); len(got) != 2 {
		t.Errorf("Merge with nothing = %v", got)
	}
}

func TestVolumes(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "sub/b"} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("b", filepath.Join(dir, "sub/link")); err != nil {
		t.Fatal(err)
	}
	before := time.Now().Add(100 * time.Millisecond)
	late := filepath.Join(dir, "late")
	time.Sleep(time.Until(before) + 20*time.Millisecond)
	if err := os.WriteFile(late, []byte("container's"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(late, time.Time{}, before.Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	got := creation.Files(t.Context(), creation.Options{PID: 1 << 30, Volumes: []creation.Volume{{Source: dir, Destination: "/var/lib"}, {Source: dir + "/missing", Destination: "/x"}}, Before: before})
	want := []trace.Access{{Path: "/var/lib/a", How: trace.Runtime, Size: 1}, {Path: "/var/lib/sub/b", How: trace.Runtime, Size: 5}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Files (-want +got):\n%s", diff)
	}
}
