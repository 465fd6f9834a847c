package rafs

import (
	"errors"
	"fmt"
)

// The classes of errors about an image's bytes; test with [errors.Is].
var (
	// ErrInvalid: the bytes break the format, or an [Image] cannot be expressed in it.
	ErrInvalid = errors.New("rafs: invalid")
	// ErrUnsupported: the bytes may be fine, but use a feature that this package does not have.
	ErrUnsupported = errors.New("rafs: unsupported")
	// ErrDigest: bytes differ from their digest.
	ErrDigest = errors.New("rafs: digest mismatch")
	// ErrNoChunks: [BlobWriter.Close] was called before any chunk was appended; a blob
	// without chunks cannot be described by a v6 bootstrap.
	ErrNoChunks = errors.New("rafs: blob without chunks")
	// ErrNoBootstrap: a blob that [ReadInline] was given holds no bootstrap.
	ErrNoBootstrap = errors.New("rafs: blob without bootstrap")
)

// FormatError says where in an image a fault is, what was found and what was wanted.
// It unwraps to [ErrInvalid], [ErrUnsupported] or [ErrDigest].
type FormatError struct {
	Class   error  // one of the sentinels
	Section string // "superblock", "blob table", "inode", …, with its index or path where one exists
	Offset  int64  // byte offset in the bootstrap or blob; -1 when there is none
	Field   string
	Got     any
	Want    any // nil when there is no single value to name
}

// Error gives the fault in one line.
func (e *FormatError) Error() string {
	s := e.Class.Error() + ": " + e.Section
	if e.Offset >= 0 {
		s += fmt.Sprintf(" at byte %d", e.Offset)
	}
	s += ": " + e.Field
	if e.Got != nil {
		s += fmt.Sprintf(" is %v", e.Got)
	}
	if e.Want != nil {
		s += fmt.Sprintf(", want %v", e.Want)
	}
	return s
}

// Unwrap returns the class.
func (e *FormatError) Unwrap() error { return e.Class }

// invalid is a shorthand for a FormatError of class ErrInvalid.
func invalid(section string, offset int64, field string, got, want any) error {
	return &FormatError{Class: ErrInvalid, Section: section, Offset: offset, Field: field, Got: got, Want: want}
}

// unsupported is a shorthand for a FormatError of class ErrUnsupported.
func unsupported(section string, offset int64, field string, got, want any) error {
	return &FormatError{Class: ErrUnsupported, Section: section, Offset: offset, Field: field, Got: got, Want: want}
}
