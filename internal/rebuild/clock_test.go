package rebuild_test

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/rebuild"
)

// dated sets a date in all JSON files of a directory of the queue to a year from now, as they have it where somebody set the
// clock back by a year meanwhile.
func (b *bench) dated(dir, key string, more map[string]any) {
	b.t.Helper()
	names, err := filepath.Glob(filepath.Join(b.dir, dir, "*.json"))
	if err != nil || len(names) != 1 {
		b.t.Fatalf("files in %s: %q, %v; want one", dir, names, err)
	}
	text, err := os.ReadFile(names[0])
	if err != nil {
		b.t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(text, &fields); err != nil {
		b.t.Fatal(err)
	}
	fields[key] = time.Now().UTC().AddDate(1, 0, 0)
	maps.Copy(fields, more)
	if text, err = json.Marshal(fields); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(names[0], text, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// TestClockSetBack holds that an image is built, once, whatever dates a job has that was queued, or tried, before the clock was
// set back.
func TestClockSetBack(t *testing.T) {
	for name, date := range map[string]func(b *bench){
		"queued": func(b *bench) { b.dated("jobs", "created", nil) },
		"tried":  func(b *bench) { b.dated("jobs", "not_before", map[string]any{"attempts": 1}) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			q := b.open("ok", nil)
			if d := b.add(q, b.request("list", nil)); d.Verdict != rebuild.Queued {
				t.Fatalf("decision %+v", d)
			}
			date(b)
			b.run(q)
			b.waitBuilt(1)
			if text, err := os.ReadFile(filepath.Join(b.out, "attempts")); err != nil || bytes.Count(text, []byte("\n")) != 1 {
				t.Errorf("attempts %q, %v; want one", text, err)
			}
		})
	}
}

// TestClockSetBackAfterAFailure holds that a failure of a time yet to come does not keep an image from being built until then.
func TestClockSetBackAfterAFailure(t *testing.T) {
	b := newBench(t)
	q := b.open("permanent", nil)
	b.add(q, b.request("list", nil))
	stop := b.run(q)
	eventually(t, "a failure", func() bool { _, failed := b.results(); return failed == 1 })
	stop(nil)
	if d := b.add(q, b.request("list", nil)); d.Verdict != rebuild.FailedBefore {
		t.Fatalf("decision %+v, want that it failed before", d)
	}
	b.dated("failed", "failed", nil)
	if d := b.add(q, b.request("list", nil)); d.Verdict != rebuild.Queued {
		t.Errorf("decision %+v, want it queued", d)
	}
}
