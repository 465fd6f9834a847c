package tools

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// listsAge is how long the package lists that apt-get update fetched are taken
// as fresh. Older ones name versions that mirrors no longer hold.
const listsAge = time.Hour

// installDebian installs p with apt-get. Without root, or on a system without
// apt-get, the error says what to type. The caller holds the lock for apt.
func (s *Store) installDebian(ctx context.Context, p Package) error {
	packages := strings.Join(p.source, " ")
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("no apt-get here: install %s with the package manager of this system", packages)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("not root: run `sudo apt-get install --no-install-recommends %s`", packages)
	}
	env := []string{"DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"}
	options := []string{"-qq", "-y", "-o", "DPkg::Lock::Timeout=300"}
	stamp := filepath.Join(s.dir, ".apt-updated")
	if fi, err := os.Stat(stamp); err != nil || time.Since(fi.ModTime()) > listsAge {
		s.sayf("updating the package lists: apt-get update")
		update := command{name: "apt-get", args: append(options, "update"), env: env}
		if err := s.run(ctx, p, update); err != nil {
			return err
		}
		if err := errors.Join(os.RemoveAll(stamp), os.WriteFile(stamp, nil, 0o644)); err != nil {
			return err
		}
	}
	s.sayf("installing into this system: apt-get install %s", packages)
	args := append(options, "install", "--no-install-recommends")
	return s.run(ctx, p, command{name: "apt-get", args: append(args, p.source...), env: env})
}
