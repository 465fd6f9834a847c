package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/atomicfile"
)

// What others left in a directory keeps nobody from writing there, and a file that is replaced keeps its permissions.
func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, atomicfile.TempPrefix+"D", "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	say := func(text string) func(io.Writer) error {
		return func(w io.Writer) error { _, err := io.WriteString(w, text); return err }
	}
	name := filepath.Join(dir, "new")
	for _, tc := range []struct {
		text string
		perm os.FileMode // of the file afterwards
	}{{"one", 0o644}, {"two", 0o600}, {"three", 0o666}} {
		if tc.text != "one" {
			if err := os.Chmod(name, tc.perm); err != nil {
				t.Fatal(err)
			}
		}
		if err := writeFile(name, say(tc.text)); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if tc.text == "one" { // as the umask has it
			tc.perm &= info.Mode().Perm()
		}
		if string(b) != tc.text || info.Mode().Perm() != tc.perm {
			t.Errorf("got %q with %v, want %q with %v", b, info.Mode().Perm(), tc.text, tc.perm)
		}
	}
}

// A list that could not be written is refused before anything is recorded, and looking leaves nothing.
func TestTryOutput(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		o    recordOptions
		want string
	}{
		"new":               {recordOptions{output: filepath.Join(dir, "new")}, ""},
		"there":             {recordOptions{output: file}, ""},
		"no directory":      {recordOptions{output: filepath.Join(dir, "no", "new")}, filepath.Join(dir, "no")},
		"below a file":      {recordOptions{output: filepath.Join(file, "new")}, file},
		"a directory":       {recordOptions{output: dir}, "want a file"},
		"no place to write": {recordOptions{output: "/proc/new"}, "/proc/new"},
		"a device":          {recordOptions{output: os.DevNull}, ""},
		"the store":         {recordOptions{store: filepath.Join(dir, "store")}, ""},
		"no store":          {recordOptions{store: file}, file},
	} {
		err := tc.o.tryOutput()
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	hidden, err2 := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || err2 != nil || len(names) != 2 || len(hidden) != 0 {
		t.Errorf("the directory has %q and %q, %v, %v; want the file and the store", names, hidden, err, err2)
	}
	if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, []byte("old")) {
		t.Errorf("the file has %q, %v", b, err)
	}
}

// Signals do not end the wait for a process.
func TestAwaitEnd(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // it may have been killed before
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := awaitEnd(fd, 10*time.Millisecond); err == nil || !strings.Contains(err.Error(), "does not end") {
		t.Errorf("of a process that goes on: %v", err)
	}
	ignored := make(chan os.Signal, 1)
	signal.Notify(ignored, unix.SIGWINCH)
	defer signal.Stop(ignored)
	thread, ended := make(chan int), make(chan error)
	go func() {
		runtime.LockOSThread()
		thread <- unix.Gettid()
		ended <- awaitEnd(fd, time.Minute)
	}()
	tid := <-thread
	for range 50 {
		if err := unix.Tgkill(os.Getpid(), tid, unix.SIGWINCH); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Millisecond)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("of a process that ended: %v", err)
	}
}
