package fanotify

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Errors of this package besides [ErrInvalid]; all answer to errors.Is.
var (
	// ErrEmpty is returned by [Group.Read] when no event is waiting.
	ErrEmpty = errors.New("no fanotify event is waiting")
	// ErrPermission is returned when CAP_SYS_ADMIN is missing.
	ErrPermission = errors.New("fanotify needs CAP_SYS_ADMIN")
	// ErrUnsupported is returned when the running kernel lacks a feature.
	ErrUnsupported = errors.New("not supported by this kernel")
)

// Options says what kind of group to make. The zero value is a notification group with
// an unlimited queue and unlimited marks.
type Options struct {
	// Bounded keeps the kernel's limits on queue and marks
	// (/proc/sys/fs/fanotify/max_queued_events and max_user_marks).
	Bounded bool
	// PreContent makes a group whose events come before the access and wait for an
	// answer ([PreAccess], [Group.Answer]). Whoever closes the last descriptor of
	// such a group lets everybody pass who waits.
	PreContent bool
}

// Group is one fanotify group. Its methods may not be called concurrently, except that
// [Group.FD] may be polled while another method runs.
type Group struct {
	file *os.File
	fd   int
	// errs: the kernel reports files it could not open inside the event.
	errs bool
	// preContent: records have information records and are read raw.
	preContent bool
	buf        []byte
}

// eventFlags are the open(2) flags of the descriptors in events. O_NONBLOCK, because
// opening a file that somebody holds a lease on waits for the lease otherwise;
// O_NOATIME, because being traced must not change a file.
const eventFlags = unix.O_RDONLY | unix.O_LARGEFILE | unix.O_CLOEXEC | unix.O_NOATIME | unix.O_NONBLOCK

// New returns a group without marks. The caller closes it, which ends all its marks.
// It returns [ErrPermission] without CAP_SYS_ADMIN and [ErrUnsupported] on a kernel
// without fanotify.
func New(o Options) (*Group, error) {
	flags := uint(unix.FAN_CLASS_NOTIF | unix.FAN_CLOEXEC | unix.FAN_NONBLOCK)
	if !o.Bounded {
		flags |= unix.FAN_UNLIMITED_QUEUE | unix.FAN_UNLIMITED_MARKS
	}
	errs := true
	if o.PreContent {
		flags |= unix.FAN_CLASS_PRE_CONTENT
	}
	fd, err := unix.FanotifyInit(flags|unix.FAN_REPORT_FD_ERROR, eventFlags)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.13
		errs = false
		fd, err = unix.FanotifyInit(flags, eventFlags)
	}
	if err != nil {
		return nil, fmt.Errorf("create fanotify group: %w", explain(err))
	}
	return &Group{file: os.NewFile(uintptr(fd), "fanotify"), fd: fd, errs: errs, preContent: o.PreContent}, nil
}

// Adopt returns the group that f, the descriptor of a group with PreContent that
// another process made, refers to. The Group owns f, when there is no error.
func Adopt(f *os.File) (*Group, error) {
	fd := int(f.Fd())
	// Taking the number may have made it block, for everybody who has it.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("adopt fanotify group: %w", err)
	}
	return &Group{file: f, fd: fd, errs: true, preContent: true}, nil
}

// File returns the group's descriptor, for another process to keep. It stays the group's. Its Fd method makes
// the group block on some releases of Go: take the number from [Group.FD].
func (g *Group) File() *os.File { return g.file }

// FD returns the group's descriptor, to be polled for input. It stays the group's and
// is valid until [Group.Close].
func (g *Group) FD() int { return g.fd }

// Close ends the group and all its marks; events still queued are dropped. Later calls
// return nil.
func (g *Group) Close() error {
	if g.file == nil {
		return nil
	}
	err := g.file.Close()
	g.file, g.fd = nil, -1
	return err
}

// Kind is what a mark is attached to.
type Kind uint8

// The kinds of marks. The numbers are this package's.
const (
	Inode      Kind = iota // one file or directory
	Mount                  // what is reached through one mount
	Filesystem             // a whole filesystem, through whichever mount (Linux 4.20)
)

