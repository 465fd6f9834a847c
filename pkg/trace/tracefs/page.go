package tracefs

import (
	"encoding/binary"
	"fmt"
	"math"
)

// Bits of a page's commit word. Source: kernel/trace/ring_buffer.c RB_MISSED_EVENTS,
// RB_MISSED_STORED and the mask of rb_page_size.
const (
	missedEvents = 1 << 31          // events are missing before this page
	missedStored = 1 << 30          // and how many stands behind the data
	commitMask   = missedStored - 1 // bytes of data
)

// Values of type_len in the head of a record; those from 1 to 28 are lengths in units of
// 4 bytes, 0 means that the length stands in the word behind.
// Source: include/linux/ring_buffer.h enum ring_buffer_type.
const (
	typePadding    = 29 // a record that was taken back, or the unused rest of a page
	typeTimeExtend = 30 // upper bits of a time difference
	typeTimeStamp  = 31 // an absolute time
)

const (
	headSize  = 4  // bytes of a record's head: type_len:5, time_delta:27
	deltaBits = 27 // of time_delta; source: kernel/trace/ring_buffer.c TS_SHIFT
	stampBits = 32 + deltaBits
	stampMask = 1<<stampBits - 1
	maxOrder  = 40          // of an inserted folio; no page cache has larger ones
	unknown   = math.MaxInt // how many events are missing is not known
)

// pageInfo is what a page says besides its events.
type pageInfo struct {
	missed  int // events that are missing before this page; unknown when the page does not say
	skipped int // records of kinds that the layout does not have
}

// decodePage appends the events of one page of a ring buffer, as trace_pipe_raw yields it,
// to events, in order, and returns the longer slice. A page that contradicts itself or the
// layout is [ErrInvalid], and events is returned as it was. It looks at nothing but its
// arguments and keeps none of them. Safe for concurrent use.
// Source: kernel/trace/ring_buffer.c rb_event_length, rb_update_read_stamp, ring_buffer_read_page.
func (l *layout) decodePage(events []Event, page []byte) ([]Event, pageInfo, error) {
	var info pageInfo
	if len(page) < l.data {
		return events, info, fmt.Errorf("%w: page of %d bytes, want at least %d", ErrInvalid, len(page), l.data)
	}
	now := l.stamp.get(page)
	commit := l.commit.get(page)
	size := commit & commitMask
	body := page[l.data:]
	if size > uint64(len(body)) {
		return events, info, fmt.Errorf("%w: page has %d bytes of data, room for %d", ErrInvalid, size, len(body))
	}
	if commit&missedEvents != 0 {
		info.missed = unknown
		if rest := body[size:]; commit&missedStored != 0 && len(rest) >= 8 {
			if n := binary.NativeEndian.Uint64(rest); n < math.MaxInt32 {
				info.missed = int(n)
			}
		}
	}
	c := cursor{layout: l, body: body[:size], now: now, events: events}
	for c.at < len(c.body) {
		if err := c.record(); err != nil {
			return events, pageInfo{}, fmt.Errorf("%w at byte %d of the page", err, l.data+c.at)
		}
	}
	info.skipped = c.skipped
	return c.events, info, nil
}

// cursor walks the records of one page.
type cursor struct {
	*layout
	body    []byte
	at      int    // offset of the next record in body
	now     uint64 // time of the last record
	events  []Event
	skipped int
}

// splitHead returns the bit fields of a record's head, whose place depends on the byte order.
func splitHead(head []byte) (typeLen int, delta uint64) {
	v := binary.NativeEndian.Uint32(head)
	if bigEndian {
		return int(v >> deltaBits), uint64(v & (1<<deltaBits - 1))
	}
	return int(v & 31), uint64(v >> 5)
}

// bigEndian tells the machine's byte order.
var bigEndian = binary.NativeEndian.Uint16([]byte{0, 1}) == 1

// record handles the record at c.at and moves behind it.
func (c *cursor) record() error {
	rest := c.body[c.at:]
	if len(rest) < headSize {
		return fmt.Errorf("%w: %d bytes left, want a record's head of %d", ErrInvalid, len(rest), headSize)
	}
	typeLen, delta := splitHead(rest)
	if typeLen == typePadding && delta == 0 {
		c.at = len(c.body) // nothing else follows
		return nil
	}
	data, length := headSize, headSize+4*typeLen
	var word uint64
	if typeLen == 0 || typeLen >= typePadding {
		if len(rest) < 2*headSize {
			return fmt.Errorf("%w: %d bytes left, want the second word of a record", ErrInvalid, len(rest))
		}
		word = uint64(binary.NativeEndian.Uint32(rest[headSize:]))
		data, length = 2*headSize, 2*headSize
	}
	switch typeLen {
	case typeTimeExtend:
		c.now += word<<deltaBits + delta
	case typeTimeStamp:
		c.stamp(word<<deltaBits + delta)
	case 0, typePadding:
		if word < 4 || word > uint64(len(rest)) || int(word) > len(rest)-headSize {
			return fmt.Errorf("%w: record of %d bytes, %d left", ErrInvalid, word, len(rest)-headSize)
		}
		length = headSize + int(word)
		c.now += delta
	default:
		c.now += delta
	}
	if length > len(rest) {
		return fmt.Errorf("%w: record of %d bytes, %d left", ErrInvalid, length, len(rest))
	}
	if typeLen < typePadding {
		if err := c.event(rest[data:length]); err != nil {
			return err
		}
	}
	c.at += length
	return nil
}

// stamp sets the time to one that lacks the upper bits. Source: rb_fix_abs_ts.
func (c *cursor) stamp(abs uint64) {
	abs |= c.now &^ stampMask
	if abs < c.now {
		abs += 1 << stampBits
	}
	c.now = abs
}

// event appends the event of one record's data.
func (c *cursor) event(data []byte) error {
	if len(c.records) == 0 || len(data) < c.kind.offset+c.kind.size {
		c.skipped++
		return nil
	}
	r, ok := c.records[uint16(c.kind.get(data))] //nolint:gosec // add allows two bytes only
	if !ok {
		c.skipped++
		return nil
	}
	if len(data) < r.size {
		return fmt.Errorf("%w: %s of %d bytes, want %d", ErrInvalid, r.kind, len(data), r.size)
	}
	if c.now > math.MaxInt64 {
		return fmt.Errorf("%w: time %d", ErrInvalid, c.now)
	}
	e := Event{Kind: r.kind, PID: int32(r.pid.get(data)), Time: int64(c.now)} //nolint:gosec // a pid has 32 bits
	switch r.kind {
	case Fork, Exec:
		e.Other = int32(r.fields[1].get(data)) //nolint:gosec // a pid has 32 bits
		fallthrough
	case Wait:
		c.events = append(c.events, e)
		return nil
	default:
	}
	e.Device = uint32(r.fields[0].get(data)) //nolint:gosec // dev_t has 32 bits
	e.Inode, e.First = r.fields[1].get(data), r.fields[2].get(data)
	e.Last = e.First
	switch r.kind {
	case Read, Around:
		e.Last = r.fields[3].get(data)
		if r.kind == Read && c.readsOneMore && e.Last > e.First {
			e.Last--
		}
	case Insert:
		order := r.fields[3].get(data)
		if order > maxOrder || e.First > math.MaxUint64-1<<order {
			return fmt.Errorf("%w: %s at page %d of order %d", ErrInvalid, r.kind, e.First, order)
		}
		e.Last += 1<<order - 1
	}
	if e.Last < e.First {
		c.skipped++ // a read of no bytes at the start of a page
		return nil
	}
	c.events = append(c.events, e)
	return nil
}
