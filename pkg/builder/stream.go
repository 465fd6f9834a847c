package builder

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"
	"sync"

	// The algorithms that go-digest finds by registration.
	_ "crypto/sha256"
	_ "crypto/sha512"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/builder/internal/gunzip"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

const (
	storedBuffer = 64 << 10  // bytes read ahead of the stored layer
	plainBuffer  = 256 << 10 // bytes of tar hashed at once

	// maxWindow bounds the memory a zstd layer may ask for: 128 MiB is what `zstd --long`
	// uses and what every decoder accepts by default.
	maxWindow = 128 << 20

	// tarMagic is where a POSIX or GNU tar header has "ustar".
	tarMagicOffset = 257
)

// layerStream is the uncompressed tar of one layer. It checks, while it is read, the
// stored bytes against the descriptor and the tar against the diff ID.
// Not safe for concurrent use, but Close may overlap Read.
type layerStream struct {
	stored *storedReader
	next   func() ([]byte, error) // more of the tar, valid until the next call
	known  func() []gunzip.Match  // of what next returned; nil where none are known
	ref    *rafs.RefBuilder       // what next reads from, where places in the layer are wanted; else nil
	free   func()                 // releases the decompressor
	close  func() error

	buf []byte // of the tar, not read yet
	log matchLog

	diffHash hash.Hash
	diffWant digest.Digest
	size     int64 // bytes of tar hashed
	done     bool  // the tar has ended well
}

// openLayer opens l and finds out how it is compressed, by its first bytes. With ref, which zstd layers do not
// allow, it reads through a [rafs.RefBuilder].
func openLayer(ctx context.Context, l Layer, ref *rafs.RefOptions) (*layerStream, error) {
	if err := checkMediaType(l.Descriptor.MediaType); err != nil {
		return nil, err
	}
	hash, err := newHash(l.Descriptor.Digest)
	if err != nil {
		return nil, fmt.Errorf("digest of the descriptor: %w", err)
	}
	if l.Verified {
		hash = nil
	}
	diffHash, err := newHash(l.DiffID)
	if err != nil {
		return nil, fmt.Errorf("diff ID: %w", err)
	}
	rc, err := l.Open(ctx)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	closeOnce := sync.OnceValue(rc.Close)
	// A read that hangs is released when the context ends.
	stop := context.AfterFunc(ctx, func() { _ = closeOnce() })

	s := &layerStream{
		stored: &storedReader{
			r: rc, h: hash, want: l.Descriptor.Digest, size: l.Descriptor.Size,
			done: ctx.Err,
		},
		diffHash: diffHash,
		diffWant: l.DiffID,
		free:     func() {},
	}
	s.close = func() error {
		stop()
		s.free()
		return closeOnce()
	}
	if err := s.detect(bufio.NewReaderSize(s.stored, storedBuffer), ref); err != nil {
		err = s.blame(err)
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// newHash returns the hash for d's algorithm, or an error that says what is wrong with d.
func newHash(d digest.Digest) (hash.Hash, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %q: %w", ErrInvalid, d, err)
	}
	return d.Algorithm().Hash(), nil
}

// checkMediaType refuses layers whose bytes are not a tar that may be read.
func checkMediaType(mt string) error {
	switch {
	case strings.HasSuffix(mt, "+encrypted"):
		return fmt.Errorf("%w: media type %s: the layer is encrypted", ErrUnsupported, mt)
	case strings.Contains(mt, ".nondistributable."), strings.Contains(mt, ".foreign."):
		return fmt.Errorf("%w: media type %s: foreign layers may not be distributed", ErrUnsupported, mt)
	case strings.Contains(mt, ".nydus."):
		return fmt.Errorf("%w: media type %s: the image is a Nydus image already", ErrUnsupported, mt)
	}
	base, _, _ := strings.Cut(mt, "+")
	base = strings.TrimSuffix(strings.TrimSuffix(base, ".gzip"), ".zstd")
	switch base {
	case ocispec.MediaTypeImageLayer, "application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.container.image.rootfs.diff+x-gtar":
		return nil
	}
	return fmt.Errorf("%w: media type %q is no image layer", ErrUnsupported, mt)
}

// detect sets s.next. The bytes decide, not the media type: registries hold both kinds of mistake,
// and the diff ID proves the outcome.
func (s *layerStream) detect(br *bufio.Reader, ref *rafs.RefOptions) error {
	head, err := br.Peek(tarMagicOffset + 5)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	isZstd := bytes.HasPrefix(head, []byte("\x28\xb5\x2f\xfd")) || isSkippableFrame(head)
	switch {
	case ref != nil && isZstd:
		return fmt.Errorf("%w: the layer is compressed with zstd, and only gzip and plain tar can be referred to; convert the image without references", ErrUnsupported)
	case ref != nil && (bytes.HasPrefix(head, []byte("\x1f\x8b")) || len(head) == 0 || looksLikeTar(head)):
		return s.startRef(br, ref)
	case bytes.HasPrefix(head, []byte("\x1f\x8b")):
		z := gunzip.NewReader(br)
		s.next, s.known = z.Next, z.Matches
	case isZstd:
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return fmt.Errorf("%w: zstd header: %w", ErrInvalid, err)
		}
		s.next, s.free = readBlocks(z), z.Close
	case bytes.HasPrefix(head, []byte("BZh")):
		return fmt.Errorf("%w: bzip2 compression; want tar, gzip or zstd", ErrUnsupported)
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return fmt.Errorf("%w: xz compression; want tar, gzip or zstd", ErrUnsupported)
	case len(head) == 0, looksLikeTar(head):
		s.next = readBlocks(br)
	default:
		return fmt.Errorf("%w: unknown compression: layer begins with %x; want tar, gzip or zstd", ErrUnsupported, head[:min(8, len(head))])
	}
	return nil
}

