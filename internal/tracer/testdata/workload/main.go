// Command workload is what the tests of internal/tracer run in a container: a static
// program that touches files in a way that its first argument names.
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	var err error
	switch os.Args[1] {
	case "burst":
		err = burst(number(2), number(3))
	case "fifo":
		err = fifo(number(2))
	case "read":
		_, err = os.ReadFile(os.Args[2])
	case "ranges":
		err = ranges(os.Args[2:])
	case "files":
		err = files(os.Args[2:])
	case "mixed":
		err = mixed(os.Args[2:])
	case "processes":
		err = processes(number(2), number(3))
	case "pages":
		err = pages(number(2), number(3))
	case "nothing":
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func number(i int) int {
	n, err := strconv.Atoi(os.Args[i])
	if err != nil {
		panic(err)
	}
	return n
}

// burst reads every file of a tree, as fast as it can.
func burst(files, perDir int) error {
	buf := make([]byte, 4096)
	began := time.Now()
	for i := range files {
		fd, err := unix.Open(fmt.Sprintf("/burst/%02d/%05d", i/perDir, i), unix.O_RDONLY, 0)
		if err != nil {
			return err
		}
		if _, err := unix.Read(fd, buf); err != nil {
			return err
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	fmt.Println(time.Since(began))
	return nil
}

// fifo uses each FIFO once; then a writer waits for a reader, which
// comes late. If the writer got through before, somebody else opened the FIFO.
func fifo(rounds int) error {
	open := func(name string, flag int) <-chan error {
		done := make(chan error, 1)
		go func() {
			f, err := os.OpenFile(name, flag, 0)
			if err == nil {
				err = f.Close()
			}
			done <- err
		}()
		return done
	}
	for i := range rounds {
		name := fmt.Sprintf("/s/fifo%d", i)
		w, r := open(name, os.O_WRONLY), open(name, os.O_RDONLY)
		if err := errors.Join(<-w, <-r); err != nil {
			return err
		}
		w = open(name, os.O_WRONLY)
		select {
		case <-w:
			return fmt.Errorf("round %d: the writer was let through without a reader", i)
		case <-time.After(2 * time.Millisecond):
		}
		if err := errors.Join(<-open(name, os.O_RDONLY), <-w); err != nil {
			return err
		}
	}
	return nil
}
