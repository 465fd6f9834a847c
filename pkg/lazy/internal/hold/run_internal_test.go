package hold

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// A daemon that cannot be given everything is not waited for: it would wait for the rest.
func TestRestartCannotGive(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	conn, theirs, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	gone, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if err := gone.Close(); err != nil { // what is closed cannot be sent
		t.Fatal(err)
	}
	h := &holder{log: zap.NewNop(), argv: []string{"sleep", "600"}, program: sleep, files: map[string]*os.File{"gone": gone}, conn: conn, daemon: -1}
	if err := h.restart(); err == nil {
		t.Error("restart() = nil without giving everything")
	}
	if h.child == nil {
		t.Fatal("no daemon was started: nothing is shown")
	}
	child := h.child.Process
	served := make(chan error, 1)
	go func() {
		done, err := h.serve()
		if done {
			t.Error("serve() says that the daemon is done")
		}
		served <- err
	}()
	select {
	case err = <-served:
	case <-time.After(time.Minute):
		t.Error("the holder waits for a daemon that waits for it")
		if err := child.Signal(unix.SIGKILL); err != nil {
			t.Error(err)
		}
		err = <-served
	}
	if err != nil {
		t.Errorf("serve() = %v", err)
	}
}
