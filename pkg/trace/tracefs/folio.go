package tracefs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Span is a run of pages of a file, both ends included. First <= Last.
type Span struct{ First, Last uint64 }

// Widener tells which pages the kernel really maps around a fault. From Linux 6.18 on it maps
// the whole of a large folio that lies in the window, while [Around] names the window alone
// (mm/filemap.c filemap_map_folio_range): touches of the rest of the folio raise no event.
// The extent of folios is not in any event, so it is looked up in the page cache afterwards.
//
// A Widener is not safe for concurrent use.
type Widener struct {
	pagemap, flags *os.File
	page           int
	// area is address space for one mapping of areaSize bytes, aligned to it.
	whole []byte
	area  unsafe.Pointer
}

// areaSize is what one page of page tables maps on most machines, in bytes, and the largest
// folio there is; a power of two.
const areaSize = 2 << 20

// Bits of /proc/self/pagemap and /proc/kpageflags.
// Source: Documentation/admin-guide/mm/pagemap.rst.
const (
	pagemapPresent = 1 << 63
	pagemapFrame   = 1<<55 - 1
	flagTail       = 1 << 16
	word           = 8 // bytes of an entry of either
)

// NewWidener returns a Widener. The caller closes it. It returns [ErrPermission] or
// [ErrUnsupported] (CONFIG_PROC_PAGE_MONITOR) where folios cannot be looked up.
func NewWidener() (*Widener, error) {
	w := &Widener{page: os.Getpagesize()}
	var err error
	if w.pagemap, err = os.Open("/proc/self/pagemap"); err != nil {
		return nil, fmt.Errorf("look up folios: %w", explain(err))
	}
	if w.flags, err = os.Open("/proc/kpageflags"); err != nil {
		return nil, errors.Join(fmt.Errorf("look up folios: %w", explain(err)), w.pagemap.Close())
	}
	w.whole, err = unix.Mmap(-1, 0, 2*areaSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("look up folios: %w", err), w.pagemap.Close(), w.flags.Close())
	}
	base := unsafe.Pointer(&w.whole[0])
	w.area = unsafe.Add(base, -uintptr(base)&(areaSize-1))
	return w, nil
}

// Close gives back what the Widener holds. Later calls return nil.
func (w *Widener) Close() error {
	if w.whole == nil {
		return nil
	}
	err := errors.Join(unix.Munmap(w.whole), w.pagemap.Close(), w.flags.Close())
	w.whole = nil
	return err
}

// Widen returns the spans, each grown to the folios of the page cache that its first and last
// page lie in, if this kernel maps such folios whole; otherwise as they are. None reaches
// beyond the end of the file. Pages that are not cached any more widen nothing. f is open for
// reading; nothing is read from storage.
func (w *Widener) Widen(f *os.File, spans []Span) ([]Span, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("look up folios: %w", err)
	}
	if st.Size() == 0 {
		return slices.Clone(spans), nil
	}
	end := uint64(st.Size()-1) / uint64(w.page) //nolint:gosec // sizes are positive
	out := make([]Span, 0, len(spans))
	for _, s := range spans {
		if s.First <= end {
			first, last, err := w.folio(f, s.First, end)
			if to := min(s.Last, end); err == nil && last < to {
				_, last, err = w.folio(f, to, end)
			}
			if err != nil {
				return nil, fmt.Errorf("look up folios: %w", err)
			}
			s.First, s.Last = min(s.First, first), max(s.Last, last)
		}
		out = append(out, s)
	}
	return out, nil
}

// HugeSize is the size of the folios that [Widener.Huge] looks for, in bytes: what one page
// of page tables maps with pages of 4 KiB.
const HugeSize = areaSize

// Huge returns the folios of f in the page cache that a fault may map by one entry of a higher
// page table: of all of these pages the kernel reports none, neither by [Fault] nor by
// [Around] (mm/filemap.c filemap_map_pmd), so they may have been touched wherever the file
// was mapped. There are such folios where files of at least [HugeSize] were written in large
// pieces, not where they were unpacked from an archive in small ones. f is open for reading;
// nothing is read from storage.
func (w *Widener) Huge(f *os.File) ([]Span, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("look up folios: %w", err)
	}
	pages := uint64(areaSize / w.page)    //nolint:gosec // positive
	whole := uint64(st.Size()) / areaSize //nolint:gosec // sizes are positive
	var out []Span
	for i := range whole {
		at := i * pages
		first, last, err := w.folio(f, at, at+pages-1)
		if err != nil {
			return nil, fmt.Errorf("look up folios: %w", err)
		}
		if first != at || last != at+pages-1 {
			continue
		}
		if n := len(out); n > 0 && out[n-1].Last+1 == first {
			out[n-1].Last = last
		} else {
			out = append(out, Span{First: first, Last: last})
		}
	}
	return out, nil
}

