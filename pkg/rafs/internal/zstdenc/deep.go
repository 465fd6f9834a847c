package zstdenc

import "math/bits"

// deepFinder finds longer matches than finder, in more time: it looks at many earlier places with the same
// 4 bytes, the nearest first, and at what the next bytes would find before it settles on a match.
//
// Places are positions in the frame plus 1, so that 0 is none. Of a chain, the places above the
// last chainSize bytes are known; what is further back is found by its 8 bytes alone.
type deepFinder struct {
	head  [1 << headBits]uint32     // by the hash of 4 bytes: the last place
	long  [1 << farBits]uint32      // by the hash of 8 bytes: the last place
	chain [chainSize]uint32         // by place: the one before it with the hash of its 4 bytes
	next  int                       // first position that is not entered yet
	shift struct{ head, far uint8 } // make an index of a hash
}

const (
	headBits  = 17
	farBits   = 17
	chainSize = 1 << 20

	// tries are the places of a chain that are looked at. In a Go executable 4 take 0.5 % more bytes and three quarters of the
	// time, 14 take 0.3 % less and half as much time again (BenchmarkEncode).
	tries = 6

	// enough bytes of a match end the search for a better one.
	enough = 256

	// deepSkipShift: as skipShift, for a finder that is in no hurry.
	deepSkipShift = 8

	headPrime = 0x9E3779B1 // the fraction of the golden ratio, in 32 bits
)

// candidate is a match that might be taken.
type candidate struct {
	n      int // bytes
	offset int
	score  int // see score; above 0 where there is a match
}

// begin prepares for a frame of size bytes.
func (f *deepFinder) begin(size int) {
	log := max(leastBits, bits.Len(uint(size)))
	head, far := min(headBits, log), min(farBits, log)
	clear(f.head[:1<<head])
	clear(f.long[:1<<far])
	f.shift.head, f.shift.far = uint8(32-head), uint8(64-far) // 15 to 22, 47 to 54
	f.next = 0
}

func (f *deepFinder) headAt(v uint32) *uint32 {
	return &f.head[v*headPrime>>(f.shift.head&31)&(1<<headBits-1)]
}

func (f *deepFinder) farAt(v uint64) *uint32 {
	return &f.long[hashLong(v)>>(f.shift.far&63)&(1<<farBits-1)]
}

// enter puts all positions below i into the tables.
func (f *deepFinder) enter(src []byte, i int) {
	for p := f.next; p < i; p++ {
		v := load64(src, p)
		h := f.headAt(uint32(v)) //nolint:gosec // cut on purpose
		f.chain[p&(chainSize-1)] = *h
		*h = uint32(p + 1) //nolint:gosec // at most MaxSize
		*f.farAt(v) = *h
	}
	f.next = max(f.next, i)
}

// score says what a match of n bytes with the value that its offset is coded by saves: four for a byte, less the bits of
// the offset.
func score(n int, coded uint32) int { return 4*n - bits.Len32(coded) }

// best returns the best match at i, whose position and those before are entered then; n is 0 where there is none.
func (f *deepFinder) best(src []byte, i int, reps *reps) (c candidate) {
	v := load64(src, i)
	for k, r := range reps {
		at := i - int(r)
		if at < 0 || load32(src, at) != uint32(v) { //nolint:gosec // cut on purpose
			continue
		}
		n := 4 + matchLen(src, at+4, i+4)
		if s := score(n, uint32(k+1)); s > c.score {
			c = candidate{n, int(r), s}
		}
	}
	f.enter(src, i)
	head, far := f.headAt(uint32(v)), f.farAt(v) //nolint:gosec // cut on purpose
	at, distant := int(*head)-1, int(*far)-1
	f.chain[i&(chainSize-1)] = *head
	*head = uint32(i + 1) //nolint:gosec // at most MaxSize
	*far = *head
	f.next = i + 1
	if c.n >= enough {
		return c
	}
	longest := max(c.n, 3)
	if distant >= 0 && load64(src, distant) == v {
		n := 8 + matchLen(src, distant+8, i+8)
		if s := score(n, uint32(i-distant)+repeats); s > c.score { //nolint:gosec // at most MaxSize
			c = candidate{n, i - distant, s}
		}
		longest = max(longest, n)
	}
	for range tries {
		if at < 0 || i-at >= chainSize || i+longest >= len(src) || longest >= enough {
			break
		}
		// A longer one has the same last 4 bytes.
		if load32(src, at+longest-3) == load32(src, i+longest-3) {
			if n := matchLen(src, at, i); n > longest {
				longest = n
				if s := score(n, uint32(i-at)+repeats); s > c.score { //nolint:gosec // at most MaxSize
					c = candidate{n, i - at, s}
				}
			}
		}
		at = int(f.chain[at&(chainSize-1)]) - 1
	}
	return c
}

// find makes sequences and literals of src from start on; matches begin anywhere before.
func (f *deepFinder) find(src []byte, start int, reps *reps, out *block) {
	anchor, i, limit := start, start, len(src)-lookahead
	for i < limit {
		c := f.best(src, i, reps)
		if c.n == 0 {
			i += (i-anchor)>>deepSkipShift + 1
			continue
		}
		i, c = f.settle(src, i, limit, c, reps)
		at := i - c.offset
		for at > 0 && i > anchor && src[at-1] == src[i-1] {
			at, i, c.n = at-1, i-1, c.n+1
		}
		out.add(src, anchor, i, c.n, reps.use(uint32(c.offset), i > anchor)) //nolint:gosec // at most MaxSize
		i += c.n
		anchor = i
		f.enter(src, min(i, limit))
	}
	out.literals = append(out.literals, src[anchor:]...)
}

// settle returns c, the match at i, or a better one of the next bytes, and where it begins.
func (f *deepFinder) settle(src []byte, i, limit int, c candidate, reps *reps) (int, candidate) {
	// What has to be gained for one literal more, and for two.
	const first, second = 4, 7
	for c.n < enough {
		if i+2 >= limit {
			break
		}
		if d := f.best(src, i+1, reps); d.score > c.score+first {
			i, c = i+1, d
			continue
		}
		d := f.best(src, i+2, reps)
		if d.score <= c.score+second {
			break
		}
		i, c = i+2, d
	}
	return i, c
}
