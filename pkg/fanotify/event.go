package fanotify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Mask is a set of event types and of the flags that go with them.
// Source: include/uapi/linux/fanotify.h.
type Mask uint64

// The bits of [Mask] that this package gives names to.
const (
	Access    Mask = unix.FAN_ACCESS     // bytes were read through a descriptor
	Open      Mask = unix.FAN_OPEN       // a file was opened
	OpenExec  Mask = unix.FAN_OPEN_EXEC  // a file was opened to be executed (Linux 5.0)
	PreAccess Mask = unix.FAN_PRE_ACCESS // a range is about to be read; a permission event (Linux 6.14)
	Overflow  Mask = unix.FAN_Q_OVERFLOW // events were dropped before this one; nobody knows how many
	OnDir     Mask = unix.FAN_ONDIR      // report directories too; in an event: the object is one
)

// permissionBits are the events that wait for an answer.
const permissionBits = Mask(unix.FAN_ALL_PERM_EVENTS|unix.FAN_OPEN_EXEC_PERM) | PreAccess

// String names the known bits, separated by "|", and adds the others in hexadecimal.
func (m Mask) String() string {
	names := []struct {
		bit  Mask
		name string
	}{
		{Access, "access"},
		{Open, "open"},
		{OpenExec, "open-exec"},
		{PreAccess, "pre-access"},
		{Overflow, "overflow"},
		{OnDir, "on-dir"},
	}
	var parts []string
	for _, n := range names {
		if m&n.bit != 0 {
			parts = append(parts, n.name)
			m &^= n.bit
		}
	}
	if m != 0 || len(parts) == 0 {
		parts = append(parts, fmt.Sprintf("%#x", uint64(m)))
	}
	return strings.Join(parts, "|")
}

// NoFD is the descriptor of an event that carries none. Source: FAN_NOFD.
const NoFD int32 = unix.FAN_NOFD

// Sizes of the kernel's records in bytes. Source: include/uapi/linux/fanotify.h.
const (
	// MetadataSize is struct fanotify_event_metadata: event_len u32, vers u8,
	// reserved u8, metadata_len u16, mask u64, fd s32, pid s32.
	MetadataSize = 4 + 1 + 1 + 2 + 8 + 4 + 4
	// InfoHeaderSize is struct fanotify_event_info_header: info_type u8, pad u8, len u16.
	InfoHeaderSize = 1 + 1 + 2
	// RangeInfoSize is struct fanotify_event_info_range: the header, pad u32, offset u64, count u64.
	RangeInfoSize = InfoHeaderSize + 4 + 8 + 8
)

// Offsets inside struct fanotify_event_metadata, in bytes.
const (
	offVersion     = 4
	offMetadataLen = 6
	offMask        = 8
	offFD          = 16
	offPID         = 20
)

// ErrInvalid is returned for bytes that are no fanotify event: too short, lengths that
// contradict each other, or a version of the record that is not known.
var ErrInvalid = errors.New("invalid fanotify event")

// Event is one record of the kernel. The receiver owns FD and must call [Event.Close].
type Event struct {
	// Mask says what happened; several things may have been merged into one event.
	Mask Mask
	// FD is an open descriptor of the file, or [NoFD].
	FD int32
	// PID is the process that caused the event, numbered as in the reader's pid
	// namespace; 0 when that process is not visible there.
	PID int32
	// Err is why the kernel could not open the file, 0 when it could. FD is then NoFD.
	Err syscall.Errno
	// Offset and Count are the bytes about to be read, half-open, for events that
	// carry a range ([PreAccess]); HasRange tells.
	Offset, Count uint64
	HasRange      bool
}

// Permission reports whether the kernel waits for an answer to the event.
func (e *Event) Permission() bool { return e.Mask&permissionBits != 0 }

// Close closes the event's descriptor. Later calls do nothing and return nil.
func (e *Event) Close() error {
	if e.FD < 0 {
		return nil
	}
	fd := int(e.FD)
	e.FD = NoFD
	if err := unix.Close(fd); err != nil {
		return fmt.Errorf("close event descriptor %d: %w", fd, err)
	}
	return nil
}

// Decode returns the first event in b and the number of bytes it took. It opens and
// closes nothing. Fields and information records that it does not know are skipped.
// It returns [ErrInvalid] and the zero Event when b holds no whole event. b is in the
// machine's byte order, as the kernel writes it. Safe for concurrent use.
// Source: fanotify(7); fs/notify/fanotify/fanotify_user.c copy_event_to_user.
func Decode(b []byte) (Event, int, error) {
	if len(b) < MetadataSize {
		return Event{}, 0, fmt.Errorf("%w: %d bytes, want at least %d", ErrInvalid, len(b), MetadataSize)
	}
	order := binary.NativeEndian
	size := order.Uint32(b)
	if size < MetadataSize || uint64(size) > uint64(len(b)) {
		return Event{}, 0, fmt.Errorf("%w: event_len %d, want %d to %d", ErrInvalid, size, MetadataSize, len(b))
	}
	if v := b[offVersion]; v != unix.FANOTIFY_METADATA_VERSION {
		return Event{}, 0, fmt.Errorf("%w: version %d, want %d", ErrInvalid, v, unix.FANOTIFY_METADATA_VERSION)
	}
	meta := order.Uint16(b[offMetadataLen:])
	if meta < MetadataSize || uint32(meta) > size {
		return Event{}, 0, fmt.Errorf("%w: metadata_len %d, want %d to %d", ErrInvalid, meta, MetadataSize, size)
	}
	e := Event{
		Mask: Mask(order.Uint64(b[offMask:])),
		FD:   signed(order.Uint32(b[offFD:])),
		PID:  signed(order.Uint32(b[offPID:])),
	}
	if e.FD < 0 {
		// FAN_REPORT_FD_ERROR puts a negated errno there; -1 stays "no descriptor", and
		// an overflow, which has no file, carries -EBADF.
		if e.FD < NoFD && e.Mask&Overflow == 0 {
			e.Err = syscall.Errno(-int64(e.FD))
		}
		e.FD = NoFD
	}
	if err := e.decodeInfo(b[meta:size]); err != nil {
		return Event{}, 0, err
	}
	return e, int(size), nil
}

// decodeInfo reads the information records that follow the metadata.
func (e *Event) decodeInfo(b []byte) error {
	order := binary.NativeEndian
	for len(b) > 0 {
		if len(b) < InfoHeaderSize {
			return fmt.Errorf("%w: %d bytes left for an information record, want at least %d", ErrInvalid, len(b), InfoHeaderSize)
		}
		kind, size := b[0], order.Uint16(b[2:])
		if size < InfoHeaderSize || int(size) > len(b) {
			return fmt.Errorf("%w: information record of %d bytes, want %d to %d", ErrInvalid, size, InfoHeaderSize, len(b))
		}
		if kind == unix.FAN_EVENT_INFO_TYPE_RANGE {
			if size < RangeInfoSize {
				return fmt.Errorf("%w: range record of %d bytes, want %d", ErrInvalid, size, RangeInfoSize)
			}
			e.Offset = order.Uint64(b[InfoHeaderSize+4:])
			e.Count = order.Uint64(b[InfoHeaderSize+12:])
			e.HasRange = true
		}
		b = b[size:]
	}
	return nil
}

// signed reinterprets the bits of a __s32 field.
func signed(v uint32) int32 {
	return int32(v) //nolint:gosec // the kernel's field is signed; every bit pattern is meant
}
