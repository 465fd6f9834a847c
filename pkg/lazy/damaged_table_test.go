package lazy_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

// What is pending is in memory that the holders keep. When it makes no sense, the next daemon does without: readers that wait get an error,
// and the mount goes on.
func TestDamagedTable(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), loose(t, "v6-zstd"))
	before := b.status()
	table := b.pending(before.PID)
	// Two slots of the middle, which nothing gets to, with the same descriptor.
	const header, inbox, slot, pending = 8 * 8, 64 * (fanotify.MetadataSize + fanotify.RangeInfoSize), 5 * 8, 1 << 32
	for n := range int64(2) {
		if _, err := table.WriteAt(binary.NativeEndian.AppendUint64(nil, pending|5000), header+inbox+(2000+n)*slot); err != nil {
			t.Fatal(err)
		}
	}
	if err := table.Close(); err != nil {
		t.Fatal(err)
	}
	b.killDaemon()
	eventually(t, func() string {
		s, err := b.client.Status(t.Context(), false)
		if err != nil || s.PID == before.PID || len(s.Mounts) != 1 || s.Mounts[0].State != lazy.StateLazy {
			return fmt.Sprintf("%+v, %v, want another daemon, and the mount lazy", s, err)
		}
		return ""
	})
	if t.Failed() {
		return // its readers wait
	}
	compare(t, m.Dir)
	text, err := os.ReadFile(b.log())
	if err != nil || !strings.Contains(string(text), "pending twice") {
		t.Errorf("the log says nothing of the table (%v)", err)
	}
	b.unmount(m.Dir)
}

// log returns the name of the daemon's log.
func (b *box) log() string {
	b.t.Helper()
	logs, err := filepath.Glob(filepath.Join(b.run, "*.log"))
	if err != nil || len(logs) != 1 {
		b.t.Fatalf("logs %q, %v, want one", logs, err)
	}
	return logs[0]
}

// pending opens the table of pending events of a daemon.
func (b *box) pending(pid int) *os.File {
	b.t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		b.t.Fatal(err)
	}
	for _, fd := range fds {
		name, err := os.Readlink(fd)
		if errors.Is(err, os.ErrNotExist) || !strings.Contains(name, "headstart-pending") {
			continue
		}
		f, err := os.OpenFile(fd, os.O_RDWR, 0)
		if err != nil {
			b.t.Fatal(err)
		}
		return f
	}
	b.t.Fatalf("process %d has no table of pending events", pid)
	return nil
}
