// Command optimizer-nri-plugin is the NRI plugin: containerd launches it from its plugin
// directory, or it is started by hand and connects to containerd's NRI socket. See
// package nriplugin for what it does, and configs/ for its configuration.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/internal/nriplugin"
	"github.com/headstart-oci/headstart/internal/rebuild"
)

// verbRebuild, as the first argument, makes this process build one job of the plugin's queue.
const verbRebuild = "rebuild"

// errUsage is an error of the command line; the text was printed.
var errUsage = errors.New("usage")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case err == nil:
	case errors.Is(err, errUsage):
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "optimizer-nri-plugin:", err)
		if errors.Is(err, nriplugin.ErrConfig) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	launch, err := nriplugin.Launched()
	if err != nil {
		return err
	}
	if launch == nil && len(args) > 0 && args[0] == verbRebuild {
		return runRebuild(ctx, args[1:], stderr)
	}
	f, err := parseFlags(args, stdout, stderr)
	if err != nil || f.version {
		return err
	}
	return serve(ctx, f, launch, stderr)
}

// flags is the command line.
type flags struct {
	version bool
	serve   nriplugin.ServeOptions
	// base has the flags over the defaults; own has them over --config's file too and is nil without one.
	base nriplugin.Config
	own  *nriplugin.Config
}

func parseFlags(args []string, stdout, stderr io.Writer) (*flags, error) {
	f := &flags{base: nriplugin.DefaultConfig()}
	fs := flag.NewFlagSet("optimizer-nri-plugin", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, usage)
		fs.PrintDefaults()
	}
	config := fs.String("config", "", "configuration `file`; what containerd has for the plugin is ignored then")
	fs.StringVar(&f.serve.Name, "name", "", "plugin `name` to register with (default: from the file's name, else "+nriplugin.DefaultName+")")
	fs.StringVar(&f.serve.Idx, "idx", "", "plugin `index` to register with, two digits (default: from the file's name, else "+nriplugin.DefaultIdx+")")
	fs.StringVar(&f.serve.Socket, "nri-socket", "", "NRI `socket` to connect to (default /var/run/nri/nri.sock)")
	fs.BoolVar(&f.version, "version", false, "print the version and exit")
	events := fs.String("events", "", "accepted for compatibility: the plugin subscribes to what it needs")
	server := fs.String("server-path", f.base.ServerPath, "`path` of the optimizer-server binary")
	dir := fs.String("persist-dir", f.base.PersistDir, "`directory` of lists, queue and built images")
	readable := fs.Bool("readable", false, "make the csv file human readable")
	timeout := fs.String("timeout", "0", "end a recording after `seconds` (or a duration such as 90s); 0: no limit")
	overwrite := fs.Bool("overwrite", false, "replace the lists that are there, and rebuild images again for other lists")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return &flags{version: true}, nil
		}
		return nil, errUsage
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "optimizer-nri-plugin: unexpected argument %q\n", fs.Arg(0))
		return nil, errUsage
	}
	if f.version {
		fmt.Fprintln(stdout, "optimizer-nri-plugin", version())
		return f, nil
	}
	var err error
	apply := func(c *nriplugin.Config) {
		fs.Visit(func(set *flag.Flag) {
			switch set.Name {
			case "events":
				c.Events = []string{*events}
			case "server-path":
				c.ServerPath = *server
			case "persist-dir":
				c.PersistDir = *dir
			case "readable":
				c.Readable = *readable
			case "timeout":
				c.Timeout, err = nriplugin.ParseTimeout(*timeout)
			case "overwrite":
				c.Overwrite = *overwrite
			}
		})
	}
	if *config != "" {
		c, err := readConfig(*config)
		if err != nil {
			return nil, err
		}
		apply(&c)
		f.own = &c
	}
	apply(&f.base)
	if err == nil {
		err = f.base.Validate()
	}
	if err == nil && f.own != nil {
		err = f.own.Validate()
	}
	if err != nil {
		fmt.Fprintf(stderr, "optimizer-nri-plugin: %v\n", err)
		return nil, errUsage
	}
	return f, nil
}

const usage = `usage: optimizer-nri-plugin [flags]

Records what containers read while they start, and rebuilds their images around it.
containerd launches it from its NRI plugin directory, without flags and with the configuration
in its NRI configuration directory. By hand, next to a running containerd:

    optimizer-nri-plugin --config /etc/nri/conf.d/02-optimizer-nri-plugin.conf --name optimizer-nri-plugin --idx 02

Flags win over the file of --config. containerd sends its configuration only to plugins
that it launches.

`

func readConfig(path string) (nriplugin.Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nriplugin.Config{}, fmt.Errorf("%w: %w", nriplugin.ErrConfig, err)
	}
	c, err := nriplugin.ParseConfig(data, nriplugin.DefaultConfig())
	if err != nil {
		return nriplugin.Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// version is that of the module and its commit, as the build recorded it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			v += " " + s.Value
		}
	}
	return v
}

func serve(ctx context.Context, f *flags, launch *nriplugin.Launch, stderr io.Writer) (err error) {
	log, closer, err := nriplugin.NewLogger(&f.base, stderr, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closer.Close()) }()
	signal.Ignore(syscall.SIGPIPE) // a reader of our stderr may go away
	p, err := nriplugin.New(nriplugin.Options{
		Own: f.own, Base: f.base, Log: log,
		Open: func(c nriplugin.Config) (*nriplugin.Backend, error) {
			return nriplugin.OpenBackend(c, nriplugin.BackendOptions{
				Stderr: stderr, Launched: launch != nil, Command: rebuild.Self(verbRebuild),
			})
		},
		Expired: func(hook string) { expire(log, hook) },
		Kill:    true,
	})
	if err != nil {
		return err
	}
	f.serve.Launch = launch
	err = nriplugin.Serve(ctx, p, f.serve)
	// Asked to end: at once. Else containerd has gone: what is being recorded may end, and a
	// build go on, while the next containerd launches the next plugin.
	closing := nriplugin.CloseOptions{Flush: nriplugin.FlushTime}
	if ctx.Err() == nil {
		closing.Drain, closing.Detach = nriplugin.DrainTime, true
	}
	return errors.Join(err, p.Close(ctx, closing))
}

// expire ends the process because a hook does not return. Only containerd's wait matters:
// the log, which may be what hangs, gets a moment.
func expire(log *zap.Logger, hook string) {
	said := make(chan struct{})
	go func() {
		log.Error("a hook did not return, ending the plugin before the container's start fails", zap.String("hook", hook), zap.Duration("after", nriplugin.DefaultHookLimit))
		close(said)
	}()
	t := time.NewTimer(100 * time.Millisecond)
	select {
	case <-said:
	case <-t.C:
	}
	os.Exit(1)
}
