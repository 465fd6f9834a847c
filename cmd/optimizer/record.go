package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/runroot"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/persist"
)

type recordOptions struct {
	*global
	remote remoteFlags

	pid       int
	container string
	root      string
	command   []string

	env     []string
	workDir string
	user    string
	inPlace bool

	timeout    time.Duration
	idle       time.Duration
	serverPath string

	output    string
	format    string
	readable  bool
	reference string
	digest    string
	uid, gid  int
}

func newRecord(g *global) *cobra.Command {
	o := &recordOptions{global: g}
	cmd := &cobra.Command{
		Use:   "record (--pid PID | --container ID | --root DIR -- COMMAND [ARGUMENT]...)",
		Short: "Record which files a workload reads, in order",
		Long: `record writes the access list of a workload. It attaches to a running process or container,
which misses what was read before, or runs a command in a root directory, in mount and
process namespaces of its own, traced from its first instruction.

What a command in a root directory writes is thrown away, unless --in-place is given. The
recording ends with the workload, after --timeout, after --idle without a first touch of a
file, or on Ctrl-C; the list is written in each case. It takes root.`,
		Example: `  optimizer record --root rootfs -o app.list -- /usr/bin/python3 -c 'import flask'
  optimizer record --container 3f2a --idle 30s -o web.list
  optimizer record --pid 4242 --timeout 1m --format paths -o -`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.arguments(cmd, args); err != nil {
				return err
			}
			return o.run(cmd.Context())
		},
	}
	o.addFlags(cmd)
	return cmd
}

func (o *recordOptions) addFlags(cmd *cobra.Command) {
	o.remote.addContainerdFlags(cmd)
	f := cmd.Flags()
	f.IntVar(&o.pid, "pid", 0, "attach to the root that this process has")
	f.StringVar(&o.container, "container", "", "attach to this container of containerd; the beginning of its id is enough")
	f.StringVar(&o.root, "root", "", "run a command in this directory")
	f.StringArrayVarP(&o.env, "env", "e", nil, "KEY=VALUE for the command; may be repeated")
	f.StringVarP(&o.workDir, "workdir", "w", "/", "working directory of the command")
	f.StringVarP(&o.user, "user", "u", "0:0", "UID[:GID] of the command")
	f.BoolVar(&o.inPlace, "in-place", false, "keep what the command writes, in the directory itself")
	f.DurationVar(&o.timeout, "timeout", 0, "end the recording after this time (default no limit)")
	f.DurationVar(&o.idle, "idle", 0, "end it when no file was touched for the first time for so long (default no limit)")
	f.StringVar(&o.serverPath, "server-path", "", "the optimizer-server program (default beside this one, then in PATH)")
	f.StringVarP(&o.output, "output", "o", "", "file for the list, - for standard output (required)")
	f.StringVar(&o.format, "format", "native", "format of the list: native, paths, csv or json")
	f.BoolVar(&o.readable, "readable", false, "sizes and times with units, in a csv")
	f.StringVar(&o.reference, "reference", "", "image reference to note in the list")
	f.StringVar(&o.digest, "digest", "", "digest of the image's manifest to note in the list")
}

func (o *recordOptions) arguments(cmd *cobra.Command, args []string) (err error) {
	ways := 0
	for _, given := range []bool{o.pid != 0, o.container != "", o.root != ""} {
		if given {
			ways++
		}
	}
	switch {
	case ways != 1:
		return usagef(cmd, "want one of --pid, --container and --root")
	case o.pid < 0:
		return usagef(cmd, "--pid: got %d, want a process id", o.pid)
	case o.root == "" && len(args) > 0:
		return usagef(cmd, "a command (%q) goes with --root", args[0])
	case o.root != "" && len(args) == 0:
		return usagef(cmd, "--root: want a command after --")
	case o.output == "":
		return usagef(cmd, "want --output FILE, or --output - for standard output")
	case o.timeout < 0 || o.idle < 0:
		return usagef(cmd, "--timeout and --idle: got %s and %s, want at least 0", o.timeout, o.idle)
	}
	if _, err := o.writer(&persist.List{}); err != nil {
		return usagef(cmd, "--format: %w", err)
	}
	if o.uid, o.gid, err = parseUser(o.user); err != nil {
		return usagef(cmd, "--user: %w", err)
	}
	for _, e := range o.env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" {
			return usagef(cmd, "--env: got %q, want KEY=VALUE", e)
		}
	}
	if !filepath.IsAbs(o.workDir) {
		return usagef(cmd, "--workdir: got %q, want an absolute path", o.workDir)
	}
	o.command = args
	return nil
}

