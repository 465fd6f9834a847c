package tracefs

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Threads returns the threads that process pid has, itself among them, for [Instance.Arm].
// It looks until nothing new turns up, a hundred times at most; one that the process starts later is missed unless
// the process is armed by then. The error is one of fs.ErrNotExist when there is no such
// process.
func Threads(pid int) ([]int, error) {
	const most = 100 // a process that starts and ends threads all the time looks new each time
	var before []int
	for range most {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return nil, fmt.Errorf("threads of process %d: %w", pid, err)
		}
		var threads []int
		for _, e := range entries {
			if n, err := strconv.Atoi(e.Name()); err == nil {
				threads = append(threads, n)
			}
		}
		if slices.Equal(threads, before) {
			return threads, nil
		}
		before = threads
	}
	return before, nil
}

// Family returns the threads of process pid and of all its descendants, as far as they
// can be found (CONFIG_PROC_CHILDREN). The error is one of fs.ErrNotExist when there is no such process.
func Family(pid int) ([]int, error) {
	var all []int
	seen := map[int]bool{}
	for next := []int{pid}; len(next) > 0; next = next[1:] {
		if seen[next[0]] {
			continue
		}
		seen[next[0]] = true
		threads, err := Threads(next[0])
		if err != nil {
			if len(all) == 0 {
				return nil, err
			}
			continue // gone
		}
		for _, t := range threads {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", next[0], t))
			if err != nil {
				continue
			}
			for child := range strings.FieldsSeq(string(text)) {
				if n, err := strconv.Atoi(child); err == nil {
					next = append(next, n)
				}
			}
		}
		all = append(all, threads...)
	}
	return all, nil
}

// online returns the number of CPUs that run; many where that is not known.
func online() int {
	text, err := os.ReadFile("/sys/devices/system/cpu/online")
	n := countCPUs(strings.TrimSpace(string(text)))
	if err != nil || n == 0 {
		return math.MaxInt
	}
	return n
}

// countCPUs returns how many CPUs a list such as "0-3,8" names, 0 when it is none.
// Source: Documentation/admin-guide/cputopology.rst.
func countCPUs(list string) int {
	n := 0
	for part := range strings.SplitSeq(list, ",") {
		first, last, ok := strings.Cut(part, "-")
		if !ok {
			last = first
		}
		a, err := strconv.ParseUint(first, 10, 16)
		b, err2 := strconv.ParseUint(last, 10, 16)
		if err != nil || err2 != nil || b < a {
			return 0
		}
		n += int(b-a) + 1
	}
	return n
}

// startTime returns when process pid began, in clock ticks since boot: together with pid it
// names a process for as long as the machine runs. A zombie has none: it holds nothing any more.
func startTime(pid int) (uint64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name of the program may hold anything, also spaces and parentheses.
	s := string(text)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	const start = 22 - 3 // field 22 of proc_pid_stat(5); the first behind the name is number 3
	if len(fields) <= start {
		return 0, errors.New("short stat of a process")
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return 0, unix.ESRCH
	}
	return strconv.ParseUint(fields[start], 10, 64)
}

// Prioritize ties the calling goroutine to its thread and puts the thread before all others
// of ordinary priority, so that a [Reader] empties the rings on a busy machine before they
// are full; it takes about a tenth of the time that the events took to come about. restore
// undoes both; call it in the same goroutine, also after an error. The error is one of
// fs.ErrPermission without CAP_SYS_NICE: then larger rings are what is left.
func Prioritize() (restore func(), err error) {
	const first = -20 // setpriority(2)
	runtime.LockOSThread()
	before, err := unix.Getpriority(unix.PRIO_PROCESS, 0) // of the thread, in spite of the name
	if err == nil {
		err = unix.Setpriority(unix.PRIO_PROCESS, 0, first)
	}
	if err != nil {
		return runtime.UnlockOSThread, fmt.Errorf("prioritize thread: %w", err)
	}
	return func() {
		// The system call, unlike the library's function, returns 20 less the priority.
		if unix.Setpriority(unix.PRIO_PROCESS, 0, 20-before) == nil {
			runtime.UnlockOSThread()
		} // else the thread stays tied, and ends with its goroutine
	}, nil
}
