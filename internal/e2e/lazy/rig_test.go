package lazy_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/endproc"
	"github.com/headstart-oci/headstart/internal/testenv"
)

// patience bounds every wait for something that normally takes a moment.
const patience = 60 * time.Second

// status is what `optimizer status -o json` says, as far as it is used here.
type status struct {
	PID    int `json:"pid"`
	Holder int `json:"holder_pid"`
	Spare  int `json:"spare_pid"`
	Mounts []struct {
		Dir        string `json:"dir"`
		State      string `json:"state"`
		Local      int64  `json:"local_bytes"`
		Total      int64  `json:"total_bytes"`
		Prefetched bool   `json:"prefetched"`
		Stats      struct {
			Demand   struct{ Requests, Bytes, Chunks int64 } `json:"demand"`
			Prefetch struct{ Requests, Bytes, Chunks int64 } `json:"prefetch"`
			Waits    int64                                   `json:"waits"`
			Misses   int64                                   `json:"misses"`
			Corrupt  int64                                   `json:"corrupt"`
			Failed   int64                                   `json:"failed"`
		} `json:"stats"`
		Misses []struct {
			Path   string `json:"path"`
			Blob   string `json:"blob"`
			Chunk  int64  `json:"chunk"`
			Late   bool   `json:"late"`
			Listed bool   `json:"listed"`
		} `json:"misses"`
	} `json:"mounts"`
}

// rig is a state directory and a run directory, with the daemon that the command starts for them.
type rig struct {
	optimizer  string
	driver     string // of its mounts; empty: what mount takes by itself
	state, run string
	dirs       []string // where something was mounted
}

// newRig returns directories with nothing in them. What is mounted through them is unmounted when the test ends, and
// daemon and holder are ended.
func newRig(t *testing.T) *rig {
	t.Helper()
	testenv.Root(t)
	r := &rig{optimizer: testenv.Binary(t, "optimizer"), state: t.TempDir(), run: t.TempDir()}
	t.Cleanup(func() {
		s, err := r.status()
		if err == nil {
			for _, m := range s.Mounts {
				// A mount that was copied into another mount namespace is not here any more, and lives on.
				if err := r.umount(m.Dir); err != nil && !strings.Contains(err.Error(), "no lazy mount") {
					t.Error(err)
				}
			}
		}
		for _, dir := range r.dirs { // where the daemon is gone, mounts are not
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
				t.Error(err)
			}
		}
		if err := endproc.Logging(r.run, s.Spare, s.Holder, s.PID); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			logs, _ := filepath.Glob(filepath.Join(r.run, "*.log"))
			for _, name := range logs {
				text, _ := os.ReadFile(name)
				t.Logf("%s:\n%s", filepath.Base(name), text[max(0, len(text)-3000):])
			}
		}
	})
	return r
}

// newRigOf is newRig for mounts of one driver.
func newRigOf(t *testing.T, driver string) *rig {
	t.Helper()
	r := newRig(t)
	r.driver = driver
	return r
}

// eachDriver runs a test once for each driver.
func eachDriver(t *testing.T, f func(t *testing.T, driver string)) {
	for _, driver := range []string{"erofs", "fuse"} {
		t.Run(driver, func(t *testing.T) { f(t, driver) })
	}
}

// command runs the optimizer for the rig's directories and returns its standard output.
func (r *rig) command(verb string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	all := append([]string{verb, "--state-dir", r.state, "--run-dir", r.run}, args...)
	cmd := exec.CommandContext(ctx, r.optimizer, all...)
	var said bytes.Buffer
	cmd.Stderr = &said
	cmd.WaitDelay = time.Second // a daemon must not keep our pipes; if it does, this says so
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("optimizer %s: %w: %s", strings.Join(all, " "), err, said.String())
	}
	return out, nil
}

// mount mounts an image and returns where.
func (r *rig) mount(t *testing.T, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	if r.driver != "" {
		args = append([]string{"--driver", r.driver}, args...)
	}
	_, err := r.command("mount", append(args, dir)...)
	if err != nil && strings.Contains(err.Error(), "not supported by this kernel") {
		testenv.Kernel(t, "file-backed EROFS and pre-content events (Linux 6.14)", err)
	}
	must(t, err)
	r.dirs = append(r.dirs, dir)
	return dir
}

func (r *rig) umount(dir string) error {
	deadline := time.Now().Add(patience)
	for {
		_, err := r.command("umount", dir)
		// A reader that was killed holds its files for a moment.
		if err == nil || time.Now().After(deadline) || !strings.Contains(err.Error(), "in use") {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (r *rig) status() (s status, err error) {
	out, err := r.command("status", "-o", "json")
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	return s, err
}

// waitStatus waits until the status is as wanted.
func (r *rig) waitStatus(t *testing.T, what string, ok func(status) bool) status {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		s, err := r.status()
		if err == nil && ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("no %s after %s: %+v, %v", what, patience, s, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
