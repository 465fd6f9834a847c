package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// The daemon stays small beside the containers it serves: 64 MiB with 20 mounts, garbage included. Some 20 of them are pages of files: the program,
// the index, the tables that outlive the process.
const (
	lazydMemory = 36 << 20
	lazydGC     = 40
)

type lazydOptions struct {
	*global
	lazy    lazyFlags
	hold    bool
	restart bool
	service bool
	alone   bool
	policy  policyFlags
	daemon  lazy.DaemonOptions
}

// newLazyd is the daemon behind mount, which starts it.
func newLazyd(g *global) *cobra.Command {
	o := &lazydOptions{global: g}
	cmd := &cobra.Command{
		Use:    "lazyd",
		Short:  "Serve lazy mounts (started by mount)",
		Hidden: true,
		Long: `lazyd is the daemon of lazy mounts. mount starts it when there is none; a service manager may, too. It
starts a holder beside it (--hold), which keeps its descriptors and starts it again when it dies, and a second one for when
both die at once. All end when nothing is mounted for a while. A signal to end makes the daemon start anew while something is mounted.

--restart has the running daemon replaced by this program, with all its mounts, and its holders 10 s later: after an upgrade. --service is for
a service manager: it stays with nothing mounted, and while another daemon serves the directory it waits for its end.`,
		Example: `  optimizer lazyd --state-dir /var/lib/headstart/lazy --idle 10m
  optimizer lazyd --restart`,
		Args: atMost(0, "none"),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.restart && (o.hold || o.service) || o.hold && o.service {
				return usagef(cmd, "--restart, --service and --hold exclude each other")
			}
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
	fl.BoolVar(&o.restart, "restart", false, "have the running daemon replaced by this program; mounts stay")
	fl.BoolVar(&o.service, "service", false, "stay with nothing mounted; wait while another daemon has the directory")
	fl.BoolVar(&o.alone, "own-cgroup", false, "leave the control group of who started it")
	fl.DurationVar(&o.daemon.Idle, "idle", 0, "how long to stay with nothing mounted (default 30s)")
	fl.DurationVar(&o.daemon.CachePause, "cache-pause", lazy.DefaultCachePause, "how long to rest between two looks at what the cache takes")
	fl.DurationVar(&o.daemon.Limit, "limit", 0, "how long a read waits at most, whatever a registry does; then it fails (default 1m)")
	return cmd
}

func (o *lazydOptions) run(ctx context.Context) (err error) {
	if o.restart {
		return o.replace(ctx)
	}
	log := o.log()
	if o.alone {
		leaveCgroup(log)
	}
	if o.hold {
		return lazy.RunHolder(context.WithoutCancel(ctx), log.Named("holder"))
	}
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	if err := forgetProgram(); err != nil {
		log.Debug("take the program's pages out of memory", zap.Error(err))
	}
	defer limitMemory(lazydMemory)()
	debug.SetGCPercent(lazydGC)
	d := o.daemon
	d.StateDir, d.RunDir, d.Log = o.lazy.stateDir, o.lazy.runDir, log.Named("lazyd")
	d.Version = version(debug.ReadBuildInfo())
	d.Holder = []string{"optimizer", "lazyd", "--hold"}
	d.Daemon = append([]string{"optimizer"}, os.Args[1:]...)
	if o.service && !lazy.TakesOver() {
		return o.serve(ctx, d)
	}
	if d.Ready, err = takeStdout(); err != nil {
		return err
	}
	return lazy.RunDaemon(ctx, d)
}

// standby is how often a service looks whether the daemon that is there has ended.
const standby = 3 * time.Second

// serve runs a daemon for as long as the service manager wants, when no other one is there.
func (o *lazydOptions) serve(ctx context.Context, d lazy.DaemonOptions) error {
	d.Idle = -1
	c, err := o.lazy.client()
	if err != nil {
		return err
	}
	for said := 0; ; {
		s, err := c.Status(ctx, false)
		if errors.Is(err, lazy.ErrNoDaemon) {
			if err = lazy.RunDaemon(ctx, d); !errors.Is(err, lazy.ErrLocked) {
				return err
			}
		}
		if s.PID != said {
			d.Log.Info("another daemon serves the directory: waiting for its end", zap.Int("pid", s.PID))
			said = s.PID
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(standby):
		}
	}
}

// replace has the running daemon replaced by this program.
func (o *lazydOptions) replace(ctx context.Context) error {
	c, err := o.lazy.client()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	before, after, err := c.Restart(ctx, self)
	switch {
	case err != nil:
		return err
	case after.PID == 0:
		o.note("daemon %d (%s) had nothing mounted and has ended", before.PID, before.Version)
	case after.Version != version(debug.ReadBuildInfo()):
		return fmt.Errorf("daemon %d serves in place of %d, and is of version %s, not %s: see its log", after.PID, before.PID, after.Version, version(debug.ReadBuildInfo()))
	default:
		o.note("daemon %d (%s) serves %d mounts in place of %d (%s)", after.PID, after.Version, len(after.Mounts), before.PID, before.Version)
	}
	return nil
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
	return zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(enc), zapcore.Lock(&boundedLog{out: o.err}), zapcore.InfoLevel))
}
