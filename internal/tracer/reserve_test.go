package tracer_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// standing returns the servers of this process that stand by.
func standing(t *testing.T) (pids []int) {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		line, err := os.ReadFile(name)
		if err != nil || !strings.HasSuffix(string(line), "optimizer-server\x00--standby\x00") {
			continue // gone, or something else
		}
		var pid, parent int
		var state string
		stat, _ := os.ReadFile(filepath.Join(filepath.Dir(name), "stat"))
		if _, err := fmt.Sscanf(string(stat), "%d (optimizer-serve) %s %d", &pid, &state, &parent); err == nil && parent == os.Getpid() && state != "Z" {
			pids = append(pids, pid)
		}
	}
	return pids
}

// stand waits until n servers stand by and returns them: those that wait for orders.
func stand(t *testing.T, n int) []int {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		pids := standing(t)
		if len(pids) == n && !slices.ContainsFunc(pids, func(pid int) bool {
			call, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", pid))
			return err != nil || !strings.HasPrefix(string(call), fmt.Sprint(unix.SYS_RECVMSG, " "))
		}) {
			return pids
		}
		if time.Now().After(end) {
			t.Fatalf("%d servers stand by, want %d", len(pids), n)
		}
	}
}

// TestReserve records with servers that stood by: one with page events, one that gets them later, one of none. One that
// was killed meanwhile is replaced, and what nobody took is gone afterwards.
func TestReserve(t *testing.T) {
	server := testenv.Binary(t, "optimizer-server")
	var none *tracer.Reserve
	none.Expect()
	none.Close()
	reserve := tracer.NewReserve(server, nil)
	defer reserve.Close()
	b := newBox(t, "mkdir s; echo x > s/f")
	pages := pool(t)
	for name, tt := range map[string]struct {
		pages bool
		kill  bool
		grade string
	}{
		"with page events":    {pages: true, grade: trace.GradeFaultAround},
		"without page events": {grade: trace.GradeFile},
		"killed meanwhile":    {pages: true, kill: true, grade: trace.GradeFaultAround},
	} {
		t.Run(name, func(t *testing.T) {
			reserve.Expect()
			pid := stand(t, 1)[0]
			o := tracer.Options{Server: server, Reserve: reserve}
			if tt.pages {
				o.Pages = pages
			}
			if tt.kill {
				signal(t, pid, unix.SIGKILL)
				stand(t, 0)
			}
			c := b.create(t, pivot, "cat", "/s/f")
			o.PID = c.pid()
			s, err := tracer.Start(context.Background(), o)
			if err != nil {
				t.Fatal(err)
			}
			select {
			case <-s.Ready():
			case <-s.Done():
				t.Fatal(s.Result().Err)
			}
			if got := childOf(t, os.Getpid(), "optimizer-server"); (got == pid) == tt.kill {
				t.Errorf("process %d records, and %d stood by", got, pid)
			}
			c.run(t)
			r := result(t, s)
			if r.Err != nil || !r.Trace.Complete() || r.Grade != tt.grade || r.End != tracer.EndExit {
				t.Errorf("end %s, grade %s, losses %q, error %v; want %s, %s, none", r.End, r.Grade, lossOf(r), r.Err, tracer.EndExit, tt.grade)
			}
			if !slices.ContainsFunc(r.Trace.Accesses, func(a trace.Access) bool { return a.Path == "/s/f" }) {
				t.Errorf("accesses %+v, want /s/f among them", r.Trace.Accesses)
			}
		})
	}
	for range 30 {
		reserve.Expect()
	}
	stand(t, 8)
	reserve.Close()
	if left := standing(t); len(left) != 0 {
		t.Errorf("servers %d stand by after Close", left)
	}
	reserve.Expect()
	if left := standing(t); len(left) != 0 {
		t.Errorf("servers %d stand by, asked for after Close", left)
	}
}

// TestReserveOfNothing starts a server, where there is one, when what was to stand by is none.
func TestReserveOfNothing(t *testing.T) {
	fake := filepath.Join(t.TempDir(), "server")
	if err := os.WriteFile(fake, []byte("#!/bin/sh\nexit 3\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fake, filepath.Join(t.TempDir(), "missing")} {
		reserve := tracer.NewReserve(path, nil)
		reserve.Expect()
		time.Sleep(50 * time.Millisecond) // whether it has ended by then makes no difference
		b := newBox(t, "mkdir s; echo x > s/f")
		c := b.create(t, pivot, "cat", "/s/f")
		s, err := tracer.Start(context.Background(), tracer.Options{Server: testenv.Binary(t, "optimizer-server"), Reserve: reserve, PID: c.pid()})
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-s.Ready():
		case <-s.Done(): // it took its orders and died
		}
		c.run(t)
		<-s.Done()
		reserve.Close()
	}
}
