package lazy

import (
	"errors"
	"fmt"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/backend"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Driver is what answers the reads of a mount.
type Driver string

// The drivers.
const (
	// DriverAuto takes EROFS where image, kernel and state directory allow it, else FUSE.
	DriverAuto Driver = "auto"
	// DriverEROFS is the kernel's own file system; the daemon is asked for what is not local yet.
	DriverEROFS Driver = "erofs"
	// DriverFUSE asks the daemon for everything that the kernel does not keep. It takes any kernel since Linux 5.4, any
	// file system for the state directory, and RAFS v5.
	DriverFUSE Driver = "fuse"
)

// ParseDriver reads "auto", "erofs" or "fuse", and "" as auto; anything else is an error.
func ParseDriver(s string) (Driver, error) {
	switch d := Driver(s); d {
	case "":
		return DriverAuto, nil
	case DriverAuto, DriverEROFS, DriverFUSE:
		return d, nil
	}
	return "", fmt.Errorf("driver %q: want auto, erofs or fuse", s)
}

// probe finds out which drivers there are. It is an error when there is none.
func (d *daemon) probe(group error) error {
	d.probeMu.Lock()
	defer d.probeMu.Unlock()
	if d.noEROFS = group; group == nil {
		d.noEROFS = probeEROFS(d.o.StateDir)
	}
	d.noFUSE = fuse.Probe()
	switch {
	case d.noEROFS == nil:
		return nil
	case !absent(d.noEROFS): // it went wrong, which FUSE makes no better
		return d.noEROFS
	case d.noFUSE != nil:
		return fmt.Errorf("%w; nor is there FUSE: %w", d.noEROFS, d.noFUSE)
	}
	d.log.Info("no EROFS mounts here: FUSE is taken", zap.Error(d.noEROFS))
	return nil
}

// probeEROFS returns why EROFS mounts over files of a state directory cannot be filled, nil when they can.
func probeEROFS(stateDir string) error {
	// The file system first: on some, EROFS says no to good kernels.
	if err := store.Probe(stateDir); err != nil {
		return err
	}
	if err := erofs.Probe(stateDir); err != nil {
		return fmt.Errorf("state directory %s: %w", stateDir, err)
	}
	return nil
}

// drivers returns why a driver cannot be had, nil when it can. What went wrong, like a disk that was full when this daemon took over, may
// have passed.
func (d *daemon) drivers() (noEROFS, noFUSE error) {
	d.probeMu.Lock()
	defer d.probeMu.Unlock()
	if d.noEROFS != nil && !absent(d.noEROFS) {
		d.noEROFS = probeEROFS(d.o.StateDir)
	}
	if d.noFUSE != nil && !absent(d.noFUSE) {
		d.noFUSE = fuse.Probe()
	}
	return d.noEROFS, d.noFUSE
}

// absent reports whether err says that the machine cannot do something, not that it went wrong.
func absent(err error) bool {
	return errors.Is(err, fanotify.ErrUnsupported) || errors.Is(err, erofs.ErrUnsupported) || errors.Is(err, fuse.ErrUnsupported)
}

// choose returns the driver of a new mount, and why it is not EROFS where that was not asked for.
func (d *daemon) choose(r *Request, img *backend.Image) (driver Driver, why string, err error) {
	driver, err = ParseDriver(string(r.Driver))
	if err != nil {
		return "", "", err
	}
	noEROFS, noFUSE := d.drivers()
	var not error
	switch {
	case img.RAFS.Version == rafs.V5:
		not = fmt.Errorf("%s is RAFS v5, which no kernel mounts: %w; convert it to v6, or use the driver fuse", img.Reference, ErrUnsupported)
		why = "the image is RAFS v5"
	case noEROFS != nil:
		not, why = noEROFS, noEROFS.Error()
	}
	switch {
	case driver == DriverFUSE:
		return DriverFUSE, "asked for", noFUSE
	case not == nil:
		return DriverEROFS, "", nil
	case driver == DriverEROFS:
		return "", "", not
	}
	if noFUSE != nil {
		return "", "", fmt.Errorf("%w; nor is there FUSE: %w", not, noFUSE)
	}
	return DriverFUSE, why, nil
}
