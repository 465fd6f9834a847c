package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// A list of a container that ran already leaves those of whole runs in the store as they are, also that of the
// same container, and says so; one of an image replaces them.
func TestRecordKeeps(t *testing.T) {
	store := t.TempDir()
	list := func(p string) *persist.List {
		return &persist.List{Reference: "docker.io/library/web:v1", Container: "c1", Platform: "linux/amd64", Trace: trace.Trace{Accesses: []trace.Access{{Path: p}}}}
	}
	keep := func(o recordOptions, p string) string {
		t.Helper()
		var errs bytes.Buffer
		o.global, o.store, o.format = &global{streams: streams{err: &errs}}, store, "native"
		if err := o.keep(list(p)); err != nil {
			t.Fatal(err)
		}
		return errs.String()
	}
	named := func() string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(store, "library/web:v1"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	keep(recordOptions{container: "c1"}, "/attached")
	if got := named(); got != "/attached\n" {
		t.Errorf("the first list is %q", got)
	}
	keep(recordOptions{image: "web:v1"}, "/whole")
	if got := named(); got != "/whole\n" {
		t.Errorf("after a recording of the image the list is %q", got)
	}
	if errs := keep(recordOptions{container: "c1"}, "/again"); named() != "/whole\n" || !strings.Contains(errs, "misses the container's start") {
		t.Errorf("after another of the container the list is %q, and it says %s", named(), errs)
	}
	natives, err := filepath.Glob(filepath.Join(store, "lists/*/*/*.list"))
	if err != nil || len(natives) != 2 {
		t.Errorf("lists %q, %v; want those of the whole run and of the part", natives, err)
	}
}
