package stream_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func frames() []stream.Frame {
	return []stream.Frame{
		stream.Ready{Armed: time.Unix(1700000000, 123456789), Mark: "filesystem", Engine: "filemap", Note: "a\nnote"},
		stream.Ready{Armed: time.Unix(1700000000, 0), Mark: "mount", Early: true},
		stream.Touch{ID: 0, Access: trace.Access{Path: "/a\nb\xff\x00c", How: trace.Opened | trace.Executed, Size: math.MaxInt64, Elapsed: 5, PID: math.MaxInt32, Command: "c d\n"}},
		stream.Touch{ID: math.MaxUint32, Access: trace.Access{Path: "/" + strings.Repeat("x", 4095), PID: -1}},
		stream.Pending{},
		stream.Drained{},
		stream.Drained{Why: "no memory"},
		stream.Merge{ID: 7, How: trace.Read},
		stream.Found{ID: 9, Access: trace.Access{Path: "/f", How: trace.Read, Size: 1, Elapsed: 2, PID: 3, Command: "c"}},
		stream.Rename{ID: 7, Path: "/other\n"},
		stream.Ranges{ID: 7},
		stream.Ranges{ID: 8, Ranges: []trace.Range{{Offset: 0, Length: math.MaxInt64, Elapsed: 4, Certain: true}, {Offset: 1, Length: 2}}},
		stream.Process{Process: trace.Process{PID: math.MaxInt32, Parent: -1, Command: "x y"}},
		stream.Failure{Code: "late", Text: "gone\nreally"},
		stream.End{Reason: "exit", Engine: "e+f", Grade: "exact", Elapsed: time.Minute, Events: 10, Skipped: 2},
		stream.End{Reason: "stop", Losses: []trace.Loss{{Reason: "overflow", Count: -1, Detail: "x"}, {Reason: "limit", Count: 3}}},
	}
}

func encode(all []stream.Frame) []byte {
	b := []byte(stream.Magic)
	for _, f := range all {
		b = stream.Append(b, f)
	}
	return b
}

// readAll reads a stream to its end.
func readAll(r io.Reader) ([]stream.Frame, error) {
	var got []stream.Frame
	in := stream.NewReader(r)
	for {
		f, err := in.Next()
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return got, err
		}
		got = append(got, f)
	}
}

func TestRoundTrip(t *testing.T) {
	b := encode(frames())
	for name, r := range map[string]io.Reader{"whole": bytes.NewReader(b), "by bytes": iotest.OneByteReader(bytes.NewReader(b))} {
		got, err := readAll(r)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(frames(), got); diff != "" {
			t.Errorf("%s: frames (-want +got):\n%s", name, diff)
		}
	}
}

// TestLongStrings holds that what does not fit a field is cut, and nothing else harmed.
func TestLongStrings(t *testing.T) {
	long := strings.Repeat("y", 300)
	got, err := readAll(bytes.NewReader(encode([]stream.Frame{
		stream.End{Reason: "exit", Losses: []trace.Loss{{Reason: "unresolved", Count: 1, Detail: long}}},
		stream.Failure{Code: "internal", Text: strings.Repeat("z", 1<<20)},
	})))
	if err != nil || len(got) != 2 {
		t.Fatalf("%d frames, %v", len(got), err)
	}
	if d := got[0].(stream.End).Losses[0].Detail; d != long[:255] {
		t.Errorf("detail of %d bytes, want 255", len(d))
	}
	if n := len(got[1].(stream.Failure).Text); n != stream.MaxFrame/2 {
		t.Errorf("text of %d bytes, want %d", n, stream.MaxFrame/2)
	}
}

// TestCut holds that a stream that ends anywhere but between frames says so.
func TestCut(t *testing.T) {
	b := encode(frames()[:2])
	ends := map[int]bool{0: true, len(stream.Magic): true, len(encode(frames()[:1])): true, len(b): true}
	for n := range len(b) + 1 {
		_, err := readAll(bytes.NewReader(b[:n]))
		switch {
		case ends[n] && err != nil:
			t.Errorf("%d bytes: %v, want no error", n, err)
		case !ends[n] && n < len(stream.Magic) && !errors.Is(err, stream.ErrMagic):
			t.Errorf("%d bytes: %v, want %v", n, err, stream.ErrMagic)
		case !ends[n] && n >= len(stream.Magic) && !errors.Is(err, io.ErrUnexpectedEOF):
			t.Errorf("%d bytes: %v, want %v", n, err, io.ErrUnexpectedEOF)
		}
	}
}

