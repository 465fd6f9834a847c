package lazy

import (
	"errors"
	"fmt"
	"net"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// listen makes the socket, or takes the one that clients wait at already.
func (d *daemon) listen(own *held) error {
	if kept := own.take(keptListener); kept != nil {
		l, err := net.FileListener(kept)
		if err = errors.Join(err, kept.Close()); err != nil {
			return fmt.Errorf("listener: %w", err)
		}
		d.listener = l.(*net.UnixListener)
		d.listener.SetUnlinkOnClose(false)
		d.socket = own.take(keptSocket)
		return nil
	}
	if err := os.MkdirAll(d.o.RunDir, 0o700); err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	return throughDir(d.o.RunDir, socketName(d.o.StateDir), func(path string) error {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		d.listener = l
		if err := os.Chmod(path, 0o600); err != nil {
			return err
		}
		f, err := l.File()
		if err != nil {
			return err
		}
		return errors.Join(d.link.Keep(keptListener, f), f.Close(), d.keepSocket(path))
	})
}

// keepSocket remembers which file the socket is: as long as it is open no other one gets its number.
func (d *daemon) keepSocket(path string) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	d.socket = os.NewFile(uintptr(fd), path)
	return d.link.Keep(keptSocket, d.socket)
}

// hide removes the socket: nobody must find one behind which nobody listens. Another daemon's stays, which has made the directories anew that
// somebody removed under this one. It reports whether there was a socket to remove.
func (d *daemon) hide() bool {
	hidden := false
	err := throughDir(d.o.RunDir, socketName(d.o.StateDir), func(path string) error {
		var there, own unix.Stat_t
		if err := unix.Lstat(path, &there); err != nil {
			return err
		}
		if d.socket != nil { // else the first daemon was one that did not keep it
			if err := unix.Fstat(int(d.socket.Fd()), &own); err != nil {
				return err
			}
			if own.Dev != there.Dev || own.Ino != there.Ino {
				d.log.Info("the socket is another daemon's, and stays")
				return nil
			}
		}
		hidden = true
		return os.Remove(path)
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.log.Warn("remove the socket", zap.Error(err))
	}
	return hidden
}
