package tracer_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// TestScenarios runs the scripts of testdata/scenarios, each in containers of every mode.
// A script has three sections: "setup" fills the image's layer, "run" is executed by bash
// in the container, and "want" lists what the trace must say of the files below /s, in the
// order of first touch: three letters, "ore" or dashes for opened, read, executed, then
// the path, quoted as Go does where it needs to be. A line "skipped >= N" bounds the
// files that are no content of the image.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/scenarios/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("scenarios: %v, error %v", files, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			sections := make(map[string]string)
			for _, f := range a.Files {
				sections[f.Name] = string(f.Data)
			}
			for _, mode := range []string{pivotProc, pivot, chroot} {
				t.Run(mode, func(t *testing.T) { scenario(t, mode, sections) })
			}
		})
	}
}

func scenario(t *testing.T, mode string, sections map[string]string) {
	b := newBox(t, sections["setup"])
	r := b.record(t, mode, "bash", "-euc", sections["run"])
	var want []string
	for line := range strings.Lines(sections["want"]) {
		line = strings.TrimSuffix(line, "\n")
		var least int64
		if n, _ := fmt.Sscanf(line, "skipped >= %d", &least); n == 1 {
			if r.Trace.Skipped < least {
				t.Errorf("skipped = %d, want at least %d", r.Trace.Skipped, least)
			}
			continue
		}
		want = append(want, line)
	}
	var got []string
	for _, a := range r.Trace.Accesses {
		if strings.HasPrefix(a.Path, "/s/") {
			path := a.Path
			if q := strconv.Quote(path); q != `"`+path+`"` {
				path = q
			}
			got = append(got, howString(a.How)+" "+path)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("accesses below /s (-want +got):\n%s", diff)
	}
	if !slices.IsSortedFunc(r.Trace.Accesses, func(x, y trace.Access) int { return int(x.Elapsed - y.Elapsed) }) {
		t.Error("accesses are not in the order of their times")
	}
}
