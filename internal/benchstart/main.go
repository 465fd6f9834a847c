// Command benchstart measures the cold start of real programs over a simulated link, from nothing on the
// machine to the line that says ready: with the whole image pulled and unpacked by containerd, with our
// lazy mount, and with the real nydusd, each from the same real registry behind the same link.
//
//	go run ./internal/benchstart [-workloads python,nginx] [-links fast,middle,slow] [-modes pull,lazy,prefetch,fuse,fuse-prefetch,nydusd,nydusd-prefetch] [-runs 3]
//	go run ./internal/benchstart -json start.json -svg docs/start.svg
//
// Every run begins with nothing: a containerd, a state directory or a nydusd cache of its own. The daemons of
// the lazy mount and nydusd start within the time, containerd runs already. The container is the same
// for all: an overlay on what was mounted, started by package runroot. Times are medians.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/headstart-oci/headstart/internal/linksim"
	"github.com/headstart-oci/headstart/internal/peakmem"
	"github.com/headstart-oci/headstart/internal/runroot"
	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/tools"
	"github.com/headstart-oci/headstart/internal/workload"
)

func main() {
	if runroot.IsChild() {
		os.Exit(runroot.Child())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchstart:", err)
		os.Exit(1)
	}
}

// links are those that can be asked for.
var links = []namedLink{
	{"fast", linksim.Profile{RTT: 10 * time.Millisecond, BitsPerSecond: 1e9}},
	{"middle", linksim.Profile{RTT: 20 * time.Millisecond, BitsPerSecond: 100e6}},
	{"slow", linksim.Profile{RTT: 80 * time.Millisecond, BitsPerSecond: 25e6}},
}

// namedLink is a link as flags name it.
type namedLink struct {
	name    string
	profile linksim.Profile
}

// mode is one way to start an image.
type mode struct {
	name, title string
	// start brings the image here and returns where its root is and how to take it away again.
	start func(context.Context, *bench, *image, *linksim.Link, string) (*started, error)
}

var modes = []mode{
	{"pull", "containerd: pull and unpack", startPull},
	{"lazy", "lazy mount, no prefetch blob", startLazy},
	{"prefetch", "lazy mount, our prefetch blob", startPrefetch},
	{"fuse", "FUSE driver, no prefetch blob", startFUSE},
	{"fuse-prefetch", "FUSE driver, our prefetch blob", startFUSEPrefetch},
	{"nydusd", "nydusd 2.2.0, no prefetch", startNydusd},
	{"nydusd-prefetch", "nydusd 2.2.0, list in its table", startNydusdPrefetch},
}

// options are the command's flags.
type options struct {
	workloads, links, modes []string
	runs, recordings        int
	json, svg               string
	requests                bool
}

// bench is what every run needs.
type bench struct {
	options
	out, log          io.Writer
	dir               string // scratch, removed at the end
	optimizer, server string // our programs
	tools             *tools.Store
	registry          *testcri.Registry
}

