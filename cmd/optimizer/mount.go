package main

import (
	"context"
	"fmt"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// lazyFlags say which daemon a command speaks to.
type lazyFlags struct {
	stateDir string
	runDir   string
}

func (f *lazyFlags) addFlags(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.stateDir, "state-dir", lazy.DefaultStateDir, "what was fetched, and the daemon that has it; on ext4, XFS or btrfs")
	fl.StringVar(&f.runDir, "run-dir", lazy.DefaultRunDir, "the daemon's socket and log")
}

func (f *lazyFlags) client(daemonArgs ...string) (*lazy.Client, error) {
	return lazy.NewClient(lazy.ClientOptions{StateDir: f.stateDir, RunDir: f.runDir, DaemonArgs: daemonArgs, Version: version(debug.ReadBuildInfo())})
}

type mountOptions struct {
	*global
	lazy       lazyFlags
	remote     remoteFlags
	platform   string
	bootstrap  string
	blobDir    string
	background string
	share      string
	rate       string
	readAhead  int
	noPrefetch bool
	proxy      string
	driver     string
	wait       bool
	output     string
	policy     policyFlags
	daemonArgs []string
}

func newMount(g *global) *cobra.Command { return (&mountOptions{global: g}).command() }

func (o *mountOptions) command() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "mount IMAGE DIR",
		Short: "Mount a Nydus image before its data is there",
		Long: `mount puts the tree of a Nydus image at a directory, read-only, as soon as its
bootstrap is there. The kernel reads it by itself (EROFS); what is read and not local yet is
fetched first, and verified. The prefetch blob is fetched at once, the rest by --background.

EROFS takes RAFS v6, Linux 6.14 and a state directory on ext4, XFS or btrfs. Where one of them is missing the
image is served behind FUSE, which asks the daemon more often; status says which it is, and why. --driver takes one of them.

A daemon does that, which is started when there is none and ends when nothing is mounted; readers
survive its death. The --cache flags are for the daemon that this command starts; one that runs keeps its own. Credentials are read from docker's config.json when they are needed, and kept nowhere.
It takes root.`,
		Example: `  optimizer mount registry.example/nginx:optimized /mnt
  optimizer mount --driver fuse registry.example/nginx:rafs-v5 /mnt
  optimizer mount oci:images:nginx-optimized /mnt --background full --rate 10MiB --wait
  optimizer mount --bootstrap image.boot --blob-dir blobs /mnt
  optimizer umount /mnt`,
		Args: atMost(2, "an image and a directory"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, dir, err := o.request(cmd, args)
			if err != nil {
				return err
			}
			return o.run(cmd.Context(), dir, r)
		},
	}
	o.lazy.addFlags(cmd)
	o.remote.addFlags(cmd)
	o.policy.addFlags(cmd, "cache-")
	fl := cmd.Flags()
	fl.StringVar(&o.platform, "platform", "", "OS/ARCH[/VARIANT] of an image for several (default this machine's)")
	fl.StringVar(&o.bootstrap, "bootstrap", "", "mount this bare bootstrap file instead of an image")
	fl.StringVar(&o.blobDir, "blob-dir", "", "directory of the bootstrap's blobs, each named by its id")
	fl.StringVar(&o.background, "background", "idle", "what happens to data that nobody reads: none, idle (fetched while nobody waits), full")
	fl.StringVar(&o.share, "share", "", "whose chunks on this machine are used in place of fetching them: allowed (those that this image's source would give as well: default), all or none")
	fl.StringVar(&o.rate, "rate", "0", "how many bytes a second --background may fetch; 0: no limit")
	fl.IntVar(&o.readAhead, "read-ahead", lazy.DefaultReadAhead, fmt.Sprintf("KiB that the kernel reads ahead until all is local; without a prefetch blob, and with FUSE, %d", lazy.NormalReadAhead))
	fl.BoolVar(&o.noPrefetch, "no-prefetch", false, "leave the prefetch blob and table alone")
	fl.StringVar(&o.proxy, "proxy", "", "URL of an HTTP proxy for all requests to registries, such as Dragonfly's (default: the daemon's environment)")
	fl.StringVar(&o.driver, "driver", "auto", "what answers reads: auto, erofs or fuse")
	fl.BoolVar(&o.wait, "wait", false, "return when all is local")
	fl.StringVarP(&o.output, "output", "o", "text", "what standard output gets: text (nothing) or json")
	return cmd
}

