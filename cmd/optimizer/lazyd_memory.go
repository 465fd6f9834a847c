package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// forgetProgram has the kernel take the pages of the program itself out of this process: what only the beginning of the program needs, some 10 MiB, is not
// asked for again. They stay in the page cache, and what is needed comes back from there.
func forgetProgram() error {
	name, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(f)
	var from, to uintptr
	for lines.Scan() {
		line := lines.Text()
		if fields := strings.Fields(line); len(fields) > 5 && strings.Contains(fields[0], "-") {
			from, to = 0, 0
			// Source: proc_pid_maps(5).
			if strings.Join(fields[5:], " ") != name || strings.Contains(fields[1], "w") {
				continue
			}
			if _, err = fmt.Sscanf(fields[0], "%x-%x", &from, &to); err != nil {
				break
			}
		} else if len(fields) == 3 && fields[0] == "Anonymous:" && fields[1] == "0" && to > from {
			// All of it is as the file has it: nothing is lost.
			if _, _, errno := unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED); errno != 0 {
				err = os.NewSyscallError("madvise", errno)
				break
			}
		}
	}
	if err == nil {
		err = lines.Err()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return err
}
