package tools_test

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tools"
)

// TestMakeInstall runs the Makefile's install targets on stand-ins for the
// programs and compares what they put below DESTDIR.
func TestMakeInstall(t *testing.T) {
	testenv.Tool(t, "make")
	root, err := tools.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	const config = "etc/nri/conf.d/02-optimizer-nri-plugin.conf"
	plugin := map[string]os.FileMode{"opt/nri/plugins/02-optimizer-nri-plugin": 0o755}
	lazyd := maps.Clone(plugin)
	lazyd["etc/systemd/system/headstart-lazyd.service"] = 0o644
	for target, want := range map[string]map[string]os.FileMode{
		"install-optimizer": plugin,
		"install-lazyd":     lazyd,
		"install-service":   {"usr/local/bin/optimizer-nri-plugin": 0o755, "etc/systemd/system/optimizer-nri-plugin.service": 0o644},
	} {
		t.Run(target, func(t *testing.T) {
			want["usr/local/bin/optimizer"], want["usr/local/bin/optimizer-server"], want[config] = 0o755, 0o755, 0o644
			dir, dest := t.TempDir(), t.TempDir()
			if err := os.Symlink(filepath.Join(root, "configs"), filepath.Join(dir, "configs")); err != nil {
				t.Fatal(err)
			}
			run := func() (string, error) {
				cmd := exec.CommandContext(t.Context(), "make", "-C", dir, "-f", filepath.Join(root, "Makefile"), target, "DESTDIR="+dest)
				out, err := cmd.CombinedOutput()
				return string(out), err
			}
			if out, err := run(); err == nil || !strings.Contains(out, "run make optimizer first") {
				t.Fatalf("make %s without programs = %v, printed %q, want what to do first", target, err, out)
			}
			if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"optimizer", "optimizer-server", "optimizer-nri-plugin"} {
				script(t, filepath.Join(dir, "bin", name), "exit 0")
			}
			if out, err := run(); err != nil {
				t.Fatalf("make %s: %v\n%s", target, err, out)
			}
			if got := installed(t, dest); !maps.Equal(got, want) {
				t.Errorf("make %s installed %v, want %v", target, got, want)
			}
			// What the user wrote stays.
			if err := os.WriteFile(filepath.Join(dest, config), []byte("mine"), 0o644); err != nil {
				t.Fatal(err)
			}
			if out, err := run(); err != nil {
				t.Fatalf("make %s again: %v\n%s", target, err, out)
			}
			if text, err := os.ReadFile(filepath.Join(dest, config)); err != nil || string(text) != "mine" {
				t.Errorf("the config after a second install is %q, %v, want it untouched", text, err)
			}
		})
	}
}

// installed returns the regular files below dir with their modes.
func installed(t *testing.T, dir string) map[string]os.FileMode {
	t.Helper()
	got := map[string]os.FileMode{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		got[name] = fi.Mode().Perm()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}