func TestInvalid(t *testing.T) {
	frame := func(size uint32, rest string) []byte {
		return append(binary.LittleEndian.AppendUint32([]byte(stream.Magic), size), rest...)
	}
	tests := map[string]struct {
		in   []byte
		want error
		text string
	}{
		"other program":     {[]byte(`{"path":"/bin/sh"}`), stream.ErrMagic, `starts with "{\"path\"`},
		"other version":     {[]byte("HSTRACE\x01"), stream.ErrMagic, "want"},
		"empty frame":       {frame(0, ""), stream.ErrInvalid, "0 bytes, want 1 to 65536"},
		"huge frame":        {frame(math.MaxUint32, "R"), stream.ErrInvalid, "4294967295 bytes"},
		"just too large":    {frame(stream.MaxFrame+1, "R"), stream.ErrInvalid, "65537 bytes"},
		"unknown kind":      {frame(1, "?"), stream.ErrInvalid, "kind 0x3f"},
		"short ready":       {frame(8, "R1234567"), stream.ErrInvalid, "does not hold its fields"},
		"short touch":       {frame(5, "T1234"), stream.ErrInvalid, "does not hold its fields"},
		"command past end":  {frame(27, "T"+strings.Repeat("\x00", 25)+"\x05"), stream.ErrInvalid, "does not hold its fields"},
		"merge with more":   {frame(7, "M12345x"), stream.ErrInvalid, "does not hold its fields"},
		"pending with more": {frame(2, "Px"), stream.ErrInvalid, "does not hold its fields"},
		"short process":     {frame(8, "Q1234567"), stream.ErrInvalid, "does not hold its fields"},
		"long command":      {frame(stream.MaxFrame/2+10, "Q12345678"+strings.Repeat("x", stream.MaxFrame/2+1)), stream.ErrInvalid, "does not hold its fields"},
		"long note":         {frame(stream.MaxFrame/2+13, "R12345678\x00\x00\x00"+strings.Repeat("x", stream.MaxFrame/2+1)), stream.ErrInvalid, "does not hold its fields"},
		"long failure":      {frame(stream.MaxFrame/2+3, "F\x00"+strings.Repeat("x", stream.MaxFrame/2+1)), stream.ErrInvalid, "does not hold its fields"},
		"cut range":         {frame(6, "G12345"), stream.ErrInvalid, "does not hold its fields"},
		"empty range":       {frame(30, "G1234"+strings.Repeat("\x00", 25)), stream.ErrInvalid, "does not hold its fields"},
		"many ranges":       {frame(5+(stream.MaxRanges+1)*25, "G1234"+strings.Repeat(strings.Repeat("\x00", 8)+"\x01"+strings.Repeat("\x00", 16), stream.MaxRanges+1)), stream.ErrInvalid, "does not hold its fields"},
		"cut loss":          {frame(29, "E"+strings.Repeat("\x00", 27)+"\x01"), stream.ErrInvalid, "does not hold its fields"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := readAll(bytes.NewReader(tt.in))
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) || len(got) > 0 {
				t.Errorf("frames %v, error %v; want %v with %q", got, err, tt.want, tt.text)
			}
		})
	}
}

// FuzzReader holds that no bytes make the reader panic or take much memory, and that what
// it reads is what would be written.
func FuzzReader(f *testing.F) {
	f.Add(encode(frames()))
	for i := range frames() {
		f.Add(encode(frames()[i : i+1]))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := readAll(bytes.NewReader(b))
		if err != nil || len(b) == 0 {
			return
		}
		if again := encode(got); !bytes.Equal(again, b) {
			t.Errorf("read % x, would write % x", b, again)
		}
	})
}
