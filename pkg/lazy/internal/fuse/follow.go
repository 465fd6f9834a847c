package fuse

import (
	"bytes"
	"os"
	"runtime"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// nearGap is the most that passes from an answer to the next read of a program which does little else and runs on the same CPU: 10 µs
	// were measured, and 50 to 200 across CPUs.
	nearGap = 20 * time.Microsecond
	// nearRun is how many such reads show that to follow was right.
	nearRun = 8
	// smallRun is how many small reads one after the other show that a program jumps about: each file that is read from its beginning starts with
	// one, and then both work at the same time.
	smallRun = 8
	// followMost is how many slow reads pass at most before a program is looked for again that takes its time, or that the scheduler
	// parts from the server each time.
	followMost = 64 << 10
)

// follower has the thread that answers a program's small reads run on the CPU on which the program waits for them. Neither has
// anything to do while the other works, and to wake a thread takes 5 µs on the same CPU, and 20 to 100 on another that is idle, where
// that is one of a virtual machine: it is halted, and the host has to run it again. The scheduler leaves each where it was
// (kernel/sched/fair.c wake_affine_idle prefers an idle CPU that was used before), or parts them when it balances its queues. What
// is read ahead is large: there both work at the same time.
//
// The zero value is ready. It is used by one goroutine.
type follower struct {
	pid  uint32 // the thread that asked last
	run  int    // its small reads with no other request between them
	slow int    // its reads that came late since it was looked for
	fast int    // and those that came soon
	next int    // so many late ones, and it is looked for
}

// saw is told of each request that was answered: who asked, whether for a few bytes that were there, and how long after the answer before;
// 0: that is not known.
func (f *follower) saw(pid uint32, small bool, gap time.Duration) {
	switch {
	case pid == 0: // it is in no PID namespace of ours
	case pid != f.pid:
		*f = follower{pid: pid, next: 1}
	case !small:
		f.run = 0
	case gap <= 0: // others are answered, too
	case f.run < smallRun:
		f.run++
	case gap < nearGap:
		if f.fast++; f.fast >= nearRun {
			f.next, f.slow = 1, 0
		}
	default:
		if f.slow++; f.slow < f.next {
			return
		}
		follow(int(pid))
		if f.fast < nearRun { // it was of no use
			f.next = min(2*f.next, followMost)
		}
		f.slow, f.fast = 0, 0
	}
}

// follow moves the calling thread to the CPU on which another ran last, and reports whether it was on a different one. It stays free to
// leave. Where it cannot be moved it stays where it is.
func follow(thread int) bool {
	cpu, ok := lastCPU(thread)
	if !ok {
		return false
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var mine, one unix.CPUSet
	if here, err := ownCPU(); err != nil || here == cpu || unix.SchedGetaffinity(0, &mine) != nil || !mine.IsSet(cpu) {
		return false
	}
	one.Set(cpu)
	if unix.SchedSetaffinity(0, &one) != nil {
		return false
	}
	if unix.SchedSetaffinity(0, &mine) != nil { // other CPUs are allowed now: all of those, then
		mine.Fill()
		_ = unix.SchedSetaffinity(0, &mine) // a thread that has to stay answers all the same
	}
	return true
}

// ownCPU returns the CPU that the calling thread runs on.
func ownCPU() (int, error) {
	var cpu uint32
	if _, _, errno := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&cpu)), 0, 0); errno != 0 {
		return 0, errno
	}
	return int(cpu), nil
}

// lastCPU returns the CPU on which a thread ran last; false when there is no such thread.
func lastCPU(thread int) (int, bool) {
	fd, err := unix.Open("/proc/"+strconv.Itoa(thread)+"/stat", os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, false
	}
	var line [1024]byte // of some 52 numbers
	n, err := unix.Read(fd, line[:])
	if unix.Close(fd) != nil || err != nil {
		return 0, false
	}
	return statCPU(line[:n])
}

// statCPU returns field 39 of a line of /proc/PID/stat (proc_pid_stat(5)). The second is the program's name in parentheses, and may have any byte in it.
func statCPU(line []byte) (int, bool) {
	const after = 39 - 3 // fields from the third on
	at := bytes.LastIndexByte(line, ')')
	if at < 0 {
		return 0, false
	}
	fields := bytes.Fields(line[at+1:])
	if len(fields) <= after {
		return 0, false
	}
	cpu, err := strconv.Atoi(string(fields[after]))
	return cpu, err == nil && cpu >= 0
}
