package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// The daemon stays small beside the containers it serves: 64 MiB with 20 mounts, garbage included.
const (
	lazydMemory = 48 << 20
	lazydGC     = 40
)

type lazydOptions struct {
	*global
	lazy   lazyFlags
	hold   bool
	policy policyFlags
	daemon lazy.DaemonOptions
}

// newLazyd is the daemon behind mount, which starts it.
func newLazyd(g *global) *cobra.Command {
	o := &lazydOptions{global: g}
	cmd := &cobra.Command{
		Use:    "lazyd",
		Short:  "Serve lazy mounts (started by mount)",
		Hidden: true,
		Long: `lazyd is the daemon of lazy mounts. mount starts it when there is none; a service manager may, too. It
starts a holder beside it (--hold), which keeps its descriptors and starts it again when it dies. Both end when
nothing is mounted for a while. A signal to end makes the daemon start anew while something is mounted.`,
		Example: `  optimizer lazyd --state-dir /var/lib/headstart/lazy --idle 10m`,
		Args:    atMost(0, "none"),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.daemon.Cache, err = o.policy.policy(cmd, "cache-"); err != nil {
				return err
			}
			return o.run(cmd.Context())
		},
	}
	o.lazy.addFlags(cmd)
	o.policy.addFlags(cmd, "cache-")
	fl := cmd.Flags()
	fl.BoolVar(&o.hold, "hold", false, "be the holder; only a daemon starts one")
	fl.DurationVar(&o.daemon.Idle, "idle", 0, "how long to stay with nothing mounted (default 30s)")
	fl.DurationVar(&o.daemon.CachePause, "cache-pause", lazy.DefaultCachePause, "how long to rest between two looks at what the cache takes")
	fl.DurationVar(&o.daemon.Limit, "limit", 0, "how long a reader waits for a registry that is down (default 1m)")
	return cmd
}

func (o *lazydOptions) run(ctx context.Context) (err error) {
	log := o.log()
	if o.hold {
		return lazy.RunHolder(context.WithoutCancel(ctx), log.Named("holder"))
	}
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	debug.SetMemoryLimit(lazydMemory)
	debug.SetGCPercent(lazydGC)
	d := o.daemon
	d.StateDir, d.RunDir, d.Log = o.lazy.stateDir, o.lazy.runDir, log.Named("lazyd")
	d.Version = version(debug.ReadBuildInfo())
	d.Holder = []string{"optimizer", "lazyd", "--hold"}
	d.Daemon = append([]string{"optimizer"}, os.Args[1:]...)
	if d.Ready, err = takeStdout(); err != nil {
		return err
	}
	return lazy.RunDaemon(ctx, d)
}

// takeStdout returns standard output, which is the null device from then on: no other file must ever get its number.
func takeStdout() (*os.File, error) {
	fd, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate standard output: %w", err)
	}
	out := os.NewFile(uintptr(fd), "standard output")
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err == nil {
		err = errors.Join(unix.Dup3(int(null.Fd()), 1, 0), null.Close())
	}
	if err != nil {
		return nil, errors.Join(err, out.Close())
	}
	return out, nil
}

// lazydLog returns what a daemon says of itself, on standard error.
func (o *lazydOptions) log() *zap.Logger {
	enc := zap.NewProductionEncoderConfig()
	enc.EncodeTime = zapcore.RFC3339TimeEncoder
	return zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(enc), zapcore.Lock(zapcore.AddSync(o.err)), zapcore.InfoLevel))
}
