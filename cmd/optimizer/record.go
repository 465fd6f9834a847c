package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/imageroot"
	"github.com/headstart-oci/headstart/internal/readylog"
	"github.com/headstart-oci/headstart/internal/runroot"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// defaultStore is where lists go that have an image and no --output: the plugin's persist_dir.
const defaultStore = "/opt/nri/optimizer/results"

type recordOptions struct {
	*global
	remote remoteFlags

	pid       int
	container string
	root      string
	image     string
	ref       remote.Reference // of image
	command   []string

	env        []string
	workDir    string
	user       string
	entrypoint []string // nil: the image's
	inPlace    bool
	net        string
	mounts     []runroot.Mount
	scratch    string
	platform   string
	exact      bool

	timeout    time.Duration
	idle       time.Duration
	untilLog   *regexp.Regexp
	said       chan struct{} // closed when a line matched untilLog
	watched    chan struct{} // closed when the container's log is read no more; nil: it is not
	pages      recordPages
	serverPath string

	output    string
	store     string
	format    string
	readable  bool
	reference string
	digest    string
	uid, gid  int
}

// recordFlags are flags whose values are worked out by [recordOptions.arguments].
type recordFlags struct {
	untilLog, entrypoint string
	mounts               []string
}

func newRecord(g *global) *cobra.Command {
	o := &recordOptions{global: g, said: make(chan struct{})}
	var raw recordFlags
	cmd := &cobra.Command{
		Use:   "record (IMAGE [-- ARGUMENT...] | --container ID | --pid PID | --root DIR -- COMMAND [ARGUMENT]...)",
		Short: "Record which files a workload reads, in order",
		Long: `record writes the access list of a workload. It runs an image, or a command in a root
directory, traced from its first instruction; or it attaches to a running container or process,
which misses what was read before: that list counts as incomplete, and replaces none that is there.

An image (a registry's, oci:DIR, oci-archive:FILE or containerd:REF) is unpacked into a private
directory, which goes when the recording ends, and run with its entrypoint, environment, user, working
directory and volumes, in mount, process and IPC namespaces of its own, with a container's
capabilities. It needs no container runtime. Arguments replace the image's command.

With --exact the image is mounted lazily instead (see mount), cold and with read-ahead off, so that the
list has the pages that were touched and no others. A Nydus image is fetched as far as it is read; any other is
converted for the recording first. Merge the list into a profile to sharpen it.

What a command writes is thrown away, unless --root is used with --in-place. The recording ends with
the workload's first process (and what it started ends with it), after --timeout, after --idle without a
first touch of a file, at a line that matches --until-log, or on Ctrl-C; the list is written in each
case. The exit status is 1 when the workload ended by itself and failed. It takes root.`,
		Example: `  optimizer record nginx:latest --until-log 'start worker process'
  optimizer record oci:./layout:app --env MODE=fast -o app.list -- --serve --port 8080
  optimizer record --exact nginx:latest --until-log 'start worker process' -o exact.list
  optimizer record --root rootfs -o app.list -- /usr/bin/python3 -c 'import flask'
  optimizer record --container 3f2a --idle 30s -o web.list
  optimizer record --pid 4242 --timeout 1m --format paths -o -`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.arguments(cmd, args, raw); err != nil {
				return err
			}
			return o.run(cmd.Context())
		},
	}
	o.addFlags(cmd, &raw)
	return cmd
}

func (o *recordOptions) addFlags(cmd *cobra.Command, raw *recordFlags) {
	o.remote.addFlags(cmd)
	f := cmd.Flags()
	f.IntVar(&o.pid, "pid", 0, "attach to the root that this process has")
	f.StringVar(&o.container, "container", "", "attach to this container of containerd, in any namespace; the beginning of its id is enough")
	f.StringVar(&o.root, "root", "", "run a command in this directory")
	f.StringArrayVarP(&o.env, "env", "e", nil, "KEY=VALUE for the command; may be repeated")
	f.StringVarP(&o.workDir, "workdir", "w", "", "working directory of the command (default the image's, else /)")
	f.StringVarP(&o.user, "user", "u", "", "user of the command: UID[:GID], or names of an image (default the image's, else 0:0)")
	f.StringVar(&raw.entrypoint, "entrypoint", "", "program to run in place of the image's entrypoint")
	f.BoolVar(&o.inPlace, "in-place", false, "keep what the command writes, in the directory itself")
	f.StringVar(&o.net, "net", "host", "network of the command: host, or none")
	f.StringArrayVar(&raw.mounts, "mount", nil, "type=bind,source=PATH,target=PATH[,readonly]; may be repeated")
	f.StringVar(&o.scratch, "scratch", "", "directory to unpack images in (default "+imageroot.DefaultBase+")")
	f.StringVar(&o.platform, "platform", "", "platform of the image (default this machine's)")
	f.BoolVar(&o.exact, "exact", false, "run the image on a cold lazy mount without read-ahead, to record the pages that are touched and no others")
	f.DurationVar(&o.timeout, "timeout", 0, "end the recording after this time (default no limit)")
	f.DurationVar(&o.idle, "idle", 0, "end it when no file was touched for the first time for so long (default no limit)")
	f.StringVar(&raw.untilLog, "until-log", "", "end it at the first line of output, or of a container's log, that matches this regular expression")
	f.StringVar(&o.serverPath, "server-path", "", "the optimizer-server program (default beside this one, then in PATH)")
	f.StringVarP(&o.output, "output", "o", "", "file for the list, - for standard output (default, for images and containers, --persist-dir)")
	f.StringVar(&o.store, "persist-dir", defaultStore, "directory of lists, as the plugin keeps them, where there is no --output")
	f.StringVar(&o.format, "format", "native", "format of the list: native, paths, csv or json")
	f.BoolVar(&o.readable, "readable", false, "sizes and times with units, in a csv")
	f.StringVar(&o.reference, "reference", "", "image reference to note in the list")
	f.StringVar(&o.digest, "digest", "", "digest of the image's manifest to note in the list")
}

