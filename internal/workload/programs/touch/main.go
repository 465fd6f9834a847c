// Command touch touches files in every way that a tracer must tell apart and prints what
// it did; its arguments are a script:
//
//	read FILE   open and read all of it
//	open FILE   open and close it without reading
//	map FILE    map it and read the mapping, with no read call
//	exec FILE … replace the process by FILE with the remaining arguments
//	fork FILE … run FILE with the arguments up to ";" and wait
//	wait        say "ready" and wait for SIGTERM or SIGINT
//	pause N     wait N milliseconds
//	fail N      exit with status N
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := script(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "touch:", err)
		os.Exit(1)
	}
}

func script(ctx context.Context, args []string) error {
	for len(args) > 0 {
		verb := args[0]
		args = args[1:]
		if verb == "wait" {
			fmt.Fprintln(os.Stdout, "ready")
			<-ctx.Done()
			continue
		}
		if len(args) == 0 {
			return fmt.Errorf("%s: argument missing", verb)
		}
		rest, err := one(ctx, verb, args)
		if err != nil {
			return fmt.Errorf("%s %s: %w", verb, args[0], err)
		}
		args = rest
	}
	return nil
}

// one does one verb and returns the arguments after its own.
func one(ctx context.Context, verb string, args []string) ([]string, error) {
	switch verb {
	case "read":
		return args[1:], read(args[0])
	case "open":
		f, err := os.Open(args[0])
		if err != nil {
			return nil, err
		}
		return args[1:], f.Close()
	case "map":
		return args[1:], mapped(args[0])
	case "exec":
		return nil, syscall.Exec(args[0], args, os.Environ())
	case "fork":
		end := slices.Index(args, ";")
		if end < 0 {
			end = len(args)
		}
		cmd := exec.CommandContext(ctx, args[0], args[1:end]...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		return args[min(end+1, len(args)):], cmd.Run()
	case "pause", "fail":
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return nil, err
		}
		if verb == "fail" {
			os.Exit(n)
		}
		select {
		case <-time.After(time.Duration(n) * time.Millisecond):
		case <-ctx.Done():
		}
		return args[1:], nil
	}
	return nil, errors.New("unknown verb")
}

func read(name string) (err error) {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	n, err := io.Copy(io.Discard, f)
	if err == nil {
		fmt.Fprintln(os.Stdout, name, n)
	}
	return err
}

func mapped(name string) (err error) {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	data, err := syscall.Mmap(int(f.Fd()), 0, int(info.Size()), syscall.PROT_READ, syscall.MAP_PRIVATE)
	if err != nil {
		return err
	}
	sum := 0
	for i := 0; i < len(data); i += 4096 {
		sum += int(data[i])
	}
	fmt.Fprintln(os.Stdout, name, "mapped", sum)
	return syscall.Munmap(data)
}
