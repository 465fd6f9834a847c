package rafs

// chunkPlaces finds the places of chunks in a chunk table by blob and index. Where blobs have no more chunks
// than the table has records, as those of one image do, it takes 4 bytes a chunk.
type chunkPlaces struct {
	dense  [][]uint32        // by blob and index: 1 + place, 0: none
	sparse map[uint32]uint32 // chunkID → place, of all others
}

// newChunkPlaces makes room for a table of n records. What blobs claim costs at most 8 bytes a record.
func newChunkPlaces(blobs []Blob, n uint64) chunkPlaces {
	p := chunkPlaces{dense: make([][]uint32, len(blobs)), sparse: map[uint32]uint32{}}
	room := 2 * n
	for i := range blobs {
		if count := uint64(blobs[i].ChunkCount); count <= room {
			p.dense[i] = make([]uint32, count)
			room -= count
		}
	}
	return p
}

func (p *chunkPlaces) find(blob uint16, index uint32) (place uint32, ok bool) {
	if int(blob) < len(p.dense) && uint64(index) < uint64(len(p.dense[blob])) {
		at := p.dense[blob][index]
		return at - 1, at != 0
	}
	place, ok = p.sparse[chunkID(blob, index)]
	return place, ok
}

func (p *chunkPlaces) set(blob uint16, index, place uint32) {
	if d := p.dense[blob]; uint64(index) < uint64(len(d)) {
		d[index] = place + 1
		return
	}
	p.sparse[chunkID(blob, index)] = place
}
