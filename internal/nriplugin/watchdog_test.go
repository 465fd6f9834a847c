package nriplugin_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/nriplugin"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
)

// envHang makes the test binary a plugin inside a hook that does not return; the value is
// what ends it.
const envHang = "HEADSTART_TEST_HANG"

func hangMain(mode string) int {
	c := nriplugin.DefaultConfig()
	c.StartDeadline = 20 * time.Second
	w := &world{}
	w.start = func(tracer.Options) (nriplugin.Session, error) { return newFakeSession(), nil }
	o := nriplugin.Options{
		Own: &c, HookLimit: 50 * time.Millisecond,
		Open: func(nriplugin.Config) (*nriplugin.Backend, error) { return w.backend(), nil },
	}
	switch mode {
	case "exit":
		o.Expired = func(string) { os.Exit(7) }
	case "kernel": // a watchdog that cannot end the process
		o.Kill = true
	case "stopped": // nothing of the process runs any more
		o.Kill = true
		time.AfterFunc(10*time.Millisecond, func() { _ = syscall.Kill(os.Getpid(), syscall.SIGSTOP) })
	}
	p, err := nriplugin.New(o)
	if err != nil {
		return 1
	}
	_ = p.StartContainer(context.Background(), pod("default", nil), container("c1", nil))
	return 0
}

func TestWatchdogEndsTheProcess(t *testing.T) {
	for mode, tc := range map[string]struct {
		signal syscall.Signal
		code   int
	}{
		"exit":    {code: 7},
		"kernel":  {signal: syscall.SIGKILL},
		"stopped": {signal: syscall.SIGKILL},
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), envHang+"="+mode)
			began := time.Now()
			err := cmd.Run()
			var exit *exec.ExitError
			if !errors.As(err, &exit) {
				t.Fatalf("the plugin ended with %v", err)
			}
			status, ok := exit.Sys().(syscall.WaitStatus)
			if !ok || (tc.signal != 0) != status.Signaled() || status.Signaled() && status.Signal() != tc.signal || tc.signal == 0 && status.ExitStatus() != tc.code {
				t.Errorf("the plugin ended with %v", err)
			}
			if d := time.Since(began); d > 15*time.Second {
				t.Errorf("it took %v", d)
			}
		})
	}
}

// TestHooksLeaveNoTimers runs many hooks with the kernel's timer armed: each is deleted,
// and none fires later.
func TestHooksLeaveNoTimers(t *testing.T) {
	w := &world{t: t}
	w.open(func(_ *nriplugin.Config, o *nriplugin.Options) { o.Kill = true; o.HookLimit = 2 * time.Second })
	for range 2000 {
		w.stopContainer("unknown")
	}
	if err := w.close(); err != nil {
		t.Error(err)
	}
	timers, err := os.ReadFile("/proc/self/timers")
	testenv.Kernel(t, "/proc/self/timers", err)
	if len(timers) > 0 {
		t.Errorf("timers are left:\n%s", timers)
	}
}
