package fanotify_test

import (
	"encoding/binary"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// record is struct fanotify_event_metadata, written by the table below with encoding/binary
// so that the decoder is not its own judge. Source: include/uapi/linux/fanotify.h.
type record struct {
	EventLen    uint32
	Vers        uint8
	Reserved    uint8
	MetadataLen uint16
	Mask        uint64
	FD          int32
	PID         int32
}

type rangeInfo struct {
	InfoType uint8
	Pad      uint8
	Len      uint16
	Pad2     uint32
	Offset   uint64
	Count    uint64
}

func bytesOf(t testing.TB, parts ...any) []byte {
	t.Helper()
	var b []byte
	for _, p := range parts {
		var err error
		if b, err = binary.Append(b, binary.NativeEndian, p); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func TestSizes(t *testing.T) {
	if got := binary.Size(record{}); got != fanotify.MetadataSize || fanotify.MetadataSize != unix.FAN_EVENT_METADATA_LEN {
		t.Errorf("size of the metadata = %d, want %d and the kernel's %d", got, fanotify.MetadataSize, unix.FAN_EVENT_METADATA_LEN)
	}
	if got := binary.Size(rangeInfo{}); got != fanotify.RangeInfoSize {
		t.Errorf("size of a range = %d, want %d", got, fanotify.RangeInfoSize)
	}
}

func TestDecode(t *testing.T) {
	const size = fanotify.MetadataSize
	const v = unix.FANOTIFY_METADATA_VERSION
	tests := map[string]struct {
		in   []byte
		want fanotify.Event
		n    int
	}{
		"open":                        {bytesOf(t, record{size, v, 0, size, unix.FAN_OPEN, 7, 42}), fanotify.Event{Mask: fanotify.Open, FD: 7, PID: 42}, size},
		"merged":                      {bytesOf(t, record{size, v, 0, size, unix.FAN_OPEN | unix.FAN_ACCESS, 7, 42}), fanotify.Event{Mask: fanotify.Open | fanotify.Access, FD: 7, PID: 42}, size},
		"overflow":                    {bytesOf(t, record{size, v, 0, size, unix.FAN_Q_OVERFLOW, -1, 0}), fanotify.Event{Mask: fanotify.Overflow, FD: fanotify.NoFD}, size},
		"overflow without descriptor": {bytesOf(t, record{size, v, 0, size, unix.FAN_Q_OVERFLOW, -9, 0}), fanotify.Event{Mask: fanotify.Overflow, FD: fanotify.NoFD}, size},
		"fd error":                    {bytesOf(t, record{size, v, 0, size, unix.FAN_OPEN, -24, 3}), fanotify.Event{Mask: fanotify.Open, FD: fanotify.NoFD, PID: 3, Err: syscall.EMFILE}, size},
		"smallest":                    {bytesOf(t, record{size, v, 0, size, unix.FAN_OPEN, -1 << 31, 3}), fanotify.Event{Mask: fanotify.Open, FD: fanotify.NoFD, PID: 3, Err: 1 << 31}, size},
		"more after":                  {bytesOf(t, record{size, v, 0, size, unix.FAN_OPEN, 7, 42}, []byte("rest")), fanotify.Event{Mask: fanotify.Open, FD: 7, PID: 42}, size},
		"range": {
			bytesOf(t, record{size + 24, v, 0, size, unix.FAN_PRE_ACCESS, 7, 42}, rangeInfo{unix.FAN_EVENT_INFO_TYPE_RANGE, 0, 24, 0, 4096, 8192}),
			fanotify.Event{Mask: fanotify.PreAccess, FD: 7, PID: 42, Offset: 4096, Count: 8192, HasRange: true},
			size + 24,
		},
		"unknown info": {
			bytesOf(t, record{size + 8, v, 0, size, unix.FAN_OPEN, 7, 42}, []byte{0xee, 0}, uint16(8), uint32(1)),
			fanotify.Event{Mask: fanotify.Open, FD: 7, PID: 42},
			size + 8,
		},
		"longer metadata": {
			bytesOf(t, record{size + 8, v, 0, size + 8, unix.FAN_OPEN, 7, 42}, uint64(0xffff)),
			fanotify.Event{Mask: fanotify.Open, FD: 7, PID: 42},
			size + 8,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, n, err := fanotify.Decode(tt.in)
			if err != nil || n != tt.n {
				t.Fatalf("Decode = %d bytes, error %v; want %d", n, err, tt.n)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("event (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeInvalid(t *testing.T) {
	const size = fanotify.MetadataSize
	const v = unix.FANOTIFY_METADATA_VERSION
	whole := bytesOf(t, record{size, v, 0, size, unix.FAN_OPEN, 7, 42})
	tests := map[string]struct {
		in   []byte
		text string
	}{
		"nothing":             {nil, "0 bytes, want at least 24"},
		"one byte short":      {whole[:size-1], "23 bytes, want at least 24"},
		"event_len small":     {bytesOf(t, record{size - 1, v, 0, size, 0, 7, 42}), "event_len 23, want 24 to 24"},
		"event_len large":     {bytesOf(t, record{size + 1, v, 0, size, 0, 7, 42}), "event_len 25, want 24 to 24"},
		"event_len huge":      {bytesOf(t, record{1<<32 - 1, v, 0, size, 0, 7, 42}), "event_len 4294967295"},
		"version":             {bytesOf(t, record{size, v + 1, 0, size, 0, 7, 42}), "version 4, want 3"},
		"metadata_len small":  {bytesOf(t, record{size, v, 0, size - 1, 0, 7, 42}), "metadata_len 23, want 24 to 24"},
		"metadata_len large":  {bytesOf(t, record{size, v, 0, size + 1, 0, 7, 42}), "metadata_len 25, want 24 to 24"},
		"info cut":            {bytesOf(t, record{size + 3, v, 0, size, 0, 7, 42}, []byte{1, 0, 3}), "3 bytes left"},
		"info empty":          {bytesOf(t, record{size + 4, v, 0, size, 0, 7, 42}, []byte{1, 0}, uint16(0)), "record of 0 bytes"},
		"info past the end":   {bytesOf(t, record{size + 4, v, 0, size, 0, 7, 42}, []byte{1, 0}, uint16(5)), "record of 5 bytes"},
		"range that is short": {bytesOf(t, record{size + 8, v, 0, size, 0, 7, 42}, []byte{6, 0}, uint16(8), uint32(0)), "range record of 8 bytes"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, n, err := fanotify.Decode(tt.in)
			if !errors.Is(err, fanotify.ErrInvalid) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("Decode error = %v, want %v with %q", err, fanotify.ErrInvalid, tt.text)
			}
			if got != (fanotify.Event{}) || n != 0 {
				t.Errorf("Decode = %+v, %d with an error, want zero values", got, n)
			}
		})
	}
}

// FuzzDecode holds that no bytes make the decoder panic, go past what it was given, or
// return something together with an error.
func FuzzDecode(f *testing.F) {
	const size = fanotify.MetadataSize
	const v = unix.FANOTIFY_METADATA_VERSION
	f.Add(bytesOf(f, record{size, v, 0, size, unix.FAN_OPEN, 7, 42}))
	f.Add(bytesOf(f, record{size, v, 0, size, unix.FAN_Q_OVERFLOW, -1, 0}))
	f.Add(bytesOf(f, record{size + 24, v, 0, size, unix.FAN_PRE_ACCESS, 7, 42}, rangeInfo{unix.FAN_EVENT_INFO_TYPE_RANGE, 0, 24, 0, 1, 2}))
	f.Add(bytesOf(f, record{size + 8, v, 0, size + 8, unix.FAN_OPEN, 7, 42}, uint64(0)))
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			e, n, err := fanotify.Decode(b)
			if err != nil {
				if e != (fanotify.Event{}) || n != 0 || !errors.Is(err, fanotify.ErrInvalid) {
					t.Fatalf("Decode = %+v, %d, %v", e, n, err)
				}
				return
			}
			if n < size || n > len(b) || e.FD < fanotify.NoFD || (e.Err != 0 && e.FD != fanotify.NoFD) {
				t.Fatalf("Decode = %+v, %d of %d bytes", e, n, len(b))
			}
			b = b[n:]
		}
	})
}

func TestStrings(t *testing.T) {
	for got, want := range map[string]string{
		fanotify.Mask(0).String():                                        "0x0",
		(fanotify.Open | fanotify.Access).String():                       "access|open",
		(fanotify.OpenExec | 1<<40).String():                             "open-exec|0x10000000000",
		(fanotify.PreAccess | fanotify.Overflow).String():                "pre-access|overflow",
		fanotify.Filesystem.String() + " " + fanotify.Kind(9).String():   "filesystem kind(9)",
		fanotify.FeatureOpenExec.String() + fanotify.Feature(9).String(): "FAN_OPEN_EXECfeature(9)",
	} {
		if got != want {
			t.Errorf("String() = %q, want %q", got, want)
		}
	}
	perm, plain := fanotify.Event{Mask: fanotify.PreAccess}, fanotify.Event{Mask: fanotify.Open | fanotify.Access}
	if !perm.Permission() || plain.Permission() {
		t.Errorf("Permission() = %v for pre-access, %v for open", perm.Permission(), plain.Permission())
	}
}
