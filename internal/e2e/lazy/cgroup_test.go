package lazy_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// TestClientsGroup mounts from a control group that is ended as a whole, as a service is: daemon and holder are outside of it, and
// the mount is served.
func TestClientsGroup(t *testing.T) {
	img := newImages(t)
	root := "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err != nil {
		root = filepath.Join(root, "unified")
	}
	group, err := os.MkdirTemp(root, "headstart-test-")
	if err != nil {
		testenv.Kernel(t, "a cgroup2 hierarchy in which control groups can be made", err)
	}
	t.Cleanup(func() {
		for _, dir := range []string{group, filepath.Join(root, "headstart-lazyd")} {
			if err := os.Remove(dir); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, os.ErrNotExist) { // of another test's daemon
				t.Error(err)
			}
		}
	})
	r := newRig(t)
	fd, err := unix.Open(group, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer func() { must(t, unix.Close(fd)) }()
	dir := t.TempDir()
	cmd := exec.Command(r.optimizer, "mount", "--state-dir", r.state, "--run-dir", r.run, "--background", "none", img.ours(t, "plain"), dir)
	cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("mount in a control group: %v\n%s", err, out)
	}
	r.dirs = append(r.dirs, dir)
	s, err := r.status()
	must(t, err)
	for _, pid := range []int{s.PID, s.Holder} {
		groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil || !strings.Contains(string(groups), "0::/headstart-lazyd\n") {
			t.Errorf("%d is in the groups %q, %v", pid, groups, err)
		}
	}
	if err := os.WriteFile(filepath.Join(group, "cgroup.kill"), []byte("1"), 0); err != nil {
		t.Logf("the group cannot be killed, and is empty: %v", err)
	}
	for range 100 { // its last process ends
		if err = os.Remove(group); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	must(t, err)
	readAll(t, dir, img.want, 1, 4)
	must(t, r.umount(dir))
}