// request returns what the daemon is asked for, and where the mount goes.
func (o *mountOptions) request(cmd *cobra.Command, args []string) (lazy.Request, string, error) {
	ref, dir, err := o.arguments(cmd, args)
	if err != nil {
		return lazy.Request{}, "", err
	}
	if _, err := o.policy.policy(cmd, "cache-"); err != nil {
		return lazy.Request{}, "", err
	}
	o.daemonArgs = o.policy.args(cmd, "cache-")
	rate, err := parseSize(o.rate)
	if err != nil {
		return lazy.Request{}, "", usagef(cmd, "--rate: %w", err)
	}
	r := lazy.Request{
		Reference: ref, Bootstrap: o.bootstrap, BlobDir: o.blobDir, Platform: o.platform, Remote: o.remote.lazy(), Background: o.background, Share: o.share,
		Rate: int64(rate), NoPrefetch: o.noPrefetch, ReadAhead: o.kernelReadAhead(cmd.Flags().Changed("read-ahead")), Driver: lazy.Driver(o.driver), //nolint:gosec // parseSize bounds it
	}
	r.Remote.Proxy = o.proxy
	return r, dir, nil
}

func (o *mountOptions) arguments(cmd *cobra.Command, args []string) (ref, dir string, err error) {
	switch {
	case o.output != "text" && o.output != "json":
		return "", "", usagef(cmd, "--output: got %q, want text or json", o.output)
	case o.background != "none" && o.background != "idle" && o.background != "full":
		return "", "", usagef(cmd, "--background: got %q, want none, idle or full", o.background)
	case o.driver != "auto" && o.driver != "erofs" && o.driver != "fuse":
		return "", "", usagef(cmd, "--driver: got %q, want auto, erofs or fuse", o.driver)
	case o.share != "" && o.share != lazy.ShareAllowed && o.share != lazy.ShareAll && o.share != lazy.ShareNone:
		return "", "", usagef(cmd, "--share: got %q, want allowed, all or none", o.share)
	case o.wait && o.background == "none":
		return "", "", usagef(cmd, "--wait would wait for ever with --background none")
	case o.readAhead < 0:
		return "", "", usagef(cmd, "--read-ahead: got %d, want KiB, 0 for none", o.readAhead)
	case (o.bootstrap == "") != (o.blobDir == ""):
		return "", "", usagef(cmd, "--bootstrap and --blob-dir go together")
	case o.bootstrap != "" && len(args) == 1:
		return "", args[0], nil
	case o.bootstrap != "":
		return "", "", usagef(cmd, "--bootstrap stands for an image: want a directory, got %d arguments", len(args))
	case len(args) != 2:
		return "", "", usagef(cmd, "want an image and a directory, got %d arguments", len(args))
	}
	return args[0], args[1], nil
}

func (o *mountOptions) kernelReadAhead(given bool) int {
	if !given {
		return 0
	}
	if o.readAhead == 0 {
		return -1 // 0 means the default there
	}
	return o.readAhead
}

// lazy returns what a daemon is told of the flags.
func (f *remoteFlags) lazy() lazy.Remote {
	r := f.options()
	return lazy.Remote{
		PlainHTTP: r.PlainHTTP, HostsDir: r.HostsDir, DockerConfig: r.DockerConfig, ContainerdAddress: r.ContainerdAddress,
		Namespace: r.Namespace, RegistryFallback: r.RegistryFallback, Retries: r.Retries, Stall: f.stall,
	}
}

func (o *mountOptions) run(ctx context.Context, dir string, r lazy.Request) error {
	// No daemon is started for what cannot be mounted.
	if info, err := os.Stat(dir); err != nil {
		return fmt.Errorf("mount: %w", err)
	} else if !info.IsDir() {
		return fmt.Errorf("mount: %s is no directory", dir)
	}
	c, err := o.lazy.client(o.daemonArgs...)
	if err != nil {
		return err
	}
	m, err := c.Mount(ctx, dir, r)
	if err != nil {
		return err
	}
	o.note("%s is at %s", m.Reference, m.Dir)
	if o.wait {
		if m, err = c.Wait(ctx, m.Device); err != nil {
			return fmt.Errorf("wait for %s, which stays mounted: %w", dir, err)
		}
	}
	if o.output == "json" {
		return printJSON(o.out, m)
	}
	return nil
}
