package server

import "math/bits"

// blockLen is how many values of a [blocks] are allocated at once.
const blockLen = 512

// blocks is a list whose values never move: it grows without a copy of what it has, so that its peak
// is its size. Without pointers in T the collector does not look into it.
type blocks[T any] struct {
	list []*[blockLen]T
	n    uint32
}

// add appends a value and returns its number.
func (b *blocks[T]) add(v T) uint32 {
	if b.n%blockLen == 0 {
		b.list = append(b.list, new([blockLen]T))
	}
	i := b.n
	b.n++
	*b.at(i) = v
	return i
}

// at returns the value with a number below b.n; the pointer stays valid.
func (b *blocks[T]) at(i uint32) *T { return &b.list[i/blockLen][i%blockLen] }

// index finds numbers by keys that somebody else keeps: 4 bytes a slot, and a third to two
// thirds of the slots are in use.
type index struct {
	slots []uint32 // a number plus 1; 0: free. A power of two of them
	n     int
}

// minSlots is how many slots an index begins with.
const minSlots = 1 << 8

// find returns the number with a key, which is what is is about; false: none.
func (x *index) find(key uint64, is func(i uint32) bool) (uint32, bool) {
	if x.n == 0 {
		return 0, false
	}
	for at := x.start(key); x.slots[at] != 0; at = (at + 1) & (len(x.slots) - 1) {
		if i := x.slots[at] - 1; is(i) {
			return i, true
		}
	}
	return 0, false
}

// add adds number i, which has a key that is not there yet; keyOf tells the keys of all numbers.
func (x *index) add(i uint32, keyOf func(i uint32) uint64) {
	if 3*(x.n+1) > 2*len(x.slots) {
		old := x.slots
		x.slots = make([]uint32, max(minSlots, 2*len(old)))
		for _, s := range old {
			if s != 0 {
				x.put(s-1, keyOf(s-1))
			}
		}
	}
	x.put(i, keyOf(i))
	x.n++
}

func (x *index) put(i uint32, key uint64) {
	at := x.start(key)
	for x.slots[at] != 0 {
		at = (at + 1) & (len(x.slots) - 1)
	}
	x.slots[at] = i + 1
}

// start is the first slot to look at. Inode numbers are often dense, and their high bits those of a
// device: the upper bits of a product with an odd number depend on all of them.
func (x *index) start(key uint64) int {
	const golden = 0x9e3779b97f4a7c15 // 2^64 over the golden ratio
	hi, lo := bits.Mul64(key^key>>32, golden)
	return int((hi ^ lo>>32) & uint64(len(x.slots)-1)) //nolint:gosec // below len(x.slots)
}
