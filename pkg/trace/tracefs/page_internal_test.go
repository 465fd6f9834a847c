package tracefs

import (
	"encoding/binary"
	"errors"
	"flag"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

var update = flag.Bool("update", false, "capture testdata from the running kernel")

// captured holds what a kernel described and wrote; see its README.
const captured = "testdata/linux-6.18-amd64"

// capturedLayout returns the layout of the captured pages.
func capturedLayout(t testing.TB) *layout {
	t.Helper()
	l, err := newLayout(readFile(t, "header_page"))
	if err != nil {
		t.Fatal(err)
	}
	for k := range Kind(kinds) {
		if err := l.add(k, readFile(t, filepath.Base(tracepoints[k].dir)+".format")); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func readFile(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(captured, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestCapture writes the captured data anew with -update.
func TestCapture(t *testing.T) {
	if !*update {
		t.Skip("skipped: writes testdata with -update")
	}
	testenv.Root(t)
	fs, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer fs.Close()
	in, err := fs.Create(Options{Events: all})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	files := map[string]string{"events/header_page": "header_page"}
	for k := range Kind(kinds) {
		files["events/"+tracepoints[k].dir+"/format"] = filepath.Base(tracepoints[k].dir) + ".format"
	}
	for from, to := range files {
		text, err := in.dir.read(from)
		if err != nil {
			t.Fatal(err)
		}
		write(t, to, text)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := in.Arm(unix.Gettid()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		b := make([]byte, 3*os.Getpagesize())
		if _, err := os.ReadFile("/etc/passwd"); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.ReadAt(b, 100); err != nil {
			t.Fatal(err)
		}
		f.Close()
		// Longer than 27 bits of nanoseconds, so that a time is extended.
		if err := unix.Nanosleep(&unix.Timespec{Nsec: 200_000_000}, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := in.Pause(); err != nil {
		t.Fatal(err)
	}
	text, err := in.dir.read("trace")
	if err != nil {
		t.Fatal(err)
	}
	write(t, "trace.txt", text)
	cpus, err := in.cpus()
	if err != nil {
		t.Fatal(err)
	}
	for _, cpu := range cpus {
		f, err := in.dir.open("per_cpu/"+cpu+"/trace_pipe_raw", unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil {
			t.Fatal(err)
		}
		page := make([]byte, 4096)
		n, err := unix.Read(int(f.Fd()), page)
		if err == nil {
			write(t, cpu+".page", page[:n])
		}
		f.Close()
	}
}

func write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(captured, name), data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// pageWriter writes pages as the kernel does, for the layout of the captured ones.
type pageWriter struct {
	stamp uint64
	body  []byte
}

func (w *pageWriter) head(typeLen int, delta uint32) *pageWriter {
	v := uint32(typeLen) | delta<<5
	if bigEndian {
		v = uint32(typeLen)<<27 | delta
	}
	return w.word(v)
}

func (w *pageWriter) word(v uint32) *pageWriter {
	w.body = binary.NativeEndian.AppendUint32(w.body, v)
	return w
}

func (w *pageWriter) raw(b []byte) *pageWriter {
	w.body = append(w.body, b...)
	return w
}

// page returns the page with these bits in its commit word and tail behind its data.
func (w *pageWriter) page(bits uint64, tail ...byte) []byte {
	p := binary.NativeEndian.AppendUint64(nil, w.stamp)
	p = binary.NativeEndian.AppendUint64(p, uint64(len(w.body))|bits)
	p = append(p, w.body...)
	p = append(p, tail...)
	return append(p, make([]byte, max(4096-len(p), 0))...)
}

// fault returns the data of a fault by thread 7 of page 5 of inode 9 on device 254:1.
func fault(l *layout) []byte {
	for id, r := range l.records {
		if r.kind != Fault {
			continue
		}
		b := make([]byte, 32)
		binary.NativeEndian.PutUint16(b[l.kind.offset:], id)
		binary.NativeEndian.PutUint32(b[r.pid.offset:], 7)
		binary.NativeEndian.PutUint32(b[r.fields[0].offset:], 254<<minorBits|1)
		binary.NativeEndian.PutUint64(b[r.fields[1].offset:], 9)
		binary.NativeEndian.PutUint64(b[r.fields[2].offset:], 5)
		return b
	}
	return nil
}

func TestDecodePage(t *testing.T) {
	l := capturedLayout(t)
	data := fault(l)
	words := len(data) / 4
	at := func(time int64) Event {
		return Event{Kind: Fault, PID: 7, Time: time, Device: 254<<minorBits | 1, Inode: 9, First: 5, Last: 5}
	}
	page := func(stamp uint64) *pageWriter { return &pageWriter{stamp: stamp} }
	stored := binary.NativeEndian.AppendUint64(nil, 42)
	tests := map[string]struct {
		page []byte
		want []Event
		info pageInfo
		bad  bool
	}{
		"empty":            {page: page(1).page(0)},
		"one":              {page: page(100).head(words, 3).raw(data).page(0), want: []Event{at(103)}},
		"two":              {page: page(100).head(words, 3).raw(data).head(words, 0).raw(data).page(0), want: []Event{at(103), at(103)}},
		"time extended":    {page: page(100).head(typeTimeExtend, 5).word(2).head(words, 1).raw(data).page(0), want: []Event{at(100 + 2<<27 + 5 + 1)}},
		"time stamp":       {page: page(100).head(typeTimeStamp, 5).word(2).head(words, 1).raw(data).page(0), want: []Event{at(2<<27 + 5 + 1)}},
		"time stamp, high": {page: page(1<<60+1).head(typeTimeStamp, 5).word(2).head(words, 0).raw(data).page(0), want: []Event{at(1<<60 + 2<<27 + 5)}},
		"time stamp, wraps": {
			page: page(1<<60-1).head(typeTimeStamp, 5).word(0).head(words, 0).raw(data).page(0), want: []Event{at(1<<60 + 5)},
		},
		"length in a word": {page: page(100).head(0, 3).word(uint32(4 + len(data))).raw(data).page(0), want: []Event{at(103)}},
		"taken back": {
			page: page(100).head(typePadding, 3).word(12).raw(make([]byte, 8)).head(words, 0).raw(data).page(0), want: []Event{at(103)},
		},
		"rest unused":   {page: page(100).head(words, 0).raw(data).head(typePadding, 0).raw(make([]byte, 400)).page(0), want: []Event{at(100)}},
		"unknown event": {page: page(100).head(1, 0).word(0xffff).head(words, 0).raw(data).page(0), want: []Event{at(100)}, info: pageInfo{skipped: 1}},
		"missed, stored": {
			page: page(100).head(words, 0).raw(data).page(missedEvents|missedStored, stored...),
			want: []Event{at(100)}, info: pageInfo{missed: 42},
		},
		"missed, unknown": {page: page(100).head(words, 0).raw(data).page(missedEvents), want: []Event{at(100)}, info: pageInfo{missed: unknown}},
		"longer event":    {page: page(100).head(words+1, 0).raw(data).word(9).page(0), want: []Event{at(100)}},

		"no page":              {page: nil, bad: true},
		"half a header":        {page: make([]byte, 15), bad: true},
		"more data than page":  {page: page(1).page(4096), bad: true},
		"cut off in a head":    {page: page(1).raw([]byte{1, 2, 3}).page(0), bad: true},
		"cut off in a record":  {page: page(1).head(words, 0).raw(data[:8]).page(0), bad: true},
		"cut off in a word":    {page: page(1).head(0, 1).page(0), bad: true},
		"length of nothing":    {page: page(1).head(0, 1).word(0).page(0), bad: true},
		"length beyond":        {page: page(1).head(0, 1).word(math.MaxUint32).page(0), bad: true},
		"padding beyond":       {page: page(1).head(typePadding, 1).word(5000).page(0), bad: true},
		"event too short":      {page: page(1).head(2, 0).raw(data[:8]).page(0), bad: true},
		"after a good one":     {page: page(1).head(words, 0).raw(data).head(2, 0).raw(data[:8]).page(0), bad: true},
		"time beyond the type": {page: page(math.MaxUint64-3).head(words, 0).raw(data).page(0), bad: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			before := []Event{{PID: 1}}
			got, info, err := l.decodePage(before, tt.page)
			if errors.Is(err, ErrInvalid) != tt.bad || err != nil && !tt.bad {
				t.Fatalf("decodePage() = %v, want invalid: %t", err, tt.bad)
			}
			if diff := cmp.Diff(append([]Event{{PID: 1}}, tt.want...), got); diff != "" {
				t.Errorf("events (-want +got):\n%s", diff)
			}
			if info != tt.info {
				t.Errorf("info = %+v, want %+v", info, tt.info)
			}
		})
	}
}

// Pages of a kernel that reports one page more than is read are put right.
func TestReadsOneMore(t *testing.T) {
	l := capturedLayout(t)
	for id, r := range l.records {
		if r.kind != Read {
			continue
		}
		for last, want := range map[uint64]uint64{5: 5, 6: 5, 9: 8} {
			b := make([]byte, 40)
			binary.NativeEndian.PutUint16(b, id)
			binary.NativeEndian.PutUint64(b[r.fields[2].offset:], 5)
			binary.NativeEndian.PutUint64(b[r.fields[3].offset:], last)
			l.readsOneMore = true
			page := (&pageWriter{}).head(len(b)/4, 0).raw(b).page(0)
			got, _, err := l.decodePage(nil, page)
			if err != nil || len(got) != 1 || got[0].First != 5 || got[0].Last != want {
				t.Errorf("read up to page %d: %+v, %v; want page 5 to %d", last, got, err, want)
			}
		}
	}
}

func TestInsertOrder(t *testing.T) {
	l := capturedLayout(t)
	for id, r := range l.records {
		if r.kind != Insert {
			continue
		}
		for order, last := range map[byte]uint64{0: 8, 4: 8 + 15, 40: 8 + 1<<40 - 1, 41: 0, 255: 0} {
			b := make([]byte, 40)
			binary.NativeEndian.PutUint16(b, id)
			binary.NativeEndian.PutUint64(b[r.fields[2].offset:], 8)
			b[r.fields[3].offset] = order
			got, _, err := l.decodePage(nil, (&pageWriter{}).head(len(b)/4, 0).raw(b).page(0))
			if last == 0 {
				if !errors.Is(err, ErrInvalid) || got != nil {
					t.Errorf("order %d: %+v, %v; want ErrInvalid", order, got, err)
				}
			} else if err != nil || len(got) != 1 || got[0].First != 8 || got[0].Last != last {
				t.Errorf("order %d: %+v, %v; want page 8 to %d", order, got, err, last)
			}
		}
	}
}

func FuzzDecodePage(f *testing.F) {
	l := capturedLayout(f)
	pages, err := filepath.Glob(filepath.Join(captured, "*.page"))
	if err != nil || len(pages) == 0 {
		f.Fatalf("no captured pages: %v", err)
	}
	for _, p := range pages {
		b, err := os.ReadFile(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add((&pageWriter{stamp: 5}).head(typeTimeStamp, 1).word(1).head(typePadding, 1).word(4).head(8, 1).raw(fault(l)).page(missedEvents))
	f.Fuzz(func(t *testing.T, page []byte) {
		before := make([]Event, 1)
		got, info, err := l.decodePage(before, page)
		if err != nil {
			if !errors.Is(err, ErrInvalid) || len(got) != 1 || info != (pageInfo{}) {
				t.Fatalf("error %v with %d events, %+v", err, len(got), info)
			}
			return
		}
		if len(got) > 1+len(page)/headSize {
			t.Fatalf("%d events in %d bytes", len(got), len(page))
		}
		for _, e := range got[1:] {
			if e.Time < 0 || e.Last < e.First || int(e.Kind) >= kinds {
				t.Fatalf("event %+v", e)
			}
		}
	})
}

func FuzzFormat(f *testing.F) {
	names, err := filepath.Glob(filepath.Join(captured, "*"))
	if err != nil {
		f.Fatal(err)
	}
	for _, n := range names {
		if b, err := os.ReadFile(n); err == nil && (strings.HasSuffix(n, ".format") || strings.HasSuffix(n, "header_page")) {
			f.Add(b)
		}
	}
	page := (&pageWriter{}).head(3, 0).raw(make([]byte, 12)).page(0)
	f.Fuzz(func(t *testing.T, text []byte) {
		if format, err := parseFormat(text); err != nil && (format != nil || !errors.Is(err, ErrInvalid)) {
			t.Fatalf("parseFormat() = %v, %v", format, err)
		}
		l, err := newLayout(text)
		if err != nil {
			if l != nil || !errors.Is(err, ErrInvalid) {
				t.Fatalf("newLayout() = %v, %v", l, err)
			}
			l = capturedLayout(t)
		}
		for k := range Kind(kinds) {
			if err := l.add(k, text); err != nil && !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
		}
		// What was accepted can be used.
		if _, _, err := l.decodePage(nil, page); err != nil && !errors.Is(err, ErrInvalid) {
			t.Fatal(err)
		}
	})
}

// BenchmarkDecodePage measures what an event costs this package, without the system call.
func BenchmarkDecodePage(b *testing.B) {
	l := capturedLayout(b)
	w := &pageWriter{stamp: 1}
	data := fault(l)
	for len(w.body)+headSize+len(data) <= l.size-l.data {
		w.head(len(data)/4, 1).raw(data)
	}
	page := w.page(0)
	var events []Event
	for b.Loop() {
		var err error
		if events, _, err = l.decodePage(events[:0], page); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(events)), "ns/event")
	b.ReportAllocs()
}
