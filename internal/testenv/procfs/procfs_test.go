package procfs_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/testenv/procfs"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func find(t *testing.T, pid int) (procfs.Process, bool) {
	t.Helper()
	all, err := procfs.Processes()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(p procfs.Process) bool { return p.PID == pid })
	if i < 0 {
		return procfs.Process{}, false
	}
	return all[i], true
}

func TestProcesses(t *testing.T) {
	cmd := exec.Command("sleep", "600")
	cmd.Env = []string{"PROCFS_TEST=a b", "OTHER=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	p, ok := find(t, pid)
	if !ok || p.Parent != os.Getpid() || p.Group != pid || p.Zombie {
		t.Errorf("Processes has %+v, %v, want a live child in a group of its own", p, ok)
	}
	if !p.HasEnv("PROCFS_TEST=a b") || p.HasEnv("PROCFS_TEST=a") || p.HasEnv("PROCFS_TEST") {
		t.Error("HasEnv does not compare whole assignments")
	}
	if filepath.Base(p.Program()) != "sleep" && !strings.Contains(p.Program(), "box") {
		t.Errorf("Program = %q, want sleep", p.Program())
	}
	if got := p.CommandLine(); got != "sleep 600" {
		t.Errorf("CommandLine = %q, want sleep 600", got)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		if p, ok := find(t, pid); ok && p.Zombie {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a killed child that nobody waited for is no zombie")
		}
		time.Sleep(time.Millisecond)
	}
	_ = cmd.Wait() // killed
	if p, ok := find(t, pid); ok {
		t.Errorf("Processes has %+v after Wait, want nothing", p)
	}
}

func TestMountsBelow(t *testing.T) {
	testenv.Root(t)
	dir := filepath.Join(t.TempDir(), "with space")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	testenv.MountNamespace(t, func() error {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return err
		}
		inner := filepath.Join(dir, "inner")
		if err := os.Mkdir(inner, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", inner, "tmpfs", 0, ""); err != nil {
			return err
		}
		got, err := procfs.MountsBelow(filepath.Dir(dir))
		if want := []string{dir, inner}; err == nil && !slices.Equal(got, want) {
			t.Errorf("MountsBelow = %q, want %q", got, want)
		}
		return err
	})
	if got, err := procfs.MountsBelow(filepath.Dir(dir)); err != nil || len(got) > 0 {
		t.Errorf("MountsBelow outside the namespace = %q, %v, want none", got, err)
	}
}
