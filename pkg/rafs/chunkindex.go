package rafs

import "hash/maphash"

// chunkIndex finds chunks of a blob by digest and size. It takes about 45 bytes a chunk, where
// a map takes 100: a blob may have millions. The zero value is empty; it never forgets.
type chunkIndex struct {
	seed  maphash.Seed
	slots []uint32 // 1 + index of a chunk, 0: free; a power of two of them, at most ¾ taken
	keys  []*[chunkIndexRun]chunkKey
	count uint32
}

// chunkIndexRun is the number of keys that are allocated together, so that growing copies none.
const chunkIndexRun = 1024

func (x *chunkIndex) key(i uint32) *chunkKey { return &x.keys[i/chunkIndexRun][i%chunkIndexRun] }

// slot returns where key is, or the free slot where it belongs.
func (x *chunkIndex) slot(key *chunkKey) *uint32 {
	mask := uint64(len(x.slots) - 1) //nolint:gosec // a power of two
	for at := maphash.Bytes(x.seed, key.digest[:]); ; at++ {
		s := &x.slots[at&mask]
		if *s == 0 || *x.key(*s - 1) == *key {
			return s
		}
	}
}

// find returns the index of a chunk that was added.
func (x *chunkIndex) find(key chunkKey) (uint32, bool) {
	if x.count == 0 {
		return 0, false
	}
	s := *x.slot(&key)
	return s - 1, s != 0
}

// add gives a chunk that find does not know the next index.
func (x *chunkIndex) add(key chunkKey) uint32 {
	if int(x.count) >= len(x.slots)*3/4 {
		x.grow()
	}
	i := x.count
	if i%chunkIndexRun == 0 {
		x.keys = append(x.keys, new([chunkIndexRun]chunkKey))
	}
	*x.key(i) = key
	x.count++
	*x.slot(&key) = i + 1
	return i
}

func (x *chunkIndex) grow() {
	if x.slots == nil {
		x.seed = maphash.MakeSeed()
	}
	x.slots = make([]uint32, max(64, 2*len(x.slots)))
	for i := range x.count {
		*x.slot(x.key(i)) = i + 1
	}
}
