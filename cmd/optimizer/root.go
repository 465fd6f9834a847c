package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/progress"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/lazy"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// streams are where a command reads and writes. Only data goes to out.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// usageError is a command line that cannot be meant.
type usageError struct {
	command string
	err     error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(cmd *cobra.Command, format string, args ...any) error {
	return &usageError{cmd.CommandPath(), fmt.Errorf(format, args...)}
}

// global are the options that every command has.
type global struct {
	streams
	quiet bool
}

// display returns where progress is shown: nowhere when --quiet was given.
func (g *global) display() *progress.Display {
	if g.quiet {
		return nil
	}
	return progress.New(g.err)
}

// note writes a line for a person, unless --quiet was given.
func (g *global) note(format string, args ...any) {
	if !g.quiet {
		fmt.Fprintf(g.err, "optimizer: "+format+"\n", args...)
	}
}

// warn writes a line for a person, always.
func (g *global) warn(format string, args ...any) {
	fmt.Fprintf(g.err, "optimizer: warning: "+format+"\n", args...)
}

// verb is a command right below the root: its name, and what makes it.
type verb struct {
	name string
	make func(*global) *cobra.Command
}

func verbs() []verb {
	return []verb{
		{"record", newRecord},
		{"convert", newConvert},
		{"optimize", newOptimize},
		{"check", newCheck},
		{"inspect", newInspect},
		{"unpack", newUnpack},
		{"export", newExport},
		{"diff", newDiff},
		{"merge", newMerge},
		{"profile", newProfile},
		{"mount", newMount},
		{"umount", newUmount},
		{"status", newStatus},
		{"cache", newCache},
		{"lazyd", newLazyd},
		{"version", newVersion},
	}
}

// verbsFor returns the commands that a command line can be about: the one that its first argument names, else all,
// which help, completion and hints look at. The flags of all take a tenth of the time of a short command.
func verbsFor(args []string) []verb {
	all := verbs()
	if len(args) == 0 {
		return all
	}
	if i := slices.IndexFunc(all, func(v verb) bool { return v.name == args[0] }); i >= 0 {
		return all[i : i+1]
	}
	return all
}

// newRoot returns the root with the commands that args, the command line, can be about.
func newRoot(s streams, args []string) *cobra.Command {
	g := &global{streams: s}
	root := &cobra.Command{
		Use:   "optimizer",
		Short: "Rebuild container images around what their start reads",
		Long: `optimizer records which files a workload reads, and rebuilds its image so that these
files come first: a Nydus image (RAFS v6) with a separate prefetch blob.

Images are named by references:
  oci:DIR[:TAG]               an OCI layout directory
  oci-archive:FILE[:TAG]      a tar of one
  containerd:[NAMESPACE/]REF  an image in containerd
  anything else               an image in a registry, as docker names it

Exit status: 0 done, 1 failed, 2 the command line was wrong.`,
		Example: `  optimizer record --root rootfs -o app.list -- /usr/bin/app --selftest
  optimizer convert registry.example/app:v1 registry.example/app:v1-optimized --profile app.list
  optimizer check registry.example/app:v1-optimized`,
		SilenceErrors: true, SilenceUsage: true, SuggestionsMinimumDistance: 2,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			text := fmt.Sprintf("unknown command %q", args[0])
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				text += fmt.Sprintf(", did you mean %s?", strings.Join(near, " or "))
			}
			return usagef(cmd, "%s", text)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usagef(cmd, "no command: want one of %s", strings.Join(commandNames(cmd), ", "))
		},
	}
	root.Version = version(debug.ReadBuildInfo())
	root.SetVersionTemplate("{{.Version}}\n")
	root.SetIn(s.in)
	root.SetOut(s.out)
	root.SetErr(s.err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usagef(cmd, "%w", err) })
	root.PersistentFlags().BoolVarP(&g.quiet, "quiet", "q", false, "say nothing but errors and warnings")
	for _, v := range verbsFor(args) {
		root.AddCommand(v.make(g))
	}
	root.SetArgs(args)
	return root
}

func commandNames(root *cobra.Command) []string {
	var names []string
	for _, c := range root.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	return names
}

// atMost returns a check that there are no more than n arguments, called what.
func atMost(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > n {
			return usagef(cmd, "got %d arguments %q, want %s", len(args), args, what)
		}
		return nil
	}
}

// remoteFlags are the options about where images are.
type remoteFlags struct {
	plainHTTP    bool
	hostsDir     string
	dockerConfig string
	address      string
	namespace    string
	retries      int
	stall        time.Duration
}

