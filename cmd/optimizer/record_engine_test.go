package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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

// TestRecordFullDisk has no room for the list: the command runs to its end all the same, the error says what to do,
// and nothing half is left.
func TestRecordFullDisk(t *testing.T) {
	root := helloRoot(t)
	full := t.TempDir()
	program, server := testenv.Binary(t, "optimizer"), testenv.Binary(t, "optimizer-server")
	testenv.MountNamespace(t, func() error {
		if err := unix.Mount("tmpfs", full, "tmpfs", 0, "size=16k"); err != nil {
			return err
		}
		fill := filepath.Join(full, "fill")
		if err := os.WriteFile(fill, noise(64<<10), 0o600); !errors.Is(err, unix.ENOSPC) {
			return fmt.Errorf("fill the filesystem: %w", err)
		}
		for _, format := range []string{"native", "csv"} {
			cmd := exec.Command(program, "record", "-q", "--root", root, "--server-path", server, "-o", filepath.Join(full, "list"), "--format", format,
				"--", "hello", "/etc/motd")
			var out, errs strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &errs
			err := cmd.Run()
			if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != exitFailed || out.String() != "hi\n" {
				return fmt.Errorf("%s: %w, stdout %q, stderr %s; want status 1 and what the command says", format, err, out.String(), errs.String())
			}
			if text := errs.String(); !strings.Contains(text, "no space left on device") || !strings.Contains(text, "make room") {
				return fmt.Errorf("%s: stderr %q, want what is wrong and what to do", format, text)
			}
			if left := files(t, full); len(left) != 1 || left[0] != fill {
				return fmt.Errorf("%s: left %q, want what was there", format, left)
			}
		}
		return nil
	})
}
