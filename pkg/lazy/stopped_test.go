package lazy_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// withSpare mounts r and waits until the daemon has its spare.
func (b *box) withSpare(dir string, r lazy.Request) (s lazy.Status) {
	b.t.Helper()
	b.mount(dir, r)
	eventually(b.t, func() string {
		if s = b.status(); s.Spare == 0 {
			return fmt.Sprintf("%+v, want a spare", s)
		}
		return ""
	})
	if s.Holder <= 1 || s.Spare <= 1 {
		b.t.Fatalf("%+v, want a holder and a spare", s)
	}
	return s
}

// stopped stops processes, as if they got no processor for a while; goOn ends that.
func stopped(t *testing.T, pids ...int) (goOn func()) {
	t.Helper()
	goOn = func() {
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGCONT) // it may have ended
		}
	}
	t.Cleanup(goOn)
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	return goOn
}

// A holder that is slow to close what it kept keeps the collector from it, and the daemon stays until it is collected.
func TestCollectBehindHolder(t *testing.T) {
	for name, who := range map[string]func(lazy.Status) int{
		"holder": func(s lazy.Status) int { return s.Holder }, "spare": func(s lazy.Status) int { return s.Spare },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			b.command("--cache-limit", "1")
			dir := b.mountpoint("mnt")
			goOn := stopped(t, who(b.withSpare(dir, loose(t, "v6-zstd"))))
			b.unmount(dir)
			if c := b.cache(); len(c.Entries) == 0 {
				t.Fatal("nothing is left while the holder is stopped: nothing is shown")
			}
			for until := time.Now().Add(4 * time.Second); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
				if s, err := b.client.Status(t.Context(), false); errors.Is(err, lazy.ErrNoDaemon) {
					t.Errorf("%+v, %v: the daemon has not collected, and does not stay", s, err)
					break
				}
			}
			goOn()
			b.alone()
			if c := b.cache(); len(c.Entries) != 0 {
				t.Errorf("%+v, want nothing left", c.Entries)
			}
		})
	}
}

// Who mounts again goes on with what was fetched, although neither the holder nor the spare has closed it yet, and waits for neither.
func TestRemountBehindHolders(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.command("--idle", "5m")
	t.Cleanup(func() { // it would stay for its idle time
		if s, err := b.client.Status(context.Background(), false); err == nil {
			_ = unix.Kill(s.PID, unix.SIGTERM)
		}
	})
	dir, r := b.mountpoint("mnt"), layout(t)
	s := b.withSpare(dir, r)
	if _, err := os.ReadFile(biggest(t, dir)); err != nil {
		t.Fatal(err)
	}
	local := b.status().Mounts[0].Local
	if local == 0 {
		t.Fatal("nothing was read: nothing is shown")
	}
	goOn := stopped(t, s.Holder, s.Spare)
	for range 3 {
		b.unmount(dir)
		if m := b.mount(dir, r); m.Local < local {
			t.Errorf("%d bytes local after the remount, %d before", m.Local, local)
		}
	}
	goOn()
	compare(t, dir)
	if after := b.status(); after.PID != s.PID {
		t.Errorf("daemon %d, want %d still", after.PID, s.PID)
	}
	b.unmount(dir)
	logs, err := filepath.Glob(filepath.Join(b.run, "*.log"))
	if err != nil || len(logs) == 0 {
		t.Fatal(logs, err)
	}
	for _, name := range logs {
		log, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, bad := range []string{"anew", "lost its data", "is in use"} {
			if strings.Contains(string(log), bad) {
				t.Errorf("%s has %q", filepath.Base(name), bad)
			}
		}
	}
}
