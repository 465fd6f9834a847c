package tracefs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// ErrInvalid is returned for what the kernel says that this package cannot make sense of:
// a description of a format, or a page of a ring buffer that contradicts it.
var ErrInvalid = errors.New("invalid trace data")

// maxRecord bounds the offsets that a format may name, in bytes: no record is larger than
// a sub-buffer, and none of those is larger than this (64 pages of 64 KiB; kernel/trace/trace.c
// buffer_subbuf_size_write allows orders of 7).
const maxRecord = 8 << 20

// field is where an integer lies in a record.
type field struct {
	offset, size int // bytes; size 0: the record has no such field
	signed       bool
}

// format is a parsed description of a record: events/SYSTEM/NAME/format or events/header_page.
type format struct {
	id     uint16 // common_type of the event; 0 in header_page
	fields map[string]field
}

// parseFormat parses the text of a format file. Fields are named as the kernel does,
// without the brackets of arrays. It returns [ErrInvalid] when a field line does not have
// offset, size and sign, or one has them out of bounds. Safe for concurrent use.
// Source: kernel/trace/trace_events.c f_show, kernel/trace/ring_buffer.c
// ring_buffer_print_page_header.
func parseFormat(text []byte) (*format, error) {
	f := &format{fields: map[string]field{}}
	for line := range bytes.Lines(text) {
		s := strings.TrimSpace(string(line))
		if rest, ok := strings.CutPrefix(s, "ID:"); ok {
			id, err := strconv.ParseUint(strings.TrimSpace(rest), 10, 16)
			if err != nil {
				return nil, fmt.Errorf("%w: format: id %q: want a number of 16 bits", ErrInvalid, rest)
			}
			f.id = uint16(id)
			continue
		}
		if !strings.HasPrefix(s, "field:") {
			continue
		}
		name, fd, err := parseField(s)
		if err != nil {
			return nil, err
		}
		f.fields[name] = fd
	}
	if len(f.fields) == 0 {
		return nil, fmt.Errorf("%w: format: no field in %d bytes", ErrInvalid, len(text))
	}
	return f, nil
}

// parseField parses "field:unsigned long i_ino;	offset:8;	size:8;	signed:0;".
func parseField(line string) (string, field, error) {
	fail := func(what string) error {
		return fmt.Errorf("%w: format: %s in %q", ErrInvalid, what, line)
	}
	var f field
	var name string
	seen := 0
	for part := range strings.SplitSeq(line, ";") {
		key, value, ok := strings.Cut(strings.TrimSpace(part), ":")
		if !ok {
			continue
		}
		value = strings.TrimSpace(value)
		if key == "field" {
			decl, _, _ := strings.Cut(value, "[")
			words := strings.Fields(decl)
			if len(words) == 0 {
				return "", field{}, fail("no name")
			}
			name = words[len(words)-1]
			continue
		}
		n, err := strconv.Atoi(value)
		if err != nil || n < 0 || n > maxRecord {
			return "", field{}, fail(key + " out of bounds")
		}
		seen++
		switch key {
		case "offset":
			f.offset = n
		case "size":
			f.size = n
		case "signed":
			f.signed = n != 0
		}
	}
	if name == "" || seen < 3 {
		return "", field{}, fail("no offset, size and sign")
	}
	return name, f, nil
}

// integer returns the field called name, which must hold 1, 2, 4 or 8 bytes.
func (f *format) integer(name string) (field, error) {
	fd, ok := f.fields[name]
	if !ok {
		return field{}, fmt.Errorf("%w: format: no field %s", ErrInvalid, name)
	}
	switch fd.size {
	case 1, 2, 4, 8:
		return fd, nil
	}
	return field{}, fmt.Errorf("%w: format: field %s of %d bytes, want an integer", ErrInvalid, name, fd.size)
}

// get returns the integer at f in record, extended to 64 bits, and 0 for no field. The
// caller has checked that record is long enough. Records are in the machine's byte order.
func (f field) get(record []byte) uint64 {
	b := record[f.offset : f.offset+f.size]
	switch f.size {
	case 1:
		if f.signed {
			return uint64(int64(int8(b[0]))) //nolint:gosec // sign extension
		}
		return uint64(b[0])
	case 2:
		v := binary.NativeEndian.Uint16(b)
		if f.signed {
			return uint64(int64(int16(v))) //nolint:gosec // sign extension
		}
		return uint64(v)
	case 4:
		v := binary.NativeEndian.Uint32(b)
		if f.signed {
			return uint64(int64(int32(v))) //nolint:gosec // sign extension
		}
		return uint64(v)
	case 8:
		return binary.NativeEndian.Uint64(b)
	}
	return 0
}

// record is how to read the records of one kind.
type record struct {
	kind   Kind
	size   int // bytes that the fields need
	pid    field
	fields [maxFields]field
}

// layout is how to read the pages of one tracefs. It is immutable, hence safe for
// concurrent use.
type layout struct {
	stamp, commit field
	data          int // offset of the first record, bytes
	size          int // of a page, bytes
	kind          field
	records       map[uint16]record
	readsOneMore  bool // Last of a Read is one page too far
}

// newLayout returns the layout that events/header_page describes, without any event.
// It returns [ErrInvalid] where the text does not describe a page.
func newLayout(headerPage []byte) (*layout, error) {
	f, err := parseFormat(headerPage)
	if err != nil {
		return nil, fmt.Errorf("header_page: %w", err)
	}
	l := &layout{records: map[uint16]record{}}
	if l.stamp, err = f.integer("timestamp"); err != nil {
		return nil, fmt.Errorf("header_page: %w", err)
	}
	if l.commit, err = f.integer("commit"); err != nil {
		return nil, fmt.Errorf("header_page: %w", err)
	}
	data, ok := f.fields["data"]
	if !ok || l.stamp.size != 8 || l.commit.size < 4 || data.offset < l.stamp.offset+l.stamp.size ||
		data.offset < l.commit.offset+l.commit.size || data.size < minData {
		return nil, fmt.Errorf("%w: header_page: %v", ErrInvalid, f.fields)
	}
	l.data, l.size = data.offset, data.offset+data.size
	return l, nil
}

// minData is the least data that a page may have, in bytes.
const minData = 64

// add makes the layout read the records that a format file describes as events of kind k.
func (l *layout) add(k Kind, text []byte) error {
	f, err := parseFormat(text)
	if err != nil {
		return fmt.Errorf("%s: %w", k, err)
	}
	kind, err := f.integer("common_type")
	if err != nil {
		return fmt.Errorf("%s: %w", k, err)
	}
	if kind.size != 2 || f.id == 0 || len(l.records) > 0 && kind != l.kind {
		return fmt.Errorf("%w: %s: id %d in %+v", ErrInvalid, k, f.id, kind)
	}
	r := record{kind: k, size: kind.offset + kind.size}
	if r.pid, err = f.integer("common_pid"); err != nil {
		return fmt.Errorf("%s: %w", k, err)
	}
	r.size = max(r.size, r.pid.offset+r.pid.size)
	for i, name := range tracepoints[k].fields {
		if name == "" || i >= tracepoints[k].optional && f.fields[name].size == 0 {
			continue
		}
		if r.fields[i], err = f.integer(name); err != nil {
			return fmt.Errorf("%s: %w", k, err)
		}
		r.size = max(r.size, r.fields[i].offset+r.fields[i].size)
	}
	l.kind = kind
	l.records[f.id] = r
	return nil
}