func parse(args []string, stderr io.Writer) (o options, err error) {
	fs := flag.NewFlagSet("benchstart", flag.ContinueOnError)
	fs.SetOutput(stderr)
	list := func(name, value, usage string) *string { return fs.String(name, value, "comma-separated "+usage) }
	w := list("workloads", "python,nginx,node,jdk", "programs: python, nginx, node, jdk, static")
	l := list("links", "fast,middle,slow", "links: fast (10 ms, 1 Gbit/s), middle (20 ms, 100 Mbit/s), slow (80 ms, 25 Mbit/s)")
	m := list("modes", "pull,lazy,prefetch,nydusd,nydusd-prefetch", "ways to start")
	fs.IntVar(&o.runs, "runs", 3, "starts of each kind; the median counts")
	fs.IntVar(&o.recordings, "recordings", 3, "starts that are recorded for the prefetch blob, one after the other")
	fs.StringVar(&o.json, "json", "", "file for all results")
	fs.StringVar(&o.svg, "svg", "", "file for a plot")
	fs.BoolVar(&o.requests, "requests", false, "print what each start asks the registry for")
	if err := fs.Parse(args); err != nil {
		return o, flag.ErrHelp
	}
	if fs.NArg() > 0 || o.runs < 1 || o.recordings < 1 {
		fmt.Fprintf(stderr, "got arguments %q, %d runs and %d recordings, want none, and at least 1 of each\n", fs.Args(), o.runs, o.recordings)
		return o, flag.ErrHelp
	}
	o.workloads, o.links, o.modes = strings.Split(*w, ","), strings.Split(*l, ","), strings.Split(*m, ",")
	for _, name := range o.links {
		if !slices.ContainsFunc(links, func(l namedLink) bool { return l.name == name }) {
			fmt.Fprintf(stderr, "got the link %q, want fast, middle or slow\n", name)
			return o, flag.ErrHelp
		}
	}
	for _, name := range o.modes {
		if !slices.ContainsFunc(modes, func(m mode) bool { return m.name == name }) {
			fmt.Fprintf(stderr, "got the mode %q, want pull, lazy, prefetch, fuse, fuse-prefetch, nydusd or nydusd-prefetch\n", name)
			return o, flag.ErrHelp
		}
	}
	return o, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	b := &bench{out: stdout, log: stderr}
	if b.options, err = parse(args, stderr); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "headstart-benchstart-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if b.tools, err = tools.NewStore(tools.Options{Out: stderr}); err != nil {
		return err
	}
	if b.optimizer, err = tools.BuildCommand(ctx, "./cmd/optimizer"); err != nil {
		return err
	}
	if b.server, err = tools.BuildCommand(ctx, "./cmd/optimizer-server"); err != nil {
		return err
	}
	if b.registry, err = testcri.StartRegistry(ctx, testcri.RegistryOptions{Dir: b.dir, Out: stderr}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.registry.Close()) }()
	var all []result
	for _, name := range b.workloads {
		some, err := b.workload(ctx, workload.Name(name))
		all = append(all, some...)
		if err != nil {
			return errors.Join(fmt.Errorf("%s: %w", name, err), b.save(all))
		}
	}
	return b.save(all)
}

// workload runs all modes over all links with one image and prints their rows.
func (b *bench) workload(ctx context.Context, name workload.Name) (all []result, err error) {
	img, err := b.prepare(ctx, name)
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if !slices.Contains(b.links, l.name) {
			continue
		}
		b.printHead(img, l.profile)
		runs := make(map[string][]result)
		for range b.runs { // in turn, so that a slow minute of the machine is everybody's
			for _, m := range modes {
				if !slices.Contains(b.modes, m.name) {
					continue
				}
				r, err := b.once(ctx, img, l.profile, m)
				if err != nil {
					return all, fmt.Errorf("%s over %s: %w", m.name, l.profile, err)
				}
				r.Workload, r.Link, r.Mode = string(name), l.name, m.name
				runs[m.name] = append(runs[m.name], r)
			}
		}
		var rows []result
		for _, m := range modes {
			if len(runs[m.name]) > 0 {
				rows = append(rows, median(runs[m.name]))
			}
		}
		b.printRows(img, l.profile, rows)
		all = append(all, rows...)
	}
	return all, nil
}

// once starts the image once with nothing there, and once more with what the first start left.
func (b *bench) once(ctx context.Context, img *image, p linksim.Profile, m mode) (r result, err error) {
	dir, err := os.MkdirTemp(b.dir, m.name+"-")
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	link, err := linksim.Start(b.registry.Host, p)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, link.Close()) }()
	s, err := m.start(ctx, b, img, link, dir)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	r.Mounted, r.Misses = time.Since(s.began), -1
	first, err := startContainer(ctx, img, s.layers, filepath.Join(dir, "first"), func() error {
		passed := link.Stats() // what goes on from here on is not the start's
		r.Down, r.Up, r.Requests, r.Connections = passed.Down, passed.Up, passed.Requests, passed.Connections
		if b.requests {
			for _, q := range link.Requests() {
				fmt.Fprintf(b.out, "    %8.3fs %s %s %s\n", q.At.Sub(s.began).Seconds(), q.Method, q.Target, q.Range)
			}
		}
		if s.report == nil {
			return nil
		}
		return s.report(&r)
	})
	if err != nil {
		return r, err
	}
	r.Ready = first.ready.Sub(s.began)
	if s.after != nil {
		if err := s.after(&r); err != nil {
			return r, err
		}
	}
	again, err := startContainer(ctx, img, s.layers, filepath.Join(dir, "again"), nil)
	if err != nil {
		return r, fmt.Errorf("again: %w", err)
	}
	r.Warm = again.ready.Sub(again.began)
	r.Memory, err = peakmem.RSS(s.pids...)
	return r, err
}
