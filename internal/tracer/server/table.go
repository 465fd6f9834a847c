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

// index finds numbers by keys that somebody else keeps. A slot is 8 bytes, half of them of the key's hash, so that what
// is looked at elsewhere is what is meant, mostly; a third to two thirds of the slots are in use.
type index struct {
	slots []slot // a power of two of them
	n     int
}

type slot struct {
	number uint32 // plus 1; 0: free
	hash   uint32
}

// minSlots is how many slots an index begins with.
const minSlots = 1 << 8

// find returns the number with a key, which is what is is about; false: none.
func (x *index) find(key uint64, is func(i uint32) bool) (uint32, bool) {
	if x.n == 0 {
		return 0, false
	}
	hash := hashOf(key)
	for at := x.start(hash); x.slots[at].number != 0; at = (at + 1) & (len(x.slots) - 1) {
		if s := x.slots[at]; s.hash == hash && is(s.number-1) {
			return s.number - 1, true
		}
	}
	return 0, false
}

// add adds number i, which has a key that is not there yet.
func (x *index) add(i uint32, key uint64) {
	if 3*(x.n+1) > 2*len(x.slots) {
		old := x.slots
		x.slots = make([]slot, max(minSlots, 2*len(old)))
		for _, s := range old {
			if s.number != 0 {
				x.put(s)
			}
		}
	}
	x.put(slot{number: i + 1, hash: hashOf(key)})
	x.n++
}

func (x *index) put(s slot) {
	at := x.start(s.hash)
	for x.slots[at].number != 0 {
		at = (at + 1) & (len(x.slots) - 1)
	}
	x.slots[at] = s
}

// start is the first slot to look at.
func (x *index) start(hash uint32) int { return int(hash) & (len(x.slots) - 1) }

// hashOf mixes a key. Inode numbers are often dense, and their high bits those of a device: the middle bits of a
// product with an odd number depend on all of them.
func hashOf(key uint64) uint32 {
	const golden = 0x9e3779b97f4a7c15 // 2^64 over the golden ratio
	hi, lo := bits.Mul64(key^key>>32, golden)
	return uint32(hi ^ lo>>32) //nolint:gosec // the low half is meant
}
