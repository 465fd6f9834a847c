package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// files does things to files, each argument one: what:file[:other].
func files(args []string) error {
	for _, arg := range args {
		what, rest, _ := strings.Cut(arg, ":")
		file, other, _ := strings.Cut(rest, ":")
		if err := file1(what, file, other); err != nil {
			return fmt.Errorf("%s: %w", arg, err)
		}
	}
	return nil
}

func file1(what, file, other string) error {
	switch what {
	case "read":
		_, err := os.ReadFile(file)
		return err
	case "open":
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		return f.Close()
	case "map":
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		return errors.Join(mapped("mmap", int(f.Fd()), 0, 1), f.Close())
	case "rename":
		return os.Rename(file, other)
	case "link":
		return os.Link(file, other)
	case "own":
		return os.Chown(file, 0, 1)
	case "remove":
		return os.Remove(file)
	case "append", "write":
		f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		_, err = f.WriteString("x")
		return errors.Join(err, f.Close())
	case "unshared": // by a child in a mount namespace of its own
		cmd := exec.Command("/program", "files", "read:"+file)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
		return cmd.Run()
	case "await": // that somebody makes the file
		return await(file)
	case "child": // so many generations of children, the last of which waits for a file and then reads
		return child(file, other)
	case "pause":
		d, err := time.ParseDuration(file)
		time.Sleep(d)
		return err
	}
	return errors.New("unknown")
}

// child does what the last of so many generations of children is to do: see above.
func child(generations, file string) error {
	if generations == "0" {
		if err := os.WriteFile("/s/waits", []byte("x"), 0o644); err != nil {
			return err
		}
		if err := await(file); err != nil {
			return err
		}
		_, err := os.ReadFile("/s/plain")
		return errors.Join(err, exec.Command("/program", "nothing").Run())
	}
	n, err := strconv.Atoi(generations)
	if err != nil {
		return err
	}
	return exec.Command("/program", "files", fmt.Sprintf("child:%d:%s", n-1, file)).Run()
}

// await waits until file exists.
func await(file string) error {
	for range 6000 {
		if _, err := os.Stat(file); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.New("nobody wants it to")
}