// String returns "inode", "mount" or "filesystem".
func (k Kind) String() string {
	switch k {
	case Inode:
		return "inode"
	case Mount:
		return "mount"
	case Filesystem:
		return "filesystem"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

func (k Kind) flags() uint {
	switch k {
	case Mount:
		return unix.FAN_MARK_MOUNT
	case Filesystem:
		return unix.FAN_MARK_FILESYSTEM
	}
	return unix.FAN_MARK_INODE
}

// Mark says what to watch.
type Mark struct {
	Kind Kind
	Mask Mask
	// Dir is a descriptor; Path is looked up relative to it. An empty Path means the
	// open file Dir itself refers to, which O_PATH descriptors do not.
	Dir  int
	Path string
	// Ignore asks for the opposite: events in Mask are not reported for the object,
	// also after it was modified. The kernel may forget such a mark together with
	// the cached inode (FAN_MARK_EVICTABLE, Linux 5.19).
	Ignore bool
}

// Mark adds a mark. It returns [ErrPermission] or [ErrUnsupported] where they apply.
func (g *Group) Mark(m Mark) error {
	flags := unix.FAN_MARK_ADD | m.flags()
	if m.Ignore && m.Kind == Inode {
		flags |= unix.FAN_MARK_EVICTABLE
	}
	if err := unix.FanotifyMark(g.fd, flags, uint64(m.Mask), m.Dir, m.Path); err != nil {
		return fmt.Errorf("add %s mark for %s: %w", m.Kind, m.Mask, explain(err))
	}
	return nil
}

// Unmark removes the bits of m.Mask from the mark that [Group.Mark] added; without any left
// the mark is gone. Events already queued stay. unix.ENOENT when there is no such mark.
func (g *Group) Unmark(m Mark) error {
	if err := unix.FanotifyMark(g.fd, unix.FAN_MARK_REMOVE|m.flags(), uint64(m.Mask), m.Dir, m.Path); err != nil {
		return fmt.Errorf("remove %s mark for %s: %w", m.Kind, m.Mask, explain(err))
	}
	return nil
}

func (m *Mark) flags() uint {
	flags := m.Kind.flags()
	if m.Ignore {
		flags |= unix.FAN_MARK_IGNORED_MASK | unix.FAN_MARK_IGNORED_SURV_MODIFY
	}
	return flags
}

// Flush removes every mark of one kind. Events already queued stay.
func (g *Group) Flush(k Kind) error {
	if err := unix.FanotifyMark(g.fd, unix.FAN_MARK_FLUSH|k.flags(), 0, unix.AT_FDCWD, "/"); err != nil {
		return fmt.Errorf("remove %s marks: %w", k, explain(err))
	}
	return nil
}

// Queued returns how many events are waiting, of a group without PreContent; it takes the longer the more there are, some
// nanoseconds each, in which none can be added. Source: fs/notify/fanotify/fanotify_user.c fanotify_ioctl; TIOCINQ is FIONREAD.
func (g *Group) Queued() (int, error) {
	n, err := unix.IoctlGetInt(g.fd, unix.TIOCINQ)
	if err != nil {
		return 0, fmt.Errorf("count fanotify events: %w", err)
	}
	return n / MetadataSize, nil
}

// Read fills events with what is waiting and returns how many there were; it does not
// block. Every event read opens one descriptor, so len(events) bounds how many are open
// at once; the caller closes them. A file the kernel could not open is an event with
// Err set. It returns [ErrEmpty] when nothing is waiting, [ErrInvalid] for bytes it
// cannot decode, and [ErrUnsupported] for groups with PreContent: see [Group.ReadRaw].
func (g *Group) Read(events []Event) (int, error) {
	if len(events) == 0 {
		return 0, nil
	}
	if g.preContent {
		return 0, fmt.Errorf("read events of a pre-content group: %w", ErrUnsupported)
	}
	if !g.errs {
		return g.readSingly(events)
	}
	// A group made by New reports no information records, so each event is
	// MetadataSize bytes and the kernel opens no more files than there is room for.
	size := len(events) * MetadataSize
	if len(g.buf) < size {
		g.buf = make([]byte, size)
	}
	n, err := g.read(g.buf[:size])
	if err != nil {
		return 0, err
	}
	return decodeAll(g.buf[:n], events)
}

// readSingly asks for one event at a time. Without FAN_REPORT_FD_ERROR the kernel drops
// an event whose file it cannot open and says so only when that event was the first of
// the read (fs/notify/fanotify/fanotify_user.c fanotify_read).
func (g *Group) readSingly(events []Event) (int, error) {
	if len(g.buf) < MetadataSize {
		g.buf = make([]byte, MetadataSize)
	}
	for i := range events {
		n, err := g.read(g.buf[:MetadataSize])
		var errno syscall.Errno
		switch {
		case errors.Is(err, ErrEmpty) && i > 0:
			return i, nil
		case errors.Is(err, ErrEmpty):
			return 0, ErrEmpty
		case errors.As(err, &errno) && !fatal(errno):
			events[i] = Event{FD: NoFD, Err: errno}
			continue
		case err != nil:
			return i, err
		}
		if _, err := decodeAll(g.buf[:n], events[i:i+1]); err != nil {
			return i, err
		}
	}
	return len(events), nil
}

// fatal tells the errors of read(2) itself from those of opening an event's file.
func fatal(errno syscall.Errno) bool {
	return errno == unix.EBADF || errno == unix.EFAULT || errno == unix.EINVAL
}

// ReadRaw fills buf with the records of waiting events, for [Decode], and returns their
// length; it does not block. Every record opens one descriptor, which the caller closes
// after its answer. [ErrEmpty] when nothing is waiting.
func (g *Group) ReadRaw(buf []byte) (int, error) { return g.read(buf) }

// Answer answers the permission event whose descriptor is, or was, number fd: errno 0
// lets it pass, EPERM, EIO, EBUSY, ETXTBSY, EAGAIN, ENOSPC and EDQUOT fail it with that (Linux 6.14). Any process
// that has the group may answer. unix.ENOENT when no event waits under that number. It
// may overlap with every method but Close.
// Source: fs/notify/fanotify/fanotify_user.c process_access_response.
func (g *Group) Answer(fd int32, errno syscall.Errno) error {
	r := unix.FanotifyResponse{Fd: fd, Response: unix.FAN_ALLOW}
	if errno != 0 {
		// include/uapi/linux/fanotify.h FAN_DENY_ERRNO.
		r.Response = unix.FAN_DENY | uint32(errno)<<unix.FAN_ERRNO_SHIFT //nolint:gosec // errnos are below 256
	}
	p := (*[unsafe.Sizeof(r)]byte)(unsafe.Pointer(&r))[:]
	_, err := unix.Write(g.fd, p)
	if err == nil || errors.Is(err, unix.ENOENT) { // asked for many numbers, that is common: no words
		return err
	}
	return fmt.Errorf("answer event %d: %w", fd, err)
}

func (g *Group) read(b []byte) (int, error) {
	for {
		n, err := unix.Read(g.fd, b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return 0, ErrEmpty
		case err != nil:
			return 0, fmt.Errorf("read fanotify events: %w", err)
		case n == 0:
			return 0, ErrEmpty
		}
		return n, nil
	}
}

// decodeAll decodes all of b, and closes what it had decoded when b is not valid.
func decodeAll(b []byte, events []Event) (int, error) {
	n := 0
	for len(b) > 0 {
		e, size, err := Decode(b)
		if err == nil && n == len(events) {
			err = fmt.Errorf("%w: more than the %d events asked for", ErrInvalid, len(events))
		}
		if err != nil {
			for i := range events[:n] {
				err = errors.Join(err, events[i].Close())
			}
			return 0, err
		}
		events[n] = e
		n++
		b = b[size:]
	}
	return n, nil
}

// explain adds what a bare errno means to fanotify; the errno stays reachable.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return errors.Join(ErrPermission, err)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return errors.Join(ErrUnsupported, err)
	}
	return err
}
