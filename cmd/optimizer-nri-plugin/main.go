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

	"github.com/headstart-oci/headstart/internal/metrics"
	"github.com/headstart-oci/headstart/internal/nriplugin"
	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
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

// options are the flags that are part of the configuration.
type options struct {
	config, events, server, dir, timeout, metrics string
	readable, overwrite                           bool
}

func (o *options) define(fs *flag.FlagSet, f *flags) {
	fs.StringVar(&o.config, "config", "", "configuration `file`; what containerd has for the plugin is ignored then")
	fs.StringVar(&f.serve.Name, "name", "", "plugin `name` to register with (default: from the file's name, else "+nriplugin.DefaultName+")")
	fs.StringVar(&f.serve.Idx, "idx", "", "plugin `index` to register with, two digits (default: from the file's name, else "+nriplugin.DefaultIdx+")")
	fs.StringVar(&f.serve.Socket, "nri-socket", "", "NRI `socket` to connect to (default /var/run/nri/nri.sock)")
	fs.BoolVar(&f.version, "version", false, "print the version and exit")
	fs.StringVar(&o.events, "events", "", "accepted for compatibility: the plugin subscribes to what it needs")
	fs.StringVar(&o.server, "server-path", f.base.ServerPath, "`path` of the optimizer-server binary")
	fs.StringVar(&o.dir, "persist-dir", f.base.PersistDir, "`directory` of lists, queue and built images")
	fs.BoolVar(&o.readable, "readable", false, "make the csv file human readable")
	fs.StringVar(&o.timeout, "timeout", "0", "end a recording after `seconds` (or a duration such as 90s); 0: no limit")
	fs.StringVar(&o.metrics, "metrics-address", "", "serve Prometheus metrics at this `address`: HOST:PORT of the loopback interface, or unix:PATH (default none)")
	fs.BoolVar(&o.overwrite, "overwrite", false, "replace the lists that are there, and rebuild images again for other lists")
}

// apply lays the flags that were given over c.
func (o *options) apply(fs *flag.FlagSet, c *nriplugin.Config) (err error) {
	fs.Visit(func(set *flag.Flag) {
		switch set.Name {
		case "events":
			c.Events = []string{o.events}
		case "server-path":
			c.ServerPath = o.server
		case "persist-dir":
			c.PersistDir = o.dir
		case "readable":
			c.Readable = o.readable
		case "timeout":
			c.Timeout, err = nriplugin.ParseTimeout(o.timeout)
		case "metrics-address":
			c.MetricsAddress = o.metrics
		case "overwrite":
			c.Overwrite = o.overwrite
		}
	})
	if err != nil {
		return fmt.Errorf("--timeout: %w", err)
	}
	return c.Validate()
}

func parseFlags(args []string, stdout, stderr io.Writer) (*flags, error) {
	f := &flags{base: nriplugin.DefaultConfig()}
	var o options
	fs := flag.NewFlagSet("optimizer-nri-plugin", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, usage)
		fs.PrintDefaults()
	}
	o.define(fs, f)
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return &flags{version: true}, nil
		}
		return nil, errUsage
	}
	if f.version {
		fmt.Fprintln(stdout, "optimizer-nri-plugin", version())
		return f, nil
	}
	var err error
	switch {
	case fs.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case o.config != "":
		f.own, err = readConfig(o.config)
		if err == nil {
			err = o.apply(fs, f.own)
		}
	}
	if err == nil {
		err = o.apply(fs, &f.base)
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

func readConfig(path string) (*nriplugin.Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	c, err := nriplugin.ParseConfig(data, nriplugin.DefaultConfig())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &c, nil
}

// version is that of the module and its commit, as the build recorded it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return info.Main.Version + " " + s.Value
		}
	}
	return info.Main.Version
}

func serve(ctx context.Context, f *flags, launch *nriplugin.Launch, stderr io.Writer) (err error) {
	log, closer, err := nriplugin.NewLogger(&f.base, stderr, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closer.Close()) }()
	signal.Ignore(syscall.SIGPIPE) // a reader of our stderr may go away
	counts, server := metrics.New(), &metrics.Server{}
	defer func() { err = errors.Join(err, server.Close()) }()
	var pages *tracefs.Pool
	closePages := func() error { return nil }
	if nriplugin.WarnPrivileges(log) {
		pages, closePages = nriplugin.OpenPages(log)
	}
	defer func() { err = errors.Join(err, closePages()) }()
	p, err := nriplugin.New(nriplugin.Options{
		Own: f.own, Base: f.base, Log: log, Metrics: counts,
		Open: func(c nriplugin.Config) (*nriplugin.Backend, error) {
			return nriplugin.OpenBackend(c, nriplugin.BackendOptions{
				Stderr: stderr, Launched: launch != nil, Command: rebuild.Self(verbRebuild),
				Metrics: counts, Server: server, Pages: pages,
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
