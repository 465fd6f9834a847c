package tracefs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// pages is a set of page indexes.
type pages map[uint64]bool

// of returns the pages that events of one kind name of file inode, below end.
func of(events []tracefs.Event, kind tracefs.Kind, inode, end uint64) pages {
	p := pages{}
	for _, e := range events {
		if e.Kind != kind || e.Inode != inode {
			continue
		}
		for i := e.First; i <= e.Last && i < end; i++ {
			p[i] = true
		}
	}
	return p
}

func span(first, last uint64) pages {
	p := pages{}
	for i := first; i <= last; i++ {
		p[i] = true
	}
	return p
}

// within reports whether all of p is in q.
func (p pages) within(q pages) bool {
	for i := range p {
		if !q[i] {
			return false
		}
	}
	return true
}

// window returns p and what the kernel may map around in a mapping of a file's start at
// addr: windows of 64 KiB that are aligned in memory, not in the file (mm/memory.c
// do_fault_around).
func (p pages) window(addr uintptr) pages {
	page := os.Getpagesize()
	n := max(uint64(64<<10/page), 1)
	shift := uint64(addr) / uint64(page) % n
	q := pages{}
	for i := range p {
		begin := (i + shift) / n * n
		for j := begin; j < begin+n; j++ {
			if j >= shift {
				q[j-shift] = true
			}
		}
	}
	return q
}

const filePages = 256

