package lazy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
)

// serveRestart ends the daemon so that its holder starts another from program, which takes over.
func (d *daemon) serveRestart(c *net.UnixConn, program string) {
	err := d.elsewhere(program) // first: to look at a file of our own mount is to ask ourselves
	if err == nil {
		err = executable(program)
	}
	if err != nil {
		d.say(c, failure(fmt.Errorf("restart: %w", err)), nil)
		return
	}
	d.log.Info("making room for another daemon", zap.String("program", program))
	d.link.Program(program)
	d.say(c, answer{Status: d.status(false)}, nil)
	d.quit()
}

// executable refuses what no daemon can be started from.
func executable(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("program %q: want an absolute path", path)
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return fmt.Errorf("program %s: mode %s, want an executable file", path, info.Mode())
	}
	return nil
}

// restartLimit is how long Restart waits for the next daemon: it ends what it has begun, syncs, and another one starts.
const restartLimit = time.Minute

// Restart ends the daemon so that another one goes on in its place, from the file program, such as a newer version of this
// program; its path is absolute, and the same in the daemon's mount namespace. Mounts stay, and readers wait meanwhile. It returns the state before, and after with
// the next daemon, whose Version tells whether program could be started: when it could not, the old program goes on. With nothing
// mounted the daemon ends, and after is empty: the next mount starts another. [ErrNoDaemon] when none runs. The holder stays the
// old program's until the next daemon has lived for 10 s, and is replaced then.
func (c *Client) Restart(ctx context.Context, program string) (before, after Status, err error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return Status{}, Status{}, err
	}
	a, _, err := c.talk(ctx, conn, call{Op: opRestart, Program: program})
	if err = errors.Join(err, conn.Close()); err != nil {
		return Status{}, Status{}, err
	}
	if a.Status == nil {
		return Status{}, Status{}, fmt.Errorf("%w: no status came", ErrVersion)
	}
	before = *a.Status
	ctx, cancel := context.WithTimeoutCause(ctx, restartLimit, fmt.Errorf("daemon %d was told to make room, and there is no other after %v", before.PID, restartLimit))
	defer cancel()
	for {
		after, err = c.Status(ctx, false)
		switch {
		case err == nil && after.PID != before.PID:
			return before, after, nil
		case errors.Is(err, ErrNoDaemon) && len(before.Mounts) == 0:
			return before, Status{}, nil
		}
		select {
		case <-ctx.Done():
			return before, Status{}, errors.Join(context.Cause(ctx), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
