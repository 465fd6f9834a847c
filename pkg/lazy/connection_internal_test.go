package lazy

import (
	"errors"
	"os"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/hold"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// A connection that cannot be answered any more ends, and its mount says so.
func TestServerFails(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	testenv.Kernel(t, "FUSE", fuse.Probe())
	dev, err := fuse.Open() // and not mounted: a read of it is an error
	if err != nil {
		t.Fatal(err)
	}
	table, err := fuse.NewTable()
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{log: zap.NewNop(), link: &hold.Link{}, poke: make(chan struct{}, 1)}
	m := &mount{over: make(chan struct{})}
	c, err := d.connect(m, &rafs.Image{Root: &rafs.Inode{}}, dev, table)
	if err != nil {
		t.Fatal(errors.Join(err, dev.Close(), table.Close()))
	}
	d.answer(m, c)
	select {
	case <-m.over:
	case <-time.After(time.Minute):
		t.Fatal("nobody notices that nobody answers")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if m.failed == "" || m.conn.Load() != nil {
		t.Errorf("failed %q, connection %v, want an error and none", m.failed, m.conn.Load())
	}
	if err := dev.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the device was open still: %v", err)
	}
	if err := d.disconnect(m); err != nil {
		t.Errorf("disconnect = %v", err)
	}
}

// An error that passes does not decide which drivers there are for good; what the kernel does not have stays away.
func TestDriversAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d := &daemon{o: DaemonOptions{StateDir: dir}, noEROFS: unix.ENOSPC, noFUSE: unix.EMFILE}
	noEROFS, noFUSE := d.drivers()
	if errors.Is(noEROFS, unix.ENOSPC) || errors.Is(noFUSE, unix.EMFILE) {
		t.Errorf("drivers() = %v, %v, as before", noEROFS, noFUSE)
	}
	d.noEROFS, d.noFUSE = fanotify.ErrUnsupported, fuse.ErrUnsupported
	if noEROFS, noFUSE = d.drivers(); noEROFS != fanotify.ErrUnsupported || noFUSE != fuse.ErrUnsupported { //nolint:errorlint // these very ones
		t.Errorf("drivers() = %v, %v, want what is absent to be so", noEROFS, noFUSE)
	}
}

// A device is closed after its server has let go of its number, however long that takes, and once.
func TestCloseAfter(t *testing.T) {
	t.Parallel()
	ended, calls := make(chan struct{}), make(chan struct{}, 2)
	closed := closeAfter(ended, func() error {
		calls <- struct{}{}
		return unix.EBADF
	})
	select {
	case <-calls:
		t.Error("closed while the server has it")
	case <-time.After(20 * time.Millisecond):
	}
	close(ended)
	if err := <-closed; !errors.Is(err, unix.EBADF) {
		t.Errorf("what the end says is %v, want EBADF", err)
	}
	if len(calls) != 1 {
		t.Errorf("closed %d times", len(calls))
	}
}
