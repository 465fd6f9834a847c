package tracer_test

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// goneWant is what is known of a run of identityArgs where the layers cannot be opened: files that it changed,
// renamed, linked or removed count as a whole, under the name by which they were read.
var goneWant = []string{
	"/s/changed whole", "/s/empty 0", "/s/hard2 10000", "/s/mapped 10000", "/s/mylink whole", "/s/newname whole", "/s/opened 0", "/s/owned whole",
	"/s/plain 10000", "/s/private 10000", "/s/removed whole", "/s/twice 10000",
}

// TestLayersGone has layers that are no more where the overlay's options say, as those of pods with users of their own.
func TestLayersGone(t *testing.T) {
	for name, setup := range map[string]struct {
		kind string // of the layer's filesystem, when that is not the writable layer's
		want []string
	}{
		"one filesystem":                 {"", goneWant},
		"layer and writable layer apart": {"tmpfs", strings.Split(strings.NewReplacer(" 10000", " whole", " 0", " whole", "/s/owned whole|", "").Replace(strings.Join(goneWant, "|")), "|")},
	} {
		t.Run(name, func(t *testing.T) {
			b := newDiskBox(t, identitySetup)
			if setup.kind != "" {
				b = b.over(t, setup.kind)
			}
			warm(t, b.lower+"/s")
			if err := os.Rename(b.lower, b.lower+".away"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Millisecond) // older than the run by more than a clock tick
			r := b.record(t, pivot, identityArgs...)
			var got []string
			for _, a := range r.Trace.Accesses {
				size := "whole"
				if a.Ranges != nil {
					size = fmt.Sprint(bytesOf(a))
				}
				if strings.HasPrefix(a.Path, "/s/") {
					got = append(got, a.Path+" "+size)
				}
			}
			slices.Sort(got)
			if diff := cmp.Diff(setup.want, got); diff != "" {
				t.Errorf("files and bytes (-want +got):\n%s", diff)
			}
			if grade := map[bool]string{true: trace.GradeFaultAround, false: trace.GradeFile}[setup.kind == ""]; r.Grade != grade {
				t.Errorf("grade %q by %q, want %q", r.Grade, r.Engine, grade)
			}
		})
	}
}

// over returns a box of the same image whose layer is on a filesystem of its own.
func (b *box) over(t *testing.T, kind string) *box {
	t.Helper()
	dir := t.TempDir()
	mount(t, kind, dir, kind, "")
	above := &box{lower: dir + "/lower", upper: b.upper + ".apart", merged: b.merged + ".apart"}
	if out, err := exec.Command("cp", "-a", b.lower, above.lower).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	for _, d := range []string{above.upper, above.merged, above.upper + ".work"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mount(t, "overlay", above.merged, "overlay", fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s.work", above.lower, above.upper, above.upper))
	return above
}
