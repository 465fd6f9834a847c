package trace

import "hash/maphash"

// paths finds the touches of a [Recorder] by path: 4 bytes a slot, and no pointers, because a
// tracer's parent looks up very many of them.
type paths struct {
	seed  maphash.Seed
	slots []uint32 // number of a touch plus 1; freeSlot, or deadSlot where one was removed
	used  int      // slots that are not free
}

const (
	freeSlot = 0
	deadSlot = 1<<32 - 1
	minSlots = 1 << 6 // a power of two, like every number of slots
)

// find returns the number of the touch with a path; false: there is none.
func (x *paths) find(r *Recorder, path string) (int, bool) {
	if x.used == 0 {
		return 0, false
	}
	for at := x.start(path); x.slots[at] != freeSlot; at = x.next(at) {
		if s := x.slots[at]; s != deadSlot && r.touch(int(s-1)).Path == path {
			return int(s - 1), true
		}
	}
	return 0, false
}

// add adds touch i, whose path is not there yet.
func (x *paths) add(r *Recorder, i int) {
	if 3*(x.used+1) > 2*len(x.slots) {
		old := x.slots
		if old == nil {
			x.seed = maphash.MakeSeed()
		}
		x.slots, x.used = make([]uint32, max(minSlots, 2*len(old))), 0
		for _, s := range old {
			if s != freeSlot && s != deadSlot {
				x.put(r, s)
			}
		}
	}
	x.put(r, uint32(i)+1) //nolint:gosec // far fewer touches fit in memory
}

func (x *paths) put(r *Recorder, s uint32) {
	at := x.start(r.touch(int(s - 1)).Path)
	for x.slots[at] != freeSlot {
		at = x.next(at)
	}
	x.slots[at] = s
	x.used++
}

// remove takes touch i out, which is there.
func (x *paths) remove(r *Recorder, i int) {
	at := x.start(r.touch(i).Path)
	for x.slots[at] != uint32(i)+1 { //nolint:gosec // as above
		at = x.next(at)
	}
	x.slots[at] = deadSlot
}

func (x *paths) start(path string) int {
	return int(maphash.String(x.seed, path) & uint64(len(x.slots)-1)) //nolint:gosec // below len(x.slots)
}

func (x *paths) next(at int) int { return (at + 1) & (len(x.slots) - 1) }

// ids finds the touches of a [Recorder] by the numbers that the tracer gave them, which are dense.
type ids struct {
	dense []uint32       // by id: number of a touch plus 1; 0: none
	far   map[uint32]int // of ids that are far from all others
}

// gap is how far beyond the double of the ids so far a dense one may be.
const gap = 1 << 12

func (x *ids) get(id uint32) (int, bool) {
	if int64(id) < int64(len(x.dense)) && x.dense[id] > 0 {
		return int(x.dense[id]) - 1, true
	}
	i, ok := x.far[id]
	return i, ok
}

func (x *ids) set(id uint32, i int) {
	if int64(id) >= int64(2*len(x.dense)+gap) {
		if x.far == nil {
			x.far = make(map[uint32]int)
		}
		x.far[id] = i
		return
	}
	if more := int(id) + 1 - len(x.dense); more > 0 {
		x.dense = append(x.dense, make([]uint32, more)...)
	}
	x.dense[id] = uint32(i) + 1 //nolint:gosec // far fewer touches fit in memory
}
