package persist_test

import (
	"bytes"
	"os"
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
