package watch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// Errors of opening an event's file pass, those of the group do not.
func TestPasses(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]bool{
		unix.EMFILE: true, unix.ENFILE: true, unix.ENOMEM: true, unix.EIO: true, unix.ESTALE: true,
		unix.EBADF: false, unix.EINVAL: false, unix.EFAULT: false, fanotify.ErrEmpty: false, fanotify.ErrInvalid: false, os.ErrClosed: false,
	} {
		if got := passes(fmt.Errorf("read fanotify events: %w", err)); got != want {
			t.Errorf("passes(%v) = %t, want %t", err, got, want)
		}
	}
	w := &Watcher{log: zap.NewNop()}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 2 {
		w.pause(ctx, errors.New("an error that passes"))
	}
	if n := w.denied.Load(); n != 2 || w.said.IsZero() {
		t.Errorf("%d reads denied, want 2", n)
	}
}
