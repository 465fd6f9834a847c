package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"

	"golang.org/x/sys/unix"
)

// sharedPages is how many pages /s/shared has.
const sharedPages = 3000

// processes runs so many processes, some at a time, each of which does what pages says.
func processes(n, each int) error {
	const together = 16
	ended := make(chan error, together)
	running := 0
	var errs []error
	for i := range n {
		if running == together {
			errs = append(errs, <-ended)
			running--
		}
		cmd := exec.Command("/program", "pages", strconv.Itoa(i), strconv.Itoa(each))
		cmd.Stdout = os.Stdout
		cmd.Env = []string{"GOMAXPROCS=1"}
		if err := cmd.Start(); err != nil {
			return err
		}
		go func() { ended <- cmd.Wait() }()
		running++
	}
	for range running {
		errs = append(errs, <-ended)
	}
	return errors.Join(errs...)
}

// pages reads a file of its own, and then so many pages of a file that all share: all but every third.
func pages(number, each int) error {
	if _, err := os.ReadFile(fmt.Sprintf("/s/own/%d", number)); err != nil {
		return err
	}
	fd, err := unix.Open("/s/shared", unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	buf := make([]byte, os.Getpagesize())
	for k := range each {
		p := (7*k + number) % sharedPages
		if p%3 == 1 {
			p--
		}
		if _, err := unix.Pread(fd, buf, int64(p)*int64(len(buf))); err != nil {
			return err
		}
	}
	return unix.Close(fd)
}