func (f *remoteFlags) addFlags(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.BoolVar(&f.plainHTTP, "plain-http", false, "speak http to registries that hosts.toml does not configure")
	fl.StringVar(&f.hostsDir, "hosts-dir", "", "containerd's directory of HOST/hosts.toml (default /etc/containerd/certs.d)")
	fl.StringVar(&f.dockerConfig, "docker-config", "", "docker's config.json with credentials, or its directory (default $DOCKER_CONFIG, ~/.docker)")
	f.retries, f.stall = 4, 30*time.Second
	fl.Var((*count)(&f.retries), "retries", "how often a request is repeated that a registry failed to answer; 0: never")
	fl.Var((*span)(&f.stall), "stall-timeout", "how long a registry that is silent is waited for, above 0")
	f.addContainerdFlags(cmd)
}

// count is a flag's number, 0 or more.
type count int

func (c *count) String() string { return strconv.Itoa(int(*c)) }
func (c *count) Type() string   { return "int" }

func (c *count) Set(s string) error {
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		return fmt.Errorf("got %q, want a number from 0", s)
	}
	*c = count(n)
	return nil
}

// span is a flag's duration, above 0.
type span time.Duration

func (d *span) String() string { return time.Duration(*d).String() }
func (d *span) Type() string   { return "duration" }

func (d *span) Set(s string) error {
	n, err := time.ParseDuration(s)
	if err != nil || n <= 0 {
		return fmt.Errorf("got %q, want a time above 0 such as 30s", s)
	}
	*d = span(n)
	return nil
}

func (f *remoteFlags) addContainerdFlags(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.address, "containerd-address", "", "containerd's socket (default /run/containerd/containerd.sock)")
	fl.StringVarP(&f.namespace, "namespace", "n", "", "containerd's namespace where a reference names none (default "+remote.DefaultNamespace+")")
}

func (f *remoteFlags) options() remote.Options {
	retries := f.retries
	if retries <= 0 {
		retries = -1 // none: zero means the default there
	}
	return remote.Options{
		Retries: retries, Timeouts: remote.Timeouts{Connect: min(f.stall, 15*time.Second), Header: f.stall, Stall: f.stall},
		PlainHTTP: f.plainHTTP, HostsDir: f.hostsDir, DockerConfig: f.dockerConfig,
		ContainerdAddress: f.address, Namespace: f.namespace, RegistryFallback: true,
	}
}

// parseSize reads a number of bytes: decimal, 0x…, or with a unit (K, KiB, M, MiB, G, GiB;
// all powers of 1024).
func parseSize(s string) (uint64, error) {
	digits, shift := s, 0
	for i, unit := range []string{"k", "m", "g"} {
		for _, suffix := range []string{unit, unit + "ib"} {
			if rest, ok := strings.CutSuffix(strings.ToLower(s), suffix); ok {
				digits, shift = strings.TrimSpace(rest), 10*(i+1)
			}
		}
	}
	n, err := strconv.ParseUint(digits, 0, 64)
	if err != nil || n > 1<<62>>shift {
		return 0, fmt.Errorf("size %q: want a number of bytes like 1MiB, 0x100000 or 1048576", s)
	}
	return n << shift, nil
}

// hint says what to do next about an error, where there is something to say.
func hint(err error) string {
	switch {
	case errors.Is(err, remote.ErrUnauthorized):
		return "log in with 'docker login', or name the file with the credentials by --docker-config"
	case errors.Is(err, remote.ErrPlatform):
		return "choose a platform that the image has by --platform"
	case errors.Is(err, unix.ENOSPC):
		return roomHint(err)
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return "the registry speaks http: --plain-http, or a hosts.toml for it"
	case errors.Is(err, lazy.ErrBusy):
		return "end what uses it ('fuser -vm DIR' tells), or give --lazy"
	}
	return ""
}

// roomHint says where room is to be made: what is temporary can go elsewhere.
func roomHint(err error) string {
	e, ok := errors.AsType[*fs.PathError](err)
	switch {
	case !ok:
		return "make room where the result goes, and for temporary files, which --temp-dir or TMPDIR puts elsewhere"
	case strings.Contains("/"+filepath.ToSlash(e.Path), "/headstart-"): // as temporary files and directories are called
		return "make room, or choose another place for temporary files by --temp-dir or TMPDIR"
	}
	return "make room where the result goes"
}

// checkWorkers says what is wrong with the value of --workers: each takes memory for the chunks that it has in hand.
func checkWorkers(n int) error {
	if n < 0 || n > builder.MaxWorkers {
		return fmt.Errorf("got %d, want 1 to %d, or 0 for one per CPU", n, builder.MaxWorkers)
	}
	return nil
}