func (o *recordOptions) arguments(cmd *cobra.Command, args []string, raw recordFlags) error {
	if err := o.what(cmd, args); err != nil {
		return err
	}
	switch {
	case o.output == "" && o.image == "" && o.container == "":
		return usagef(cmd, "want --output FILE, or --output - for standard output")
	case o.output == "" && o.format != "native":
		return usagef(cmd, "--format: the store takes all formats; want --output FILE for one")
	case o.timeout < 0 || o.idle < 0:
		return usagef(cmd, "--timeout and --idle: got %s and %s, want at least 0", o.timeout, o.idle)
	case o.net != "host" && o.net != "none":
		return usagef(cmd, "--net: got %q, want host or none", o.net)
	}
	if _, err := o.writer(&persist.List{}); err != nil {
		return usagef(cmd, "--format: %w", err)
	}
	if err := o.until(cmd, raw.untilLog); err != nil {
		return err
	}
	return o.how(cmd, raw)
}

// what finds out what is to be recorded.
func (o *recordOptions) what(cmd *cobra.Command, args []string) (err error) {
	ways := 0
	for _, given := range []bool{o.pid != 0, o.container != "", o.root != ""} {
		if given {
			ways++
		}
	}
	dash := cmd.ArgsLenAtDash()
	switch {
	case ways > 1, ways == 0 && (len(args) == 0 || dash == 0):
		return usagef(cmd, "want one of IMAGE, --pid, --container and --root")
	case o.pid < 0:
		return usagef(cmd, "--pid: got %d, want a process id", o.pid)
	case o.root == "" && ways == 1 && len(args) > 0:
		return usagef(cmd, "a command (%q) goes with --root or an image", args[0])
	case o.root != "" && len(args) == 0:
		return usagef(cmd, "--root: want a command after --")
	case ways == 1:
		o.command = args
		return nil
	case dash < 0 && len(args) > 1, dash > 1:
		return usagef(cmd, "got the image %s and %q, want -- before the command's arguments", args[0], args[1])
	}
	o.image, o.command = args[0], args[1:]
	if o.ref, err = remote.Parse(o.image); err != nil {
		return usagef(cmd, "%w", err)
	}
	return nil
}

func (o *recordOptions) until(cmd *cobra.Command, pattern string) (err error) {
	if pattern == "" {
		return nil
	}
	if o.pid != 0 {
		return usagef(cmd, "--until-log: nobody knows where a process with --pid logs")
	}
	if o.untilLog, err = readylog.Compile(pattern); err != nil {
		return usagef(cmd, "--until-log: %w", err)
	}
	return nil
}

// how works out how a command is run.
func (o *recordOptions) how(cmd *cobra.Command, raw recordFlags) (err error) {
	if o.image == "" {
		for _, name := range []string{"entrypoint", "scratch", "platform", "exact"} {
			if cmd.Flags().Changed(name) {
				return usagef(cmd, "--%s goes with an image", name)
			}
		}
		if o.uid, o.gid, err = parseUser(o.user); err != nil {
			return usagef(cmd, "--user: %w", err)
		}
	}
	if cmd.Flags().Changed("entrypoint") {
		o.entrypoint = []string{} // none, as docker has it
		if raw.entrypoint != "" {
			o.entrypoint = []string{raw.entrypoint}
		}
	}
	for _, e := range o.env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" {
			return usagef(cmd, "--env: got %q, want KEY=VALUE", e)
		}
	}
	if o.workDir != "" && !filepath.IsAbs(o.workDir) {
		return usagef(cmd, "--workdir: got %q, want an absolute path", o.workDir)
	}
	if len(raw.mounts) > 0 && o.inPlace {
		return usagef(cmd, "--mount would make directories in --root with --in-place")
	}
	for _, text := range raw.mounts {
		m, err := parseMount(text)
		if err != nil {
			return usagef(cmd, "--mount: %w", err)
		}
		o.mounts = append(o.mounts, m)
	}
	return nil
}

