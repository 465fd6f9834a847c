// Package ordinal finds the number of a pointer in a list that has each pointer once. An image
// has one inode per file, and a map of a million pointers takes 35 MB; an [Index] takes 8.
package ordinal

import "hash/maphash"

// Index finds the places of pointers in a list, which it does not hold. It takes 5 to 11 bytes a
// pointer. The zero value is of no use: see [New]. Not safe for concurrent use.
type Index[T any] struct {
	seed  maphash.Seed
	slots []uint32 // 1 + place, 0: free; a power of two of them, at most ¾ taken
	count int
	at    func(place int) *T
}

// New returns an empty index of a list, of which at gives the pointer at a place, and makes room for
// n of them; more fit, up to 2^32-1.
func New[T any](n int, at func(place int) *T) *Index[T] {
	x := &Index[T]{seed: maphash.MakeSeed(), at: at}
	size := 64
	for size*3/4 < n {
		size *= 2
	}
	x.slots = make([]uint32, size)
	return x
}

// slot returns where p is, or the free slot where it belongs.
func (x *Index[T]) slot(p *T) *uint32 {
	mask := uint64(len(x.slots) - 1) //nolint:gosec // a power of two
	for i := maphash.Comparable(x.seed, p); ; i++ {
		s := &x.slots[i&mask]
		if *s == 0 || x.at(int(*s-1)) == p {
			return s
		}
	}
}

// Find returns the place of p.
func (x *Index[T]) Find(p *T) (place int, ok bool) {
	s := *x.slot(p)
	return int(s) - 1, s != 0
}

// Add enters the next pointer, which must be in the list at place Len and not before.
func (x *Index[T]) Add(p *T) {
	if x.count >= len(x.slots)*3/4 {
		x.slots = make([]uint32, 2*len(x.slots))
		for i := range x.count {
			*x.slot(x.at(i)) = uint32(i + 1)
		}
	}
	x.count++
	*x.slot(p) = uint32(x.count) //nolint:gosec // below 2^32, as New says
}

// Len returns the number of pointers entered.
func (x *Index[T]) Len() int { return x.count }
