package persist_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
)

// The example of the format's page is a list, to the byte.
func TestDocumentedExample(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(filepath.Join(testenv.RepoRoot(t), "docs", "format-access-list.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(page), "```\n")
	example, _, ok2 := strings.Cut(rest, "```\n")
	if !ok || !ok2 || !strings.HasPrefix(example, "headstart-access-list v2\n") {
		t.Fatalf("the page begins with no example: %.80q", example)
	}
	l, err := persist.Read(strings.NewReader(example))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := l.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(example, b.String()); d != "" {
		t.Errorf("written back (-page +list):\n%s", d)
	}
}

// What the page has a shell ask is answered whatever bytes the paths have, also where the user's locale is UTF-8.
func TestDocumentedCommands(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(filepath.Join(testenv.RepoRoot(t), "docs", "format-access-list.md"))
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(string(page), "```\n")
	if len(parts) < 4 || !strings.Contains(parts[3], "grep ") {
		t.Fatalf("the page's second block has no commands: %.200q", parts)
	}
	dir := t.TempDir()
	list := strings.Replace(golden, "/bytes/", "/etc/\xc3", 1)
	if err := os.WriteFile(filepath.Join(dir, "LIST"), []byte(list), 0o600); err != nil {
		t.Fatal(err)
	}
	// -q is its status: the list is incomplete.
	cmd := exec.Command("bash", "-c", strings.ReplaceAll(parts[3], "grep -aq", "! grep -aq"))
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "LC_ALL=C.UTF-8")
	got, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v, %s", err, got)
	}
	const oddLine = "----\t0\t0\t0\t-\t-\t/etc/\xc3\xff\xfe\x80\n"
	want := "8\n" + oddLine + "---c\t0\t900\t0\t\t-\t/etc/passwd\n" +
		"loss overflow -1 the queue overflowed, twice\nloss odd\\x20reason\\n 0\n" +
		"/\n/docker-entrypoint.sh\n/usr/lib/with space\\tand\\nnewline\\\\n\n/etc/\xc3\xff\xfe\x80\n/ümlaut/日本\u2028\u0085\n/cr\\r\\nlf\n/never/touched\n/etc/passwd\n"
	if d := cmp.Diff(want, string(got)); d != "" {
		t.Errorf("the page's commands (-want +got):\n%s", d)
	}
}
