package main

import (
	"bufio"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"go.uber.org/zap"
)

// ownCgroup is the control group of daemons that a client started, below the root.
const ownCgroup = "headstart-lazyd"

// leaveCgroup moves this process out of the control groups of who started it: when that is a service or a session which
// is ended as a whole, daemon and holder would die at once, and with them what guards the mounts from reading zeros. Only the
// hierarchies matter by which processes are ended: cgroup2's, and systemd's own beside version 1. What keeps it from that, as in a
// container, is said.
func leaveCgroup(log *zap.Logger) {
	f, err := os.Open("/proc/self/cgroup")
	if err != nil {
		log.Info("control groups", zap.Error(err))
		return
	}
	defer func() { _ = f.Close() }()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		_, rest, _ := strings.Cut(lines.Text(), ":")
		controllers, path, _ := strings.Cut(rest, ":")
		if path == "/" || path == "/"+ownCgroup || controllers != "" && controllers != "name=systemd" {
			continue
		}
		if err := moveTo(filepath.Join(cgroupRoot(controllers), ownCgroup)); err != nil {
			log.Info("the daemon stays in the control group of who started it, and may be ended with it", zap.String("group", path), zap.Error(err))
		}
	}
}

// cgroupRoot returns where a hierarchy is mounted, as systemd does it (cgroups(7)).
func cgroupRoot(controllers string) string {
	const root = "/sys/fs/cgroup"
	if controllers != "" {
		return filepath.Join(root, strings.TrimPrefix(controllers, "name="))
	}
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err == nil {
		return root
	}
	return filepath.Join(root, "unified")
}

// moveTo moves this process into a control group, which is made when it is missing.
func moveTo(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0)
}
