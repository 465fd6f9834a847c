package zstdenc

import "bytes"

// Which chunks take the matches they come with; from measurements with images of Debian, Python, nginx, node, a JDK and Go,
// where they cost 1 % in size.
const (
	// lostShift: matches that reach behind the start of the chunk are lost. They may make
	// up a quarter of it. An eighth takes 0.1 to 0.4 % fewer bytes, and more searches.
	lostShift = 2
	// foundShift: a chunk of which less than a quarter is matches does not compress, or its
	// deflate encoder did not try.
	foundShift = 2

	// reach is how many bytes back the matches of a deflate stream begin at most. Source: RFC 1951 section 3.2.5.
	reach = 32 << 10
	// farShift: a chunk takes no matches where more than a 32nd of it is seen to repeat what lies further back. Of the
	// bytes of a JDK 27 % are in such chunks, of node 15, of Python 9, of Go 5; a search of them saves 3.6, 1.5, 1.1 and 0.2 % of what is
	// stored, one of all chunks 4.7, 2.5, 1.3 and 1.6 %.
	farShift = 5
	seenBits = 13 // log2 of the entries of Encoder.seen
	seenSkip = 2  // log2 of how many matches one is looked at of
)

// worthUsing reports whether matches are about as good as what the finder would find in a
// chunk of size bytes, as far back as they reach.
func worthUsing(matches []Match, size int) bool {
	lost, found := 0, 0
	for _, m := range matches {
		if uint32(m.Back) > m.Pos {
			lost += int(m.Length)
		} else {
			found += int(m.Length)
		}
	}
	return lost <= size>>lostShift && found >= size>>foundShift && found > 0
}

// repeatsFar reports whether much of src repeats what lies further back than the matches of a deflate stream reach, and a
// search will find. It looks where some matches begin, those whose first bytes have a certain hash: what is repeated was likely
// cut into the same matches before.
func (e *Encoder) repeatsFar(src []byte, matches []Match) bool {
	if len(src) <= 2*reach {
		return false
	}
	clear(e.seen[:])
	far, end := 0, 0 // bytes that repeat, and where the last of them ended
	for _, m := range matches {
		i := int(m.Pos)
		if i+longString > len(src) {
			break
		}
		v := load64(src, i)
		h := hashLong(v)
		if h>>(64-seenBits-seenSkip)&(1<<seenSkip-1) != 0 {
			continue
		}
		last := &e.seen[h>>(64-seenBits)]
		at := int(*last) - 1
		*last = uint32(i + 1) //nolint:gosec // at most MaxSize
		if at < 0 || at+reach >= i || i < end || load64(src, at) != v {
			continue
		}
		n := longString + matchLen(src, at+longString, i+longString)
		if far, end = far+n, i+n; far > len(src)>>farShift {
			return true
		}
	}
	return false
}

// take makes sequences and literals of src from start on out of matches, as far as they
// are right, and returns those that are needed after it.
func (b *block) take(src []byte, start int, reps *reps, matches []Match) []Match {
	anchor, end := start, len(src)
	for len(matches) > 0 {
		m := matches[0]
		at, to := int(m.Pos), int(m.Pos)+int(m.Length)
		if at >= end {
			break
		}
		// A long repetition is many matches, each of at most 258 bytes.
		next := 1
		for next < len(matches) && to < end && matches[next].Back == m.Back && int(matches[next].Pos) == to {
			to += int(matches[next].Length)
			next++
		}
		at = max(at, anchor)
		if n := min(to, end) - at; n >= minMatch && m.Back > 0 && int(m.Back) <= at && equal(src, at-int(m.Back), at, n) {
			b.add(src, anchor, at, n, reps.use(uint32(m.Back), at > anchor))
			anchor = at + n
		}
		if to > end {
			matches = matches[next-1:]
			break
		}
		matches = matches[next:]
	}
	b.literals = append(b.literals, src[anchor:]...)
	if len(matches) == 0 {
		matches = []Match{} // not nil: the chunk's other blocks have none
	}
	return matches
}

// equal reports whether n bytes from a and from b on are the same; a < b, n > 0.
func equal(src []byte, a, b, n int) bool {
	for ; n > 8 && b+16 <= len(src); a, b, n = a+8, b+8, n-8 {
		if load64(src, a) != load64(src, b) {
			return false
		}
	}
	if n <= 8 && b+8 <= len(src) {
		return (load64(src, a)^load64(src, b))<<((64-8*uint(n))&63) == 0 // from 1 to 8
	}
	return bytes.Equal(src[a:a+n], src[b:b+n])
}

// use returns the coded form of an offset and makes it the last one used. Without literals
// before the match the codes mean the next offsets. Source: RFC 8878 section 3.1.1.5.
func (r *reps) use(offset uint32, literals bool) uint32 {
	switch {
	case offset == r[0] && literals:
		return 1
	case offset == r[1]:
		r[0], r[1] = r[1], r[0]
		if literals {
			return 2
		}
		return 1
	case offset == r[2]:
		r[0], r[1], r[2] = r[2], r[0], r[1]
		if literals {
			return 3
		}
		return 2
	}
	r[0], r[1], r[2] = offset, r[0], r[1]
	return offset + repeats
}
