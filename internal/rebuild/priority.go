package rebuild

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// I/O priorities. Source: linux/ioprio.h.
const (
	ioprioWhoProcess = 1
	ioprioIdle       = 3 << 13 // IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0)
)

// maxNice is the lowest CPU priority; with SCHED_IDLE it only orders idle tasks, and it
// remains where SCHED_IDLE is refused.
const maxNice = 19

// LowerPriority gives every thread of this process the lowest CPU and I/O priority (nice
// 19, SCHED_IDLE, idle I/O) and makes it the kernel's first choice when memory runs out.
// Threads made later inherit it. Call it before there is much to do.
func LowerPriority() error {
	var errs []error
	lowered := map[int]bool{}
	// A thread that is not lowered yet may make another one meanwhile: until a pass finds none.
	for fresh := true; fresh; {
		fresh = false
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, t := range tasks {
			tid, err := strconv.Atoi(t.Name())
			if err != nil || lowered[tid] {
				continue
			}
			lowered[tid], fresh = true, true
			if err := lowerThread(tid); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(append(errs, sacrifice())...)
}

// oomScore makes the build die before what it shares the machine with. Source: proc(5).
const oomScore = 800

func sacrifice() error {
	const file = "/proc/self/oom_score_adj"
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	// Only upwards: the other way needs a capability.
	if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && n >= oomScore {
		return nil
	}
	return os.WriteFile(file, strconv.AppendInt(nil, oomScore, 10), 0)
}

func lowerThread(tid int) error {
	if err := unix.Setpriority(unix.PRIO_PROCESS, tid, maxNice); err != nil {
		return fmt.Errorf("setpriority: %w", err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWhoProcess, uintptr(tid), ioprioIdle); errno != 0 {
		return fmt.Errorf("ioprio_set: %w", errno)
	}
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE, Nice: maxNice}
	if err := unix.SchedSetAttr(tid, &attr, 0); err != nil {
		return fmt.Errorf("sched_setattr: %w", err)
	}
	return nil
}
