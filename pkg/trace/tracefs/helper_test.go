package tracefs_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// helpers are programs that the test binary is with helperEnv, by name.
var helpers = map[string]func() error{
	"workload": func() error { return workload(os.Args[1:]) },
	"nothing":  func() error { return nil },
	"open":     openHelper,
	"own":      ownHelper,
	"hold":     holdHelper,
	"record":   recordHelper,
}

// helper returns the command that runs a helper.
func helper(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), helperEnv+"="+name)
	cmd.Stderr = os.Stderr
	return cmd
}

// openHelper says which error opening a tracefs is.
func openHelper() error {
	fs, err := tracefs.Open()
	switch {
	case errors.Is(err, tracefs.ErrUnsupported):
		fmt.Println("unsupported:", err)
	case errors.Is(err, tracefs.ErrPermission):
		fmt.Println("permission:", err)
	case err != nil:
		return err
	default:
		fmt.Println("opened")
		return fs.Close()
	}
	return nil
}

// ownHelper makes an instance, arms it with itself, says its name and waits.
func ownHelper() error {
	fs, err := tracefs.Open()
	if err != nil {
		return err
	}
	in, err := fs.Create(tracefs.Options{Ring: 1})
	if err != nil {
		return err
	}
	threads, err := tracefs.Threads(os.Getpid())
	if err != nil {
		return err
	}
	if err := in.Arm(threads...); err != nil {
		return err
	}
	var held *exec.Cmd
	if len(os.Args) > 1 { // somebody inherits it
		held = exec.Command("/proc/self/exe")
		held.Env = append(os.Environ(), helperEnv+"=hold")
		held.ExtraFiles = []*os.File{in.File()}
		held.Stdin = os.Stdin
		if err := held.Start(); err != nil {
			return err
		}
	}
	fmt.Println(in.Name())
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func holdHelper() error {
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// recordHelper records process os.Args[2] in the instance that is descriptor 3 until its
// standard input ends, and prints how many pages of inode os.Args[3] were read.
func recordHelper() error {
	var spec tracefs.Spec
	if err := spec.UnmarshalText([]byte(os.Args[1])); err != nil {
		return err
	}
	pid, err := strconv.Atoi(os.Args[2])
	if err != nil {
		return err
	}
	inode, err := strconv.ParseUint(os.Args[3], 10, 64)
	if err != nil {
		return err
	}
	in, err := tracefs.FromFile(os.NewFile(3, "instance"), spec)
	if err != nil {
		return err
	}
	r, err := in.Reader()
	if err != nil {
		return err
	}
	threads, err := tracefs.Threads(pid)
	if err != nil {
		return err
	}
	if err := in.Arm(threads...); err != nil {
		return err
	}
	fmt.Println("armed")
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		r.Stop()
	}()
	events := make([]tracefs.Event, 100)
	got := pages{}
	for {
		n, err := r.Read(events)
		for p := range of(events[:n], tracefs.Read, inode, filePages) {
			got[p] = true
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	fmt.Println(len(got))
	return errors.Join(r.Close(), in.Close())
}

// instances returns the instances that process pid made.
func instances(t testing.TB, pid int) []string {
	t.Helper()
	var names []string
	dir := t.TempDir()
	testenv.MountNamespace(t, func() error {
		if err := unix.Mount("tracefs", dir, "tracefs", 0, ""); err != nil {
			return err
		}
		entries, err := os.ReadDir(filepath.Join(dir, "instances"))
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), fmt.Sprintf("%s%d-", tracefs.Prefix, pid)) {
				names = append(names, e.Name())
			}
		}
		return err
	})
	return names
}