// isSkippableFrame reports a zstd skippable frame, which may come first (zstd:chunked, pzstd).
func isSkippableFrame(head []byte) bool {
	return len(head) >= 4 && head[0]&0xf0 == 0x50 && head[1] == 0x2a && head[2] == 0x4d && head[3] == 0x18
}

// looksLikeTar accepts a header of any tar since v7, and the zeros of an empty tar.
func looksLikeTar(head []byte) bool {
	if len(head) < tarMagicOffset+5 {
		return false
	}
	if string(head[tarMagicOffset:tarMagicOffset+5]) == "ustar" {
		return true
	}
	if len(bytes.TrimLeft(head, "\x00")) == 0 {
		return true
	}
	// v7: the checksum field holds octal digits, spaces and NULs only.
	const sum, sumLen = 148, 8
	digits := bytes.Trim(head[sum:sum+sumLen], " \x00")
	return len(digits) > 0 && len(bytes.Trim(digits, "01234567")) == 0 && head[0] != 0
}

// readBlocks returns r's bytes in blocks; an error comes after the bytes before it.
func readBlocks(r io.Reader) func() ([]byte, error) {
	buf := make([]byte, plainBuffer)
	var err error
	return func() ([]byte, error) {
		n := 0
		for n < len(buf) && err == nil {
			var m int
			m, err = r.Read(buf[n:])
			n += m
		}
		if n > 0 {
			return buf[:n], nil
		}
		return nil, err
	}
}

// Read returns bytes of the tar. Its last error says what was wrong with the stored bytes
// when they are at fault, whatever the decompressor made of them.
func (s *layerStream) Read(p []byte) (int, error) {
	if s.ref != nil {
		return s.readRef(p)
	}
	if len(s.buf) == 0 {
		if err := s.more(); err != nil {
			return 0, err
		}
	}
	n := copy(p, s.buf)
	s.buf = s.buf[n:]
	return n, nil
}

// more decompresses and hashes the next bytes of the tar.
func (s *layerStream) more() error {
	if s.done {
		return io.EOF
	}
	var err error
	s.buf, err = s.next()
	switch {
	case err == nil:
		s.diffHash.Write(s.buf) // never fails
		if s.known != nil {
			s.log.add(s.size, s.known())
		}
		s.size += int64(len(s.buf))
		return nil
	case errors.Is(err, io.EOF):
		s.done = true
		return io.EOF
	}
	return s.blame(err)
}

