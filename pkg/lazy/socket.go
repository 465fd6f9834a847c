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
	if taken, err := d.takeListener(own); taken || err != nil {
		return err
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

// takeListener takes the socket of an earlier daemon over. One whose name is gone is of no use: nobody finds it, as when that daemon died
// after it had hidden it. Then, and where there was none, taken is false.
func (d *daemon) takeListener(own *held) (taken bool, err error) {
	kept, socket := own.take(keptListener), own.take(keptSocket)
	if kept == nil {
		return false, closeFiles(socket)
	}
	if d.nameless(socket) {
		d.log.Warn("the socket's name is gone: making another socket")
		return false, closeFiles(kept, socket)
	}
	l, err := net.FileListener(kept)
	if err = errors.Join(err, kept.Close()); err != nil {
		return false, errors.Join(fmt.Errorf("listener: %w", err), closeFiles(socket))
	}
	d.listener = l.(*net.UnixListener)
	d.listener.SetUnlinkOnClose(false)
	d.socket = socket
	return true, nil
}

// nameless reports whether clients find nothing where the socket was. What they find instead of it is another daemon's, see hide.
func (d *daemon) nameless(socket *os.File) bool {
	err := throughDir(d.o.RunDir, socketName(d.o.StateDir), func(path string) error {
		ours, err := true, error(nil)
		if socket != nil { // else the first daemon was one that did not keep it
			ours, err = isFile(path, socket)
		} else {
			_, err = os.Lstat(path)
		}
		if err == nil && !ours {
			d.log.Warn("the socket's name is another daemon's: no client finds this one")
		}
		return err
	})
	return errors.Is(err, os.ErrNotExist)
}

// isFile reports whether path, itself and no link's target, is the file that f has open.
func isFile(path string, f *os.File) (bool, error) {
	var there, own unix.Stat_t
	if err := unix.Lstat(path, &there); err != nil {
		return false, err
	}
	if err := unix.Fstat(int(f.Fd()), &own); err != nil {
		return false, err
	}
	return own.Dev == there.Dev && own.Ino == there.Ino, nil
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
		if d.socket != nil { // else the first daemon was one that did not keep it
			if ours, err := isFile(path, d.socket); err != nil {
				return err
			} else if !ours {
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
