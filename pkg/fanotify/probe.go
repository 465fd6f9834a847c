package fanotify

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Feature is something that not every kernel with fanotify has.
type Feature uint8

// The features that [Probe] knows, with the first kernel that has each.
const (
	FeatureGroup          Feature = iota // notification groups: Linux 2.6.37
	FeatureFilesystemMark                // [Filesystem] marks: Linux 4.20
	FeatureOpenExec                      // [OpenExec]: Linux 5.0
	FeatureEvictable                     // ignore marks that do not pin inodes: Linux 5.19
	FeatureOpenErrors                    // Event.Err of every event: Linux 6.13
	FeaturePreAccess                     // [PreAccess]: Linux 6.14
)

type featureTest struct {
	name, minimum string
	init          uint // flags besides FAN_CLASS_NOTIF
	mark          uint // flags of a mark that is never added; 0: the group is all
	mask          uint64
}

func (f Feature) test() (featureTest, bool) {
	switch f {
	case FeatureGroup:
		return featureTest{name: "fanotify groups", minimum: "2.6.37"}, true
	case FeatureFilesystemMark:
		return featureTest{name: "filesystem marks", minimum: "4.20", mark: unix.FAN_MARK_FILESYSTEM, mask: unix.FAN_OPEN}, true
	case FeatureOpenExec:
		return featureTest{name: "FAN_OPEN_EXEC", minimum: "5.0", mark: unix.FAN_MARK_MOUNT, mask: unix.FAN_OPEN_EXEC}, true
	case FeatureEvictable:
		return featureTest{name: "evictable marks", minimum: "5.19", mark: unix.FAN_MARK_EVICTABLE, mask: unix.FAN_OPEN}, true
	case FeatureOpenErrors:
		return featureTest{name: "FAN_REPORT_FD_ERROR", minimum: "6.13", init: unix.FAN_REPORT_FD_ERROR}, true
	case FeaturePreAccess:
		return featureTest{
			name: "FAN_PRE_ACCESS", minimum: "6.14",
			init: unix.FAN_CLASS_PRE_CONTENT, mark: unix.FAN_MARK_MOUNT, mask: unix.FAN_PRE_ACCESS,
		}, true
	}
	return featureTest{}, false
}

// String returns the feature's name as the kernel's documentation has it.
func (f Feature) String() string {
	if t, ok := f.test(); ok {
		return t.name
	}
	return fmt.Sprintf("feature(%d)", uint8(f))
}

// Probe returns nil when the running kernel has f. Otherwise the error names the
// feature and the first kernel that has it and answers to [ErrUnsupported]; or it
// answers to [ErrPermission], and then nothing is known. It asks the kernel each time,
// watches nothing, and is safe for concurrent use.
func Probe(f Feature) error {
	t, ok := f.test()
	if !ok {
		return fmt.Errorf("%s: %w", f, ErrUnsupported)
	}
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|t.init, unix.O_RDONLY)
	if err != nil {
		return t.explain(err)
	}
	if t.mark != 0 || t.mask != 0 {
		// Flags and mask are checked before the descriptor: EBADF says that they are
		// fine, EINVAL that they are not (fanotify_user.c do_fanotify_mark).
		err = unix.FanotifyMark(fd, unix.FAN_MARK_ADD|t.mark, t.mask, -1, "")
		if errors.Is(err, unix.EBADF) {
			err = nil
		}
	}
	if cerr := unix.Close(fd); err == nil && cerr != nil {
		return fmt.Errorf("%s: close probe: %w", t.name, cerr)
	}
	return t.explain(err)
}

func (t featureTest) explain(err error) error {
	if err == nil {
		return nil
	}
	err = explain(err)
	if errors.Is(err, ErrUnsupported) {
		return fmt.Errorf("%s (Linux %s or newer): %w", t.name, t.minimum, err)
	}
	return fmt.Errorf("%s: %w", t.name, err)
}
