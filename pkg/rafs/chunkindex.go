package rafs

import "hash/maphash"

// chunkIndex holds the chunks of a blob and finds them by digest and size. It takes 5 to 11 bytes a chunk
// beside the [Chunk] itself: a blob may have millions. The zero value is empty; it never forgets.
type chunkIndex struct {
	seed  maphash.Seed
	slots []uint32 // 1 + index of a chunk, 0: free; a power of two of them, at most ¾ taken
	runs  []*[chunkIndexRun]Chunk
	count uint32
}

// chunkIndexRun is the number of chunks that are allocated together, so that growing copies none.
const chunkIndexRun = 1024

func (x *chunkIndex) at(i uint32) *Chunk { return &x.runs[i/chunkIndexRun][i%chunkIndexRun] }

// slot returns where a chunk is, or the free slot where it belongs.
func (x *chunkIndex) slot(d *Digest, size uint32) *uint32 {
	mask := uint64(len(x.slots) - 1) //nolint:gosec // a power of two
	for at := maphash.Bytes(x.seed, d[:]); ; at++ {
		s := &x.slots[at&mask]
		if *s == 0 {
			return s
		}
		if c := x.at(*s - 1); c.UncompressedSize == size && c.Digest == *d {
			return s
		}
	}
}

// find returns the index of the chunk that was added last of those with this digest and size.
func (x *chunkIndex) find(d Digest, size uint32) (uint32, bool) {
	if x.count == 0 {
		return 0, false
	}
	s := *x.slot(&d, size)
	return s - 1, s != 0
}

// add gives a chunk the next index.
func (x *chunkIndex) add(c Chunk) uint32 {
	if int(x.count) >= len(x.slots)*3/4 {
		x.grow()
	}
	i := x.count
	if i%chunkIndexRun == 0 {
		x.runs = append(x.runs, new([chunkIndexRun]Chunk))
	}
	*x.at(i) = c
	x.count++
	*x.slot(&c.Digest, c.UncompressedSize) = i + 1
	return i
}

func (x *chunkIndex) grow() {
	if x.slots == nil {
		x.seed = maphash.MakeSeed()
	}
	x.slots = make([]uint32, max(64, 2*len(x.slots)))
	for i := range x.count {
		c := x.at(i)
		*x.slot(&c.Digest, c.UncompressedSize) = i + 1
	}
}

// tail returns the n chunks added last; nil when they do not lie side by side.
func (x *chunkIndex) tail(n int) []Chunk {
	end := int(x.count-1)%chunkIndexRun + 1
	if x.count == 0 || n > end {
		return nil
	}
	return x.runs[len(x.runs)-1][end-n : end : end]
}
