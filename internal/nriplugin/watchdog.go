package nriplugin

import (
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DefaultHookLimit is how long a hook may run before the plugin ends itself. NRI gives
// 2 s (api.DefaultPluginRequestTimeout), after which containerd fails the container's start.
const DefaultHookLimit = 1400 * time.Millisecond

// killMargin is when, after the limit, the kernel kills a process whose watchdog did not.
const killMargin = 300 * time.Millisecond

// watchdog calls expire when a hook runs for longer than limit, and has the kernel kill
// the process killMargin later: also one whose threads are all stuck, or that was
// stopped (SIGSTOP) or frozen inside the hook.
type watchdog struct {
	limit  time.Duration
	expire func(hook string)
	kill   bool // arm the kernel's timer too
}

// enter is called at the start of a hook; leave at its end.
func (w *watchdog) enter(hook string) (leave func()) {
	disarm := func() {}
	if w.kill {
		disarm = killAfter(w.limit + killMargin)
	}
	t := time.AfterFunc(w.limit, func() { w.expire(hook) })
	return sync.OnceFunc(func() {
		t.Stop()
		disarm()
	})
}

// sigevent is struct sigevent of a timer that sends a signal to the process.
// Source: asm-generic/siginfo.h; 64 bytes, notify 0 is SIGEV_SIGNAL.
type sigevent struct {
	Value  uint64
	Signo  int32
	Notify int32
	_      [48]byte
}

// killAfter has the kernel kill this process after d, unless disarmed. Where the kernel
// has no timer for us the goroutine's watch has to do.
func killAfter(d time.Duration) (disarm func()) {
	var id uint32 // timer_t of the kernel is an int that is never negative
	ev := sigevent{Signo: int32(unix.SIGKILL)}
	_, _, errno := unix.Syscall(unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC,
		uintptr(unsafe.Pointer(&ev)), uintptr(unsafe.Pointer(&id)))
	if errno != 0 {
		return func() {}
	}
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(d.Nanoseconds())}
	// An error leaves the timer unarmed; it is deleted with the others.
	unix.Syscall6(unix.SYS_TIMER_SETTIME, uintptr(id), 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0) //nolint:errcheck // see above
	return func() {
		unix.Syscall(unix.SYS_TIMER_DELETE, uintptr(id), 0, 0) //nolint:errcheck // the id is ours
	}
}
