package main

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// TestRecordWithoutPageEvents records where page events cannot be had, in a process namespace whose numbers
// the kernel's filter does not know: one line says so, and the list, of whole files, names engine and grade.
func TestRecordWithoutPageEvents(t *testing.T) {
	root := helloRoot(t)
	name := filepath.Join(t.TempDir(), "list")
	cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
		testenv.Binary(t, "optimizer"), "record", "--root", root, "--server-path", testenv.Binary(t, "optimizer-server"), "-o", name,
		"--", "hello", "/etc/motd")
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil || out.String() != "hi\n" {
		t.Fatalf("record: %v, stdout %q, stderr %s", err, &out, &errs)
	}
	const why = "recording whole files, not ranges: page tracing is not supported here: not in the initial PID namespace"
	if strings.Count(errs.String(), "whole files") != 1 || !strings.Contains(errs.String(), why) {
		t.Errorf("stderr %q, want one line: %s", errs.String(), why)
	}
	l := readListFile(t, name)
	if l.Engine != "fanotify" || l.Grade != trace.GradeFile || !l.Complete() || !slices.Equal(paths(l), []string{"/bin/hello", "/etc/motd"}) {
		t.Errorf("paths %q, grade %q by %q, losses %v", paths(l), l.Grade, l.Engine, l.Losses)
	}
	for _, a := range l.Accesses {
		if a.Ranges != nil {
			t.Errorf("%s has ranges %v, which nobody saw", a.Path, a.Ranges)
		}
	}
}
