package tracer_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// running starts a container in the box whose first process runs already, as those that are attached to do: it
// has a child that has a child, which reads /s/plain when it is told to.
func running(t *testing.T, b *box) (c *container, tell func()) {
	t.Helper()
	c = b.create(t, pivot, "/program", "files", "child:2:/s/go", "read:/s/opened")
	c.letGo(t)
	await(t, b.merged+"/s/waits")
	return c, func() {
		if err := os.WriteFile(b.merged+"/s/go", []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAttach holds that of a container which runs already all processes are recorded, and that the list
// says that its start is missing.
func TestAttach(t *testing.T) {
	overlay := func(b *box) *box { return b }
	for name, root := range map[string]func(b *box) *box{
		"overlay":   overlay,
		"directory": func(b *box) *box { return &box{merged: b.lower} },
	} {
		t.Run(name, func(t *testing.T) {
			b := root(newDiskBox(t, identitySetup))
			time.Sleep(50 * time.Millisecond) // the image is older than the run
			c, tell := running(t, b)
			s := start(t, c, tracer.Options{Attach: true})
			tell()
			if err := c.wait(t); err != nil {
				t.Fatalf("container: %v\n%s", err, c.out.String())
			}
			r := result(t, s)
			if lossOf(r) != "late -1" || r.Err != nil || r.End != tracer.EndExit {
				t.Errorf("end %q, error %v, losses %q; want one that says late", r.End, r.Err, lossOf(r))
			}
			var child []string
			for _, a := range r.Trace.Accesses {
				if strings.HasPrefix(a.Path, "/s/plain") {
					child = append(child, a.Path)
					if n := bytesOf(a); n != 10_000 || a.Ranges == nil || a.How&trace.Read == 0 {
						t.Errorf("%s: %d bytes in %+v, %v; want 10000 that were read", a.Path, n, a.Ranges, a.How)
					}
				}
			}
			if len(child) != 1 {
				t.Errorf("the child's files are %q, want one", child)
			}
			if a, ok := find(r, "/program"); filepath.Base(b.merged) == "lower" && (!ok || bytesOf(a) == 0) {
				t.Errorf("/program, which the child executes once more: %+v, listed %v", a, ok)
			}
		})
	}
}
