package tracefs

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Clean removes the instances of this package whose makers are dead, and that nobody who
// inherited them holds. It leaves those of other programs alone.
func (f *FS) Clean() error {
	names, err := f.root.names("instances")
	if err != nil {
		return fmt.Errorf("clean trace instances: %w", explain(err))
	}
	var errs []error
	for _, name := range names {
		if rest, ok := strings.CutPrefix(name, Prefix); !ok || makerLives(rest) {
			continue
		}
		if err := f.clean(name); err != nil {
			errs = append(errs, fmt.Errorf("clean trace instance %s: %w", name, explain(err)))
		}
	}
	return errors.Join(errs...)
}

// clean removes the instance name unless somebody holds it.
func (f *FS) clean(name string) error {
	d, err := f.instances.sub(name)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err = d.lock(); err == nil {
		if err = f.instances.rmdir(name); gone(err) {
			err = nil
		}
	} else if errors.Is(err, unix.EWOULDBLOCK) {
		err = nil
	}
	return errors.Join(err, d.close())
}

// makerLives reports whether the process runs that made the instance with this name behind
// [Prefix]. It asks so that an instance is left alone before its maker has locked it; where
// PID namespaces differ it may be wrong, and then the lock decides.
func makerLives(rest string) bool {
	maker, rest, _ := strings.Cut(rest, "-")
	start, _, _ := strings.Cut(rest, "-")
	pid, err := strconv.Atoi(maker)
	if err != nil {
		return false
	}
	began, err := startTime(pid)
	return err == nil && strconv.FormatUint(began, 10) == start
}

// gone reports whether err says that an instance is not there any more: the second error is
// that of an instance which somebody else is just removing.
func gone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) }
