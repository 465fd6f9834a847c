package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ranges touches byte ranges of files, each argument one: how:file:offset:length.
func ranges(args []string) error {
	for _, arg := range args {
		how, rest, _ := strings.Cut(arg, ":")
		file, rest, _ := strings.Cut(rest, ":")
		at, n, _ := strings.Cut(rest, ":")
		off, err := strconv.ParseInt(at, 10, 64)
		if err != nil {
			return err
		}
		size, err := strconv.Atoi(n)
		if err != nil {
			return err
		}
		fd, err := unix.Open(file, unix.O_RDONLY, 0)
		if err != nil {
			return err
		}
		if err := errors.Join(touch(how, fd, off, size), unix.Close(fd)); err != nil {
			return fmt.Errorf("%s: %w", arg, err)
		}
	}
	return nil
}

// touch touches the bytes [off, off+size) in one way.
func touch(how string, fd int, off int64, size int) error {
	buf := make([]byte, size)
	var err error
	n := size
	switch how {
	case "read":
		if _, err = unix.Seek(fd, off, 0); err == nil {
			n, err = unix.Read(fd, buf)
		}
	case "pread":
		n, err = unix.Pread(fd, buf, off)
	case "readv":
		if _, err = unix.Seek(fd, off, 0); err == nil {
			n, err = unix.Readv(fd, [][]byte{buf[:size/3], buf[size/3:]})
		}
	case "preadv":
		n, err = unix.Preadv(fd, [][]byte{buf[:size/2], buf[size/2:]}, off)
	case "mmap", "private":
		return mapped(how, fd, off, size)
	case "sendfile", "copy":
		n, err = toFile(how, fd, off, size)
	case "splice":
		n, err = toPipe(fd, off, size)
	case "advise", "readahead", "direct":
		n, err = advise(how, fd, off, size)
	case "uring", "uringasync", "uringpoll":
		n, err = uring(how, fd, off, buf)
	default:
		err = errors.New("unknown way")
	}
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes, want %d", n, size)
	}
	return err
}

// mapped reads a byte of every page of a mapping, or writes to it when it is private.
func mapped(how string, fd int, off int64, size int) error {
	page := int64(os.Getpagesize())
	prot := unix.PROT_READ
	if how == "private" {
		prot |= unix.PROT_WRITE
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	b, err := unix.Mmap(fd, 0, int(st.Size), prot, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	sum := byte(0)
	for at := off / page * page; at < off+int64(size); at += page {
		if how == "private" {
			b[at]++
		}
		sum += b[at]
	}
	return errors.Join(unix.Munmap(b), os.WriteFile("/sum", []byte{sum}, 0o644))
}

func toFile(how string, fd int, off int64, size int) (int, error) {
	out, err := unix.Open("/copy", unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	done := 0
	for done < size && err == nil {
		var n int
		if how == "sendfile" {
			n, err = unix.Sendfile(out, fd, &off, size-done)
		} else {
			n, err = unix.CopyFileRange(fd, &off, out, nil, size-done, 0)
		}
		if n == 0 {
			break
		}
		done += n
	}
	return done, errors.Join(err, unix.Close(out))
}

func toPipe(fd int, off int64, size int) (int, error) {
	var p [2]int
	if err := unix.Pipe(p[:]); err != nil {
		return 0, err
	}
	done := 0
	for done < size {
		n, err := unix.Splice(fd, &off, p[1], nil, size-done, 0)
		if err != nil || n == 0 {
			return done, err
		}
		if _, err := unix.Read(p[0], make([]byte, n)); err != nil {
			return done, err
		}
		done += int(n)
	}
	return done, errors.Join(unix.Close(p[0]), unix.Close(p[1]))
}
