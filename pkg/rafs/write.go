package rafs

import (
	"bufio"
	"fmt"
	"io"
)

// BootstrapInfo describes a written bootstrap.
type BootstrapInfo struct {
	Size     int64  // bytes
	RootNid  uint64 // v5: the root's inode number
	Inodes   int    // distinct inodes
	Entries  int    // directory entries, the root included
	Chunks   int    // distinct chunks
	Prefetch int    // entries of the prefetch table
}

// bootstrapPlan is a bootstrap of one version of the format with everything decided.
type bootstrapPlan interface {
	write(out *placedWriter)
	info() BootstrapInfo
}

func planBootstrap(img *Image) (bootstrapPlan, error) {
	switch img.Version {
	case V5:
		p, err := planV5(img)
		if err != nil {
			return nil, err
		}
		return p, nil
	case V6, 0:
		p, err := planV6(img)
		if err != nil {
			return nil, err
		}
		return p, nil
	}
	return nil, unsupported("image", -1, "version", uint8(img.Version), "5 or 6")
}

// WriteBootstrap writes img as a bootstrap of its version, front to back. Everything is planned before
// the first byte is written; the same image always gives the same bytes. Beside img it
// holds about 120 bytes an inode and 16 a chunk in memory.
//
// ErrInvalid, naming the path, when img cannot be expressed: children that are not
// sorted, names longer than 255 bytes, symlink targets that are empty or longer
// than 4096, xattrs of another prefix than user, trusted, security and POSIX ACLs or longer than 65535 bytes, chunks that do not
// cover their file or lie outside their blob, more than MaxBlobs blobs, blobs
// without chunks; v5: blobs of several compressors, more than 2 GiB in all. Names of one inode that is no
// regular file become files of their own in v5. A v5 bootstrap can refer to v6 blobs, but not to their
// batches (ErrUnsupported), and not the other way round. It does not change img; calls may overlap.
func WriteBootstrap(w io.Writer, img *Image) (BootstrapInfo, error) {
	plan, err := planBootstrap(img)
	if err != nil {
		return BootstrapInfo{}, fmt.Errorf("plan bootstrap: %w", err)
	}
	out := &placedWriter{w: bufio.NewWriterSize(w, writeBuffer)}
	plan.write(out)
	if err := out.flush(); err != nil {
		return BootstrapInfo{}, fmt.Errorf("write bootstrap: %w", err)
	}
	return plan.info(), nil
}

const writeBuffer = 256 << 10

// placedWriter writes records at ascending offsets and fills gaps with zeros. It keeps
// the first error and then does nothing.
type placedWriter struct {
	w       *bufio.Writer
	written uint64
	err     error
	zeros   [512]byte // never written to
}

// at writes p at offset, which must not lie before what was written.
func (o *placedWriter) at(offset uint64, p []byte) {
	if offset < o.written {
		panic(fmt.Sprintf("rafs: plan overlaps at byte %d, written %d", offset, o.written))
	}
	for o.err == nil && o.written < offset {
		o.put(o.zeros[:min(offset-o.written, uint64(len(o.zeros)))])
	}
	o.put(p)
}

func (o *placedWriter) put(p []byte) {
	if o.err != nil {
		return
	}
	if _, err := o.w.Write(p); err != nil {
		o.err = err
		return
	}
	o.written += uint64(len(p))
}

func (o *placedWriter) flush() error {
	if o.err != nil {
		return o.err
	}
	return o.w.Flush()
}
