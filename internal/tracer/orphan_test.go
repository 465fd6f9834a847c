package tracer_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// TestOrphanDisarms holds that a server whose parent was killed leaves an instance that does nothing: nobody
// removes it before the next recording, and process numbers are reused.
func TestOrphanDisarms(t *testing.T) {
	b := newDiskBox(t, identitySetup)
	c := b.create(t, pivot, "/program", "files", "read:/s/plain", "pause:60s")
	fs, err := tracefs.Open()
	testenv.Kernel(t, "tracefs", err)
	instance, err := fs.Create(tracefs.Options{})
	testenv.Kernel(t, "page events", err)
	t.Cleanup(func() {
		if err := errors.Join(instance.Close(), fs.Close()); err != nil {
			t.Error(err)
		}
	})
	read := func(name string) string {
		t.Helper()
		fd, err := unix.Openat(int(instance.File().Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), name)
		text, err := io.ReadAll(f)
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(text))
	}
	spec, err := instance.Spec().MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(testenv.Binary(t, "optimizer-server"), "--pid", fmt.Sprint(c.pid()), "--pages", string(spec))
	cmd.ExtraFiles = []*os.File{instance.File()}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	wait := testenv.Start(t, cmd)
	if _, err := io.ReadFull(out, make([]byte, 20)); err != nil { // it is ready
		t.Fatal(err)
	}
	if on, pids := read("events/enable"), read("set_event_pid"); on == "0" || pids == "" {
		t.Fatalf("while it records: events %q, processes %q", on, pids)
	}
	// What a parent that was killed does: both ends close at once.
	_, _ = in.Close(), out.Close()
	_ = wait() // it could not write; nobody reads
	if on, pids := read("events/enable"), read("set_event_pid"); on != "0" || pids != "" {
		t.Errorf("after its end: events %q, processes %q, want none", on, pids)
	}
}
