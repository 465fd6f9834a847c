package testcri

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"

	"golang.org/x/sys/unix"
)

// defaultSnapshotter is containerd's own choice.
const defaultSnapshotter = "overlayfs"

// optionalSnapshotters need a filesystem, a device or a configuration of their own to start, and are off unless asked for.
var optionalSnapshotters = []string{"blockfile", "btrfs", "devmapper", "erofs", "zfs"}

// configTemplate is containerd's configuration. Every path that has a default
// outside the private directory is set.
const configTemplate = `version = 3
root = "{{.Dir}}/root"
state = "{{.Dir}}/state"
temp = "{{.Dir}}/tmp"
imports = []
disabled_plugins = [{{range .Unused}}"io.containerd.snapshotter.v1.{{.}}", {{end}}"io.containerd.image-verifier.v1.bindir"]

[grpc]
  address = "{{.Address}}"
[ttrpc]
  address = "{{.Address}}.ttrpc"
[debug]
  level = "{{.Level}}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{{.Dir}}/opt"
[plugins."io.containerd.shim.v1.manager"]
  socket_dir = "{{.Sockets}}"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{{.Snapshotter}}"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{{.Pause}}"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "{{.Hosts}}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = {{.RestrictOOM}}
  enable_criu = false
  cdi_spec_dirs = []
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{{.Dir}}/cni"]
    conf_dir = "{{.Dir}}/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = "{{.Runc}}"
      Root = "{{.Dir}}/runc"
      SystemdCgroup = false
[plugins."io.containerd.nri.v1.nri"]
  disable = false
  socket_path = "{{.NRISocket}}"
  plugin_path = "{{.Plugins}}"
  plugin_config_path = "{{.PluginConfigs}}"
  disable_connections = false

{{.Extra}}
`

// writeFiles lays down the private directory: containerd's configuration, NRI
// plugins and their configurations, registry hosts.
func (e *Env) writeFiles(o Options) error {
	for _, dir := range []string{e.PluginDir(), e.PluginConfigDir(), e.HostsDir(), filepath.Join(e.dir, "tmp")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	for name, program := range o.Plugins {
		if err := e.InstallPlugin(name, program); err != nil {
			return err
		}
	}
	for name, text := range o.PluginConfigs {
		if err := os.WriteFile(filepath.Join(e.PluginConfigDir(), name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	for host, text := range o.Hosts {
		if err := e.AddHost(host, text); err != nil {
			return err
		}
	}
	restrict, err := lacksCapability(unix.CAP_SYS_RESOURCE)
	if err != nil {
		return err
	}
	level := "info"
	if o.Debug {
		level = "debug"
	}
	var config bytes.Buffer
	err = template.Must(template.New("config").Parse(configTemplate)).Execute(&config, map[string]any{
		"Dir": e.dir, "Address": e.Address(), "Level": level, "Sockets": filepath.Join(e.runDir, "s"),
		"Pause": pauseRef, "Hosts": e.HostsDir(), "RestrictOOM": restrict, "Runc": e.bins.runc,
		"NRISocket": e.NRISocket(), "Plugins": e.PluginDir(), "PluginConfigs": e.PluginConfigDir(),
		"Extra": o.Config, "Snapshotter": e.snaps,
		"Unused": slices.DeleteFunc(slices.Clone(optionalSnapshotters), func(s string) bool { return s == e.snaps }),
	})
	if err != nil {
		return err
	}
	return os.WriteFile(e.configPath(), config.Bytes(), 0o644)
}

func (e *Env) configPath() string { return filepath.Join(e.dir, "config.toml") }

// InstallPlugin copies program into the NRI plugin directory as name, by rename.
// containerd launches it at its next start.
func (e *Env) InstallPlugin(name, program string) (err error) {
	src, err := os.Open(program)
	if err != nil {
		return fmt.Errorf("install plugin %s: %w", name, err)
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	tmp, err := os.CreateTemp(e.dir, "plugin-*")
	if err != nil {
		return fmt.Errorf("install plugin %s: %w", name, err)
	}
	_, err = io.Copy(tmp, src)
	err = errors.Join(err, tmp.Chmod(0o755), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(e.PluginDir(), name))
	}
	if err != nil {
		return fmt.Errorf("install plugin %s: %w", name, err)
	}
	return nil
}

// AddHost writes the hosts.toml of a registry host, which containerd reads at
// each pull.
func (e *Env) AddHost(host, hostsTOML string) error {
	dir := filepath.Join(e.HostsDir(), host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(hostsTOML), 0o644)
}

// lacksCapability says whether this process is without a capability. Without
// CAP_SYS_RESOURCE runc cannot lower a container's OOM score below our own.
func lacksCapability(capability int) (bool, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false, err
	}
	_, rest, ok := strings.Cut(string(status), "CapEff:")
	line, _, _ := strings.Cut(rest, "\n")
	if !ok {
		return false, errors.New("/proc/self/status has no CapEff line")
	}
	set, err := strconv.ParseUint(strings.TrimSpace(line), 16, 64)
	if err != nil {
		return false, fmt.Errorf("/proc/self/status: CapEff: %w", err)
	}
	return set>>capability&1 == 0, nil
}