// folio returns the first and last page of what is mapped along with page at, which is at
// itself when it is not cached or not in a large folio. end is the last page of the file.
func (w *Widener) folio(f *os.File, at, end uint64) (first, last uint64, err error) {
	pages := uint64(areaSize / w.page) //nolint:gosec // positive
	begin := at / pages * pages
	count := min(pages, end-begin+1)
	length := uintptr(count) * uintptr(w.page)
	p, err := unix.MmapPtr(int(f.Fd()), int64(begin)*int64(w.page), w.area, length, //nolint:gosec // within the file
		unix.PROT_READ, unix.MAP_SHARED|unix.MAP_FIXED)
	if err != nil {
		return at, at, err
	}
	if p != w.area {
		return at, at, fmt.Errorf("mapped at %p, want %p", p, w.area)
	}
	defer func() {
		_, merr := unix.MmapPtr(-1, 0, w.area, areaSize, unix.PROT_NONE,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED)
		err = errors.Join(err, merr)
	}()
	b := unsafe.Slice((*byte)(w.area), length)
	one := b[int(at-begin)*w.page:][:w.page] //nolint:gosec // within the area
	if cached, err := resident(one); err != nil || !cached {
		return at, at, err
	}
	// Not by a touch, which would be SIGBUS where the file was cut off meanwhile.
	if err := retry(func() error { return unix.Madvise(one, unix.MADV_POPULATE_READ) }); err != nil {
		if errors.Is(err, unix.EFAULT) || errors.Is(err, unix.EINVAL) { // cut off; before Linux 5.14
			err = nil
		}
		return at, at, err
	}
	entries := make([]uint64, count)
	if err := readWords(w.pagemap, uint64(uintptr(w.area)/uintptr(w.page)), entries); err != nil {
		return at, at, err
	}
	first, last, err = w.extent(entries, at-begin)
	return begin + first, begin + last, err
}

// extent returns the part of the mapping with these entries of the pagemap that is of the
// folio of entry i and is mapped.
func (w *Widener) extent(entries []uint64, i uint64) (first, last uint64, err error) {
	frame := entries[i] & pagemapFrame
	if entries[i]&pagemapPresent == 0 || frame == 0 { // frame 0: without CAP_SYS_ADMIN
		return i, i, nil
	}
	// The frames of a folio are adjacent and aligned as its pages are in the file.
	mine := func(j uint64) bool { // page j of the mapping is the one frame of the folio that it must be
		return entries[j]&pagemapPresent != 0 && entries[j]&pagemapFrame == frame-i+j
	}
	flags := frameFlags{file: w.flags}
	first, last = i, i
	for more := true; more && first > 0 && mine(first-1); {
		if more, err = flags.tail(frame - i + first); err != nil {
			return i, i, err
		}
		if more {
			first--
		}
	}
	for more := true; more && last+1 < uint64(len(entries)) && mine(last+1); {
		if more, err = flags.tail(frame - i + last + 1); err != nil {
			return i, i, err
		}
		if more {
			last++
		}
	}
	return first, last, nil
}

// frameFlags reads /proc/kpageflags, a few frames at a time: each takes the kernel a while, and most folios are small.
type frameFlags struct {
	file  *os.File
	first uint64 // frame of words[0]
	read  bool
	words [16]uint64
}

// tail reports whether a frame is one of a folio, and not its first.
func (f *frameFlags) tail(frame uint64) (bool, error) {
	n := uint64(len(f.words))
	if first := frame / n * n; !f.read || first != f.first {
		clear(f.words[:]) // behind the last frame nothing is read
		if err := readWords(f.file, first, f.words[:]); err != nil {
			return false, err
		}
		f.first, f.read = first, true
	}
	return f.words[frame%n]&flagTail != 0, nil
}

// resident reports whether the one page b is in the page cache.
func resident(b []byte) (bool, error) {
	var vec [1]byte
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&vec)))
	if errno != 0 {
		return false, fmt.Errorf("mincore: %w", errno)
	}
	return vec[0]&1 != 0, nil
}

// readWords fills words with the entries from number at on; what lies behind the last entry
// of the file is 0.
func readWords(f *os.File, at uint64, words []uint64) error {
	b := make([]byte, len(words)*word)
	n, err := f.ReadAt(b, int64(at)*word) //nolint:gosec // addresses and frames have 57 bits less those of a page
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for i := range n / word {
		words[i] = binary.NativeEndian.Uint64(b[i*word:])
	}
	return nil
}