// parseMount parses docker's long form of a bind mount.
func parseMount(text string) (runroot.Mount, error) {
	var m runroot.Mount
	for field := range strings.SplitSeq(text, ",") {
		key, value, set := strings.Cut(field, "=")
		switch key {
		case "type":
			if value != "bind" {
				return m, fmt.Errorf("%s: got type %q, want bind", text, value)
			}
		case "source", "src":
			m.Source = value
		case "target", "dst", "destination":
			m.Target = value
		case "readonly", "ro":
			on, err := strconv.ParseBool(value)
			if set && err != nil {
				return m, fmt.Errorf("%s: %s: got %q, want true or false", text, key, value)
			}
			m.ReadOnly = on || !set
		default:
			return m, fmt.Errorf("%s: got %q, want type, source, target or readonly", text, key)
		}
	}
	if !filepath.IsAbs(m.Source) || !filepath.IsAbs(m.Target) || filepath.Clean(m.Target) == "/" {
		return m, fmt.Errorf("%s: got source %q and target %q, want absolute paths", text, m.Source, m.Target)
	}
	return m, nil
}

// parseUser parses UID or UID:GID; the group of a UID alone has the same number. "" is root.
func parseUser(s string) (uid, gid int, err error) {
	if s == "" {
		return 0, 0, nil
	}
	u, g, ok := strings.Cut(s, ":")
	if !ok {
		g = u
	}
	user, err := strconv.ParseUint(u, 10, 31)
	if err == nil {
		var group uint64
		if group, err = strconv.ParseUint(g, 10, 31); err == nil {
			return int(user), int(group), nil
		}
	}
	return 0, 0, fmt.Errorf("got %q, want UID or UID:GID in numbers", s)
}

func (o *recordOptions) run(ctx context.Context) (err error) {
	server, err := o.server()
	if err != nil {
		return err
	}
	if err := mayRecord(); err != nil {
		return err
	}
	if err := o.tryOutput(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.pages.close()) }()
	l := &persist.List{Reference: o.reference, Digest: o.digest, Engine: "fanotify", Grade: "file"}
	switch {
	case o.image != "":
		return o.runImage(ctx, server, l)
	case o.root != "":
		return o.runInRoot(ctx, server, l)
	}
	if o.container != "" {
		watch, stop := context.WithCancel(ctx)
		defer func() {
			if stop(); o.watched != nil {
				<-o.watched
			}
		}()
		if err := o.attach(watch, l); err != nil {
			return err
		}
	}
	return o.runAttached(ctx, server, l)
}

// mayRecord returns an error where this process has not the privileges that any recording takes.
func mayRecord() error {
	err := fanotify.Probe(fanotify.FeatureGroup)
	if !errors.Is(err, fanotify.ErrPermission) {
		return nil // what else is wrong the tracer says
	}
	if uid := os.Geteuid(); uid != 0 {
		return fmt.Errorf("record: it takes root, runs as user %d", uid)
	}
	return errors.New("record: it takes CAP_SYS_ADMIN on the host: this process has it not, or in a user namespace of its own only")
}

// runInRoot runs the command and records it from its first instruction.
func (o *recordOptions) runInRoot(ctx context.Context, server string, l *persist.List) error {
	l.Command, l.Container, l.Platform = o.command, "root-"+strconv.FormatInt(time.Now().Unix(), 36), hostPlatform()
	o.pages.open(o)
	p, err := runroot.Start(ctx, o.streamed(runroot.Options{
		Root: o.root, Args: o.command, Env: o.env, Dir: o.workDir, UID: o.uid, GID: o.gid,
		InPlace: o.inPlace, Mounts: o.mounts, NoNetwork: o.net == "none",
	}))
	if err != nil {
		return err
	}
	ours, err := o.trace(ctx, server, p.PID(), l, p)
	if err != nil {
		return err
	}
	return o.ended(l, p, ours)
}

// ended writes the list of a command that has ended, and returns how it ended unless we ended it.
func (o *recordOptions) ended(l *persist.List, p *runroot.Process, ours bool) error {
	exited := p.Wait()
	if err := o.finish(l); err != nil {
		return err
	}
	if ours {
		return nil
	}
	if exit, ok := errors.AsType[*exec.ExitError](exited); ok {
		return fmt.Errorf("the command ended with %s; the list was written", exit.ProcessState)
	}
	return exited
}

// streamed connects a command to our streams, where its output is watched for the line of --until-log.
func (o *recordOptions) streamed(r runroot.Options) runroot.Options {
	r.Stdin, r.Stdout, r.Stderr = o.in, o.out, o.err
	if o.output == "-" {
		r.Stdout = o.err // the list has standard output for itself
	}
	if o.untilLog != nil {
		say := sync.OnceFunc(func() { close(o.said) })
		found := func(string) { say() }
		r.Stdout = readylog.NewTee(r.Stdout, o.untilLog, found)
		r.Stderr = readylog.NewTee(r.Stderr, o.untilLog, found)
	}
	return r
}

func (o *recordOptions) runAttached(ctx context.Context, server string, l *persist.List) error {
	if _, err := o.trace(ctx, server, o.pid, l, nil); err != nil {
		return err
	}
	return o.finish(l)
}