// blame finds the deeper reason of a failed decompression: bytes that are not those of the
// descriptor. It reads the stored bytes to their end for that, which their size bounds.
func (s *layerStream) blame(err error) error {
	if s.stored.err == nil {
		_, _ = io.Copy(io.Discard, s.stored) // what it finds stays in s.stored.err
	}
	if stored := s.stored.err; stored != nil && !errors.Is(stored, io.EOF) {
		if errors.Is(err, stored) {
			return stored
		}
		return fmt.Errorf("%w (%w)", stored, err)
	}
	switch {
	case errors.Is(err, ErrInvalid), errors.Is(err, ErrUnsupported):
		return err
	case s.size == 0 && errors.Is(err, gunzip.ErrHeader):
		return fmt.Errorf("%w: decompress: broken gzip header", ErrInvalid)
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("%w: decompress: %w; at most %d bytes of window", ErrUnsupported, err, maxWindow)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: decompress: the compressed stream is cut off after %d bytes of tar", ErrInvalid, s.size)
	case s.size > 0 && (errors.Is(err, gunzip.ErrHeader) || errors.Is(err, zstd.ErrMagicMismatch)):
		return fmt.Errorf("%w: decompress: garbage behind the compressed stream, after %d bytes of tar: %w", ErrInvalid, s.size, err)
	}
	return fmt.Errorf("%w: decompress: %w", ErrInvalid, err)
}

// finish reads what follows the end of the archive and compares size and digests.
func (s *layerStream) finish() error {
	for !s.done {
		if err := s.more(); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	if _, err := io.Copy(io.Discard, s.stored); err != nil {
		return err
	}
	if got := digest.NewDigest(s.diffWant.Algorithm(), s.diffHash); got != s.diffWant {
		return fmt.Errorf("%w: diff ID of the tar is %s, the config says %s", ErrDigest, got, s.diffWant)
	}
	return nil
}

// place returns how many bytes of the tar were read.
func (s *layerStream) place() int64 { return s.size - int64(len(s.buf)) }

// Close closes the layer's source. It may overlap a Read, which then fails.
func (s *layerStream) Close() error { return s.close() }

// storedReader hashes and counts the stored bytes of a layer. At the end it fails unless
// they are those of the descriptor.
type storedReader struct {
	r    io.Reader
	h    hash.Hash // nil: r verifies
	want digest.Digest
	size int64 // bytes the descriptor says
	n    int64 // bytes read
	done func() error
	err  error // sticky
}

func (s *storedReader) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	// One byte more than there may be tells an oversized layer from one that is right.
	if left := s.size - s.n + 1; int64(len(p)) > left {
		p = p[:max(left, 1)]
	}
	n, err := s.r.Read(p)
	s.n += int64(n)
	if s.h != nil {
		s.h.Write(p[:n]) // never fails
	}
	switch {
	case s.n > s.size:
		s.err = fmt.Errorf("%w: the layer has more bytes than the %d of its descriptor", ErrInvalid, s.size)
		return 0, s.err
	case err == nil:
		return n, nil
	case errors.Is(err, io.EOF):
		s.err = s.verdict()
	default:
		s.err = fmt.Errorf("read layer after %d of %d bytes: %w", s.n, s.size, err)
		if ctxErr := s.done(); ctxErr != nil {
			s.err = ctxErr
		}
	}
	return n, s.err
}

// verdict is io.EOF for a layer that is what its descriptor says.
func (s *storedReader) verdict() error {
	if s.n < s.size {
		return fmt.Errorf("%w: the layer ends after %d bytes, its descriptor says %d", ErrInvalid, s.n, s.size)
	}
	if s.h == nil {
		return io.EOF
	}
	if got := digest.NewDigest(s.want.Algorithm(), s.h); got != s.want {
		return fmt.Errorf("%w: the layer's bytes have %s, its descriptor says %s", ErrDigest, got, s.want)
	}
	return io.EOF
}
