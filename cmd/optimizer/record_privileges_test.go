package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// TestRecordUnprivileged records without what recording takes: one line says what, the command is not run, and
// no list is left. What it can do without does not matter.
func TestRecordUnprivileged(t *testing.T) {
	root := helloRoot(t)
	setpriv := testenv.Tool(t, "setpriv")
	program, server := testenv.Binary(t, "optimizer"), testenv.Binary(t, "optimizer-server")
	const admin = "CAP_SYS_ADMIN on the host"
	for name, tt := range map[string]struct {
		with  []string
		fault string // "": it works
	}{
		"no CAP_SYS_ADMIN":       {[]string{setpriv, "--bounding-set=-sys_admin"}, admin},
		"a user namespace":       {[]string{"unshare", "--user", "--map-root-user", "--mount"}, admin},
		"another user":           {[]string{setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"}, "it takes root, runs as user 65534"},
		"no CAP_SYS_CHROOT":      {[]string{setpriv, "--bounding-set=-sys_chroot"}, "CAP_SYS_CHROOT"},
		"none of what is spared": {[]string{setpriv, "--bounding-set=-perfmon,-bpf,-sys_ptrace,-syslog,-sys_nice,-net_admin,-mknod,-dac_read_search"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			list := filepath.Join(t.TempDir(), "list")
			args := append(tt.with[1:], program, "record", "--root", root, "--server-path", server, "-o", list, "--", "hello", "/etc/motd")
			cmd := exec.CommandContext(t.Context(), tt.with[0], args...)
			var out, errs strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &errs
			err := cmd.Run()
			if tt.fault == "" {
				if l := readListFile(t, list); err != nil || !l.Complete() || l.Engine != "fanotify+filemap" {
					t.Errorf("record: %v, %s, list by %s, losses %v; want a complete list with ranges", err, errs.String(), l.Engine, l.Losses)
				}
				return
			}
			exit, ok := errors.AsType[*exec.ExitError](err)
			if !ok || exit.ExitCode() != exitFailed || out.String() != "" || strings.Count(errs.String(), "\n") != 1 || !strings.Contains(errs.String(), tt.fault) {
				t.Errorf("record: %v, stdout %q, stderr %q; want status 1 and one line with %q", err, out.String(), errs.String(), tt.fault)
			}
			if _, err := os.Stat(list); err == nil {
				t.Error("a list was written")
			}
		})
	}
}