// subject makes a file of filePages pages less 100 bytes on a filesystem that reads
// through the page cache as images do, which tmpfs does not.
func subject(t testing.TB, warm bool) (*os.File, uint64) {
	t.Helper()
	dir := t.TempDir()
	if onTmpfs(t, dir) { // whose reads raise no event
		var err error
		if dir, err = os.MkdirTemp("/var/tmp", "headstart-"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		if onTmpfs(t, dir) {
			testenv.Kernel(t, "page events of temporary files", errors.New("they are on tmpfs"))
		}
	}
	f, err := os.Create(filepath.Join(dir, "subject"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	data := bytes.Repeat([]byte("x"), filePages*os.Getpagesize()-100)
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if !warm {
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	var is unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &is); err != nil {
		t.Fatal(err)
	}
	return f, is.Ino
}

// traced returns the events of what f does on its thread, and resets the instance.
func traced(t *testing.T, in *tracefs.Instance, f func() error) []tracefs.Event {
	t.Helper()
	events := armed(t, in, f)
	if err := in.Reset(); err != nil {
		t.Fatal(err)
	}
	return events
}

// armed returns the events of what f does on its thread.
func armed(t *testing.T, in *tracefs.Instance, f func() error) []tracefs.Event {
	t.Helper()
	r, err := in.Reader()
	if err != nil {
		t.Error(err)
		return nil
	}
	defer r.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := in.Arm(unix.Gettid()); err != nil {
		t.Error(err)
		return nil
	}
	if err := f(); err != nil {
		t.Error(err)
	}
	events := drain(t, r)
	for i := 1; i < len(events); i++ {
		if events[i].Time < events[i-1].Time {
			t.Errorf("event %d is %d ns earlier than the one before", i, events[i-1].Time-events[i].Time)
		}
	}
	if lost, err := in.Lost(); err != nil || lost.Total() != 0 || r.Missed() != 0 || r.Rejoined() != 0 {
		t.Errorf("lost %+v, %v, missed %d, rejoined %d; want nothing", lost, err, r.Missed(), r.Rejoined())
	}
	return events
}

// Each row reads a known range; what the kernel is seen to read is exactly that, cold and
// warm.
func TestReadsAreExact(t *testing.T) {
	fs := open(t)
	in := create(t, fs, tracefs.Options{})
	page := os.Getpagesize()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	tests := map[string]struct {
		read func(f *os.File) error
		want pages
	}{
		"pread of one byte":  {func(f *os.File) error { _, err := f.ReadAt(make([]byte, 1), int64(7*page)); return err }, span(7, 7)},
		"pread of one page":  {func(f *os.File) error { _, err := f.ReadAt(make([]byte, page), int64(7*page)); return err }, span(7, 7)},
		"pread across pages": {func(f *os.File) error { _, err := f.ReadAt(make([]byte, 2), int64(8*page-1)); return err }, span(7, 8)},
		"pread of 600 KiB": {func(f *os.File) error {
			_, err := f.ReadAt(make([]byte, 600<<10), int64(3*page))
			return err
		}, span(3, 3+uint64(600<<10/page)-1)},
		"pread across the end": {func(f *os.File) error {
			_, err := unix.Pread(int(f.Fd()), make([]byte, 64<<10), int64((filePages-2)*page))
			return err
		}, span(filePages-2, filePages-1)},
		"read": {func(f *os.File) error {
			_, err := io.ReadFull(f, make([]byte, 5*page))
			return err
		}, span(0, 4)},
		"readv": {func(f *os.File) error {
			_, err := unix.Preadv(int(f.Fd()), [][]byte{make([]byte, 100), make([]byte, page)}, int64(20*page))
			return err
		}, span(20, 21)},
		"sendfile": {func(f *os.File) error {
			off := int64(40 * page)
			return all(func() (int, error) { return unix.Sendfile(int(null.Fd()), int(f.Fd()), &off, int(int64(50*page)-off)) })
		}, span(40, 49)},
		"splice": {func(f *os.File) error {
			var p [2]int
			if err := unix.Pipe(p[:]); err != nil {
				return err
			}
			defer unix.Close(p[0])
			defer unix.Close(p[1])
			off := int64(60 * page)
			_, err := unix.Splice(int(f.Fd()), &off, p[1], nil, 3*page, 0)
			return err
		}, span(60, 62)},
		"copy_file_range": {func(f *os.File) error {
			out, err := os.CreateTemp(filepath.Dir(f.Name()), "copy-*")
			if err != nil {
				return err
			}
			defer out.Close()
			off := int64(80 * page)
			return all(func() (int, error) {
				return unix.CopyFileRange(int(f.Fd()), &off, int(out.Fd()), nil, int(int64(90*page)-off), 0)
			})
		}, span(80, 89)},
		"nothing": {func(f *os.File) error { _, err := f.Stat(); return err }, pages{}},
	}
	for name, tt := range tests {
		for state, warm := range map[string]bool{"cold": false, "warm": true} {
			t.Run(name+"/"+state, func(t *testing.T) {
				f, inode := subject(t, warm)
				events := traced(t, in, func() error { return tt.read(f) })
				got := of(events, tracefs.Read, inode, filePages)
				if !got.within(tt.want) || !tt.want.within(got) {
					t.Errorf("read pages %v, want %v", got, tt.want)
				}
				if mapped := of(events, tracefs.Around, inode, filePages); len(mapped) != 0 {
					t.Errorf("mapped pages %v, want none", mapped)
				}
			})
		}
	}
}

// all repeats a copy until it copies nothing more.
func all(copySome func() (int, error)) error {
	for {
		if n, err := copySome(); err != nil || n == 0 {
			return err
		}
	}
}

// widened returns the pages of file inode that were mapped around, with their folios.
func widened(t *testing.T, f *os.File, events []tracefs.Event, inode uint64) pages {
	t.Helper()
	w, err := tracefs.NewWidener()
	testenv.Kernel(t, "pagemap and kpageflags", err)
	defer w.Close()
	var spans []tracefs.Span
	for _, e := range events {
		if e.Kind == tracefs.Around && e.Inode == inode {
			spans = append(spans, tracefs.Span{First: e.First, Last: e.Last})
		}
	}
	wide, err := w.Widen(f, spans)
	if err != nil {
		t.Fatal(err)
	}
	p := pages{}
	for _, s := range wide {
		for i := s.First; i <= s.Last; i++ {
			p[i] = true
		}
	}
	return p
}

// mapAt maps f shift bytes behind an address that what one page of page tables maps begins at,
// so that no folio crosses into the next, where the kernel would not map it whole.
func mapAt(t *testing.T, f *os.File, length, shift int) []byte {
	t.Helper()
	const table = 2 << 20
	area, err := unix.Mmap(-1, 0, 3*table, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(area); err != nil {
			t.Error(err)
		}
	})
	base := unsafe.Pointer(&area[0])
	at := unsafe.Add(base, -uintptr(base)&(table-1)+uintptr(shift))
	p, err := unix.MmapPtr(int(f.Fd()), 0, at, uintptr(length), unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_FIXED)
	if err != nil || p != at {
		t.Fatalf("mapped at %p, want %p: %v", p, at, err)
	}
	return unsafe.Slice((*byte)(at), length)
}

// present returns the pages of the mapping m that are mapped: what the kernel really did.
func present(t *testing.T, m []byte) pages {
	t.Helper()
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := os.Getpagesize()
	b := make([]byte, 8*len(m)/page)
	if _, err := f.ReadAt(b, int64(uintptr(unsafe.Pointer(&m[0])))/int64(page)*8); err != nil {
		t.Fatal(err)
	}
	p := pages{}
	for i := range len(b) / 8 {
		if binary.NativeEndian.Uint64(b[8*i:])>>63 != 0 {
			p[uint64(i)] = true
		}
	}
	return p
}

// What is touched through a mapping lies in what was faulted on and mapped around; faults
// are touched pages; and nothing outside the windows around touched pages is named.
func TestMapsAreBounded(t *testing.T) {
	fs := open(t)
	in := create(t, fs, tracefs.Options{})
	page := os.Getpagesize()
	shift := 0
	for name, touch := range map[string][]uint64{
		"one":      {33},
		"a window": {33, 34, 47, 32},
		"windows":  {0, 100, 20, filePages - 1},
		"backward": {99, 98, 97, 66, 65, 3},
	} {
		for state, warm := range map[string]bool{"cold": false, "warm": true} {
			t.Run(name+"/"+state, func(t *testing.T) {
				f, inode := subject(t, warm)
				shift = (shift + 5) % 16
				m := mapAt(t, f, filePages*page, shift*page)
				var sum byte
				events := traced(t, in, func() error {
					for _, p := range touch {
						sum += m[int(p)*page]
					}
					return nil
				})
				if sum == 0 {
					t.Fatal("file reads as zeros")
				}
				truth := pages{}
				for _, p := range touch {
					truth[p] = true
				}
				lower := of(events, tracefs.Fault, inode, filePages)
				upper := widened(t, f, events, inode)
				for p := range lower {
					upper[p] = true
				}
				bound := truth.window(uintptr(unsafe.Pointer(&m[0])))
				for p := range present(t, m) {
					bound[p] = true
				}
				if !lower.within(truth) {
					t.Errorf("faulted pages %v, touched %v", lower, truth)
				}
				if !truth.within(upper) {
					t.Errorf("mapped pages %v, touched %v", upper, truth)
				}
				if mapped := present(t, m); !mapped.within(upper) {
					t.Errorf("mapped pages %v, the page table has %v", upper, mapped)
				}
				if !upper.within(bound) {
					t.Errorf("mapped pages %v, touched %v: outside the windows", upper, truth)
				}
			})
		}
	}
}

// An executed file is seen by its faults: all of a static program's start lies in its own
// pages, and its first page is read.
func TestExecIsSeen(t *testing.T) {
	fs := open(t)
	in := create(t, fs, tracefs.Options{})
	f, _ := subject(t, true)
	path := f.Name() + ".exe"
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, self, 0o755); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	var child int
	events := traced(t, in, func() error {
		cmd := exec.Command(path)
		cmd.Env = []string{helperEnv + "=nothing"}
		if err := cmd.Start(); err != nil {
			return err
		}
		child = cmd.Process.Pid
		return cmd.Wait()
	})
	end := uint64(len(self)+os.Getpagesize()-1) / uint64(os.Getpagesize())
	if read := of(events, tracefs.Read, st.Ino, end); !read[0] {
		t.Errorf("read pages %v of the program, want its first", read)
	}
	if mapped := of(events, tracefs.Around, st.Ino, end); len(mapped) < 16 {
		t.Errorf("%d mapped pages of the program, want a Go program's start", len(mapped))
	}
	forked, executed := false, false
	for _, e := range events {
		forked = forked || e.Kind == tracefs.Fork && int(e.Other) == child
		executed = executed || e.Kind == tracefs.Exec && int(e.PID) == child && e.Other == e.PID
	}
	if !forked || !executed {
		t.Errorf("fork of %d seen: %t, exec: %t; want both", child, forked, executed)
	}
}

// The next best engine names what had to be read into the page cache, at least what was
// asked for, and nothing that was there.
func TestInsertsSeeColdPages(t *testing.T) {
	in := create(t, open(t), tracefs.Options{Events: tracefs.Inserts})
	for state, warm := range map[string]bool{"cold": false, "warm": true} {
		f, inode := subject(t, warm)
		events := traced(t, in, func() error {
			_, err := f.ReadAt(make([]byte, 3*os.Getpagesize()), int64(5*os.Getpagesize()))
			return err
		})
		got := of(events, tracefs.Insert, inode, filePages)
		if warm && len(got) != 0 || !warm && !span(5, 7).within(got) {
			t.Errorf("%s: inserted pages %v, read 5 to 7", state, got)
		}
		for _, e := range events {
			if e.Kind != tracefs.Insert {
				t.Errorf("%s: event %+v, want insertions alone", state, e)
			}
		}
	}
}

func onTmpfs(t testing.TB, dir string) bool {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return st.Type == unix.TMPFS_MAGIC
}
