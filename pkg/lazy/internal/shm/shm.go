// Package shm holds memory that outlives the process that works with it: a memfd whose
// descriptor another process keeps, mapped as 64-bit words. A process that takes over
// maps the same descriptor and finds every word as it was last stored.
package shm

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// wordSize is the size of a word in bytes.
const wordSize = 8

// Memory is a mapped memfd. Words may be read and written by several goroutines at
// once; Close may not overlap with anything.
type Memory struct {
	file  *os.File
	bytes []byte
	words []atomic.Uint64
}

// New returns words zeros under name, which shows in /proc. Pages that are not touched
// take no memory. The caller closes it.
func New(name string, words int) (*Memory, error) {
	if words < 1 {
		return nil, fmt.Errorf("shared memory %s: %d words, want at least 1", name, words)
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // MFD_NOEXEC_SEAL: before Linux 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("shared memory %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	err = unix.Ftruncate(fd, int64(words)*wordSize)
	if err == nil {
		// Nobody who holds the descriptor can make the mapping fault.
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	}
	var m *Memory
	if err == nil {
		m, err = Open(f)
	}
	if err != nil {
		return nil, fmt.Errorf("shared memory %s: %w", name, errors.Join(err, f.Close()))
	}
	return m, nil
}

// Open maps f, which [Memory.File] gave, perhaps in another process. The Memory owns f
// from then on; when Open fails the caller keeps it.
func Open(f *os.File) (*Memory, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	size := info.Size()
	if size < wordSize || size%wordSize != 0 || size != int64(int(size)) {
		return nil, fmt.Errorf("map %s: %d bytes, want a multiple of %d", f.Name(), size, wordSize)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", f.Name(), err)
	}
	// A mapping begins at a page, so that words are aligned.
	words := unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&b[0])), len(b)/wordSize)
	return &Memory{file: f, bytes: b, words: words}, nil
}

// File returns the descriptor to keep. It stays the Memory's.
func (m *Memory) File() *os.File { return m.file }

// Words returns the memory as words, valid until Close.
func (m *Memory) Words() []atomic.Uint64 { return m.words }

// Bytes returns the same memory as bytes in the machine's order, valid until Close.
func (m *Memory) Bytes() []byte { return m.bytes }

// Close unmaps the memory and closes the descriptor. What others keep stays. Later
// calls return nil.
func (m *Memory) Close() error {
	if m.file == nil {
		return nil
	}
	err := errors.Join(unix.Munmap(m.bytes), m.file.Close())
	m.file, m.bytes, m.words = nil, nil, nil
	return err
}

// Unmap is Close for a Memory whose descriptor goes back to the caller of [Open].
func (m *Memory) Unmap() error {
	if m.file == nil {
		return nil
	}
	err := unix.Munmap(m.bytes)
	m.file, m.bytes, m.words = nil, nil, nil
	return err
}