func parseUser(s string) (uid, gid int, err error) {
	u, g, ok := strings.Cut(s, ":")
	if !ok {
		g = u
	}
	for from, to := range map[string]*int{u: &uid, g: &gid} {
		n, err := strconv.ParseUint(from, 10, 31)
		if err != nil {
			return 0, 0, fmt.Errorf("got %q, want UID or UID:GID in numbers", s)
		}
		*to = int(n)
	}
	if u == g {
		gid = uid
	}
	return uid, gid, nil
}

// writer returns what writes l in the format that was asked for; it returns how many
// paths the format cannot hold.
func (o *recordOptions) writer(l *persist.List) (func(w io.Writer) (int, error), error) {
	switch o.format {
	case "native":
		return func(w io.Writer) (int, error) { _, err := l.WriteTo(w); return 0, err }, nil
	case "paths":
		return l.WritePaths, nil
	case "csv":
		return func(w io.Writer) (int, error) { return l.WriteCSV(w, o.readable) }, nil
	case "json":
		return l.WriteJSON, nil
	}
	return nil, fmt.Errorf("got %q, want native, paths, csv or json", o.format)
}

func (o *recordOptions) write(l *persist.List) error {
	write, err := o.writer(l)
	if err != nil {
		return err
	}
	var omitted int
	fill := func(w io.Writer) (err error) {
		omitted, err = write(w)
		return err
	}
	if o.output == "-" {
		err = fill(o.out)
	} else {
		err = writeFile(o.output, fill)
	}
	if err == nil && omitted > 0 {
		o.warn("%d paths were left out: the format %s cannot hold them", omitted, o.format)
	}
	return err
}

// server returns the path of the optimizer-server program.
func (o *recordOptions) server() (string, error) {
	const name = "optimizer-server"
	if o.serverPath != "" {
		return o.serverPath, nil
	}
	if self, err := os.Executable(); err == nil {
		if beside := filepath.Join(filepath.Dir(self), name); isExecutable(beside) {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%w; name it by --server-path", err)
	}
	return path, nil
}

func isExecutable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

func (o *recordOptions) run(ctx context.Context) error {
	server, err := o.server()
	if err != nil {
		return err
	}
	l := &persist.List{Reference: o.reference, Digest: o.digest, Engine: "fanotify", Grade: "file"}
	if o.root != "" {
		return o.runInRoot(ctx, server, l)
	}
	if o.container != "" {
		if err := o.attach(ctx, l); err != nil {
			return err
		}
	}
	return o.runAttached(ctx, server, l)
}

// runInRoot runs the command and records it from its first instruction.
func (o *recordOptions) runInRoot(ctx context.Context, server string, l *persist.List) error {
	l.Command, l.Container, l.Platform = o.command, "root-"+strconv.FormatInt(time.Now().Unix(), 36), hostPlatform()
	stdout := o.out
	if o.output == "-" {
		stdout = o.err // the list has standard output for itself
	}
	p, err := runroot.Start(ctx, runroot.Options{
		Root: o.root, Args: o.command, Env: o.env, Dir: o.workDir, UID: o.uid, GID: o.gid,
		InPlace: o.inPlace, Stdin: o.in, Stdout: stdout, Stderr: o.err,
	})
	if err != nil {
		return err
	}
	ours, err := o.trace(ctx, server, p.PID(), l, p)
	if err != nil {
		return err
	}
	exited := p.Wait()
	if err := o.finish(l); err != nil {
		return err
	}
	if exit, ok := errors.AsType[*exec.ExitError](exited); ok && !ours {
		return fmt.Errorf("the command ended with %s; the list was written", exit.ProcessState)
	}
	if ours {
		return nil
	}
	return exited
}

func (o *recordOptions) runAttached(ctx context.Context, server string, l *persist.List) error {
	if _, err := o.trace(ctx, server, o.pid, l, nil); err != nil {
		return err
	}
	return o.finish(l)
}

// errTracerDied is returned after the list was written: only some formats can say in the
// list itself that it is incomplete.
var errTracerDied = errors.New("the tracer died before the recording ended; the list was written and is incomplete")

// finish writes the list and says what is in it.
func (o *recordOptions) finish(l *persist.List) error {
	if err := o.write(l); err != nil {
		return err
	}
	o.summarize(l)
	if l.End == tracer.EndKilled {
		return errTracerDied
	}
	return nil
}

func (o *recordOptions) summarize(l *persist.List) {
	o.note("%d files in %s, ended by %s; %d touches of other things were left out", len(l.Accesses), l.Duration.Round(time.Millisecond), l.End, l.Skipped)
	for _, x := range l.Losses {
		o.warn("the list is incomplete: %s (%d): %s", x.Reason, x.Count, x.Detail)
	}
}
