package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// awaitInstance waits until a plugin of this host has a trace instance ready: what starts before that is
// listed by whole files at first. The pool makes one after the other, so the first is ready when there are two.
func (h *host) awaitInstance(t *testing.T) {
	t.Helper()
	eventually(t, "trace instances of the plugin", func() error {
		programs, err := filepath.Glob("/proc/[0-9]*/exe")
		must(t, err)
		for _, exe := range programs {
			to, err := os.Readlink(exe)
			if err != nil || !strings.HasPrefix(to, h.PluginDir()+"/") && !strings.HasPrefix(to, h.base+"/") {
				continue // gone, or none of ours
			}
			n := 0
			fds, _ := filepath.Glob(filepath.Join(filepath.Dir(exe), "fd/*")) // the process may be gone
			for _, fd := range fds {
				if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(filepath.Base(to), tracefs.Prefix) {
					n++
				}
			}
			if n >= 2 {
				return nil
			}
		}
		return fmt.Errorf("no plugin has any, among %d processes", len(programs))
	})
}
