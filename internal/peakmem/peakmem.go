// Package peakmem says how much memory processes have had.
package peakmem

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// RSS returns the sum of the largest resident sets that the processes have had so far, in bytes. A process that has ended is an error.
// Source: proc_pid_status(5), VmHWM.
func RSS(pids ...int) (sum int64, err error) {
	for _, pid := range pids {
		n, err := one(pid)
		if err != nil {
			return 0, fmt.Errorf("peak memory of process %d: %w", pid, err)
		}
		sum += n
	}
	return sum, nil
}

func one(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("no VmHWM in its status")
}
