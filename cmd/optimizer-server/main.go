// Command optimizer-server traces the files that one container touches and writes them to
// standard output, as package internal/tracer/stream describes. It is started by the NRI
// plugin and by optimizer record, one process per container.
//
//	optimizer-server --pid PID [--attach] [--root DIR] [--max-files N] [--pages SPEC [--pages-ahead] 3<instance]
//	optimizer-server --standby
//
// With --standby its arguments, separated by zeros, come as the first packet through standard input, with the instance.
//
// It ends when the process does, on SIGTERM or SIGINT, and when its standard input, if
// that is a pipe or a socket, is closed; everything that happened before is written first. Exit status:
// 0 done, 1 it could not trace, 2 usage. Without --pid and --root the environment variables
// _MNTNS_PID and _TARGET are read.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"

	"github.com/headstart-oci/headstart/internal/tracer/server"
)

// errUsage is returned for arguments that make no sense; exit status 2.
var errUsage = errors.New("usage")

// Memory is what a node pays per traced container, so the collector runs early.
const (
	gcPercent   = 20
	memoryLimit = 64 << 20 // bytes; soft
)

// pagesFD is the descriptor of the instance of tracefs unless it comes with orders: the first after standard error.
const pagesFD = 3

func main() {
	runtime.LockOSThread() // the server joins another mount namespace
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryLimit)
	err := start(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		_, _ = fmt.Fprintln(os.Stderr, "optimizer-server:", err)
		os.Exit(2)
	case err != nil:
		_, _ = fmt.Fprintln(os.Stderr, "optimizer-server:", err)
		os.Exit(1)
	}
}

// start runs with args, or with those that come.
func start(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer stop()
	instance := pagesFD
	if len(args) == 1 && args[0] == "--standby" {
		idle := context.AfterFunc(ctx, func() { os.Exit(0) })                                   // there is nothing to finish
		_, _ = parse([]string{"--pid", "1"}, -1, func(string) string { return "" }, io.Discard) // what is done once is quicker
		var err error
		args, instance, err = server.StandBy(os.Stdin)
		if errors.Is(err, io.EOF) {
			return nil // nobody wants anything
		}
		if err != nil {
			return err
		}
		idle()
	}
	return run(ctx, args, instance, os.Getenv, os.Stdin, os.Stdout, os.Stderr)
}

// run traces as args say; instance is the descriptor of the instance of tracefs if there is one, -1 if there is none.
func run(ctx context.Context, args []string, instance int, env func(string) string, stdin, stdout *os.File, stderr io.Writer) error {
	c, err := parse(args, instance, env, stderr)
	if err != nil {
		return err
	}
	return server.Run(ctx, c, stdin, stdout)
}

// parse reads the flags, and what is missing from the environment.
func parse(args []string, instance int, env func(string) string, stderr io.Writer) (server.Config, error) {
	flags := flag.NewFlagSet("optimizer-server", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var c server.Config
	flags.IntVar(&c.PID, "pid", 0, "trace the container of process `PID`, as the host numbers it (default: $_MNTNS_PID)")
	flags.BoolVar(&c.Attach, "attach", false, "the process runs already: note that its start is missing")
	flags.StringVar(&c.Root, "root", "", "trace `DIR` inside that process' root (default: $_TARGET, else /)")
	var spec string
	flags.StringVar(&spec, "pages", "", "read page events too, from the instance of tracefs that is open as descriptor 3, or came with the orders, and that `SPEC` describes")
	flags.BoolVar(&c.Pages.Ahead, "pages-ahead", false, "with --pages: the parent arms the instance, and says on the standard input how that went")
	flags.BoolVar(&c.Pages.Later, "pages-later", false, "begin without page events; an instance and its SPEC come as a message through standard input, a socket")
	flags.IntVar(&c.MaxFiles, "max-files", server.DefaultMaxFiles, "list at most `N` files; more are counted as lost")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return server.Config{}, err
		}
		return server.Config{}, fmt.Errorf("%w: %w", errUsage, err)
	}
	if flags.NArg() > 0 {
		return server.Config{}, fmt.Errorf("%w: unexpected argument %q", errUsage, flags.Arg(0))
	}
	if spec != "" {
		if err := c.Pages.Spec.UnmarshalText([]byte(spec)); err != nil {
			return server.Config{}, fmt.Errorf("%w: --pages: %w", errUsage, err)
		}
		if instance < 0 {
			return server.Config{}, fmt.Errorf("%w: --pages: no instance of tracefs came along", errUsage)
		}
		c.Pages.Instance = os.NewFile(uintptr(instance), "tracefs instance")
	}
	if spec != "" && c.Pages.Later {
		return server.Config{}, fmt.Errorf("%w: --pages and --pages-later exclude each other", errUsage)
	}
	if spec == "" && c.Pages.Ahead {
		return server.Config{}, fmt.Errorf("%w: --pages-ahead is for --pages", errUsage)
	}
	if v := env("_MNTNS_PID"); c.PID == 0 && v != "" {
		pid, err := strconv.Atoi(v)
		if err != nil {
			return server.Config{}, fmt.Errorf("%w: _MNTNS_PID is %q, want a process id", errUsage, v)
		}
		c.PID = pid
	}
	if c.Root == "" {
		c.Root = env("_TARGET")
	}
	if c.PID <= 0 {
		return server.Config{}, fmt.Errorf("%w: --pid is %d, want a process id", errUsage, c.PID)
	}
	if c.MaxFiles <= 0 {
		return server.Config{}, fmt.Errorf("%w: --max-files is %d, want at least 1", errUsage, c.MaxFiles)
	}
	return c, nil
}
