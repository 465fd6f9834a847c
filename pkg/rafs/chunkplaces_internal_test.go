package rafs

import "testing"

// TestChunkPlaces finds chunks of blobs that claim fewer, as many, and far more chunks than there are.
func TestChunkPlaces(t *testing.T) {
	t.Parallel()
	blobs := []Blob{{ChunkCount: 10}, {ChunkCount: 0}, {ChunkCount: MaxChunks}, {ChunkCount: 20}}
	p := newChunkPlaces(blobs, 30)
	var dense int
	for _, d := range p.dense {
		dense += len(d)
	}
	if dense > 60 {
		t.Errorf("%d numbers for 30 chunks", dense)
	}
	type chunk struct {
		blob  uint16
		index uint32
	}
	all := []chunk{{0, 0}, {0, 9}, {0, 10}, {1, 0}, {1, MaxChunks}, {2, 0}, {2, MaxChunks}, {3, 19}, {3, 20}}
	for i, c := range all {
		if at, ok := p.find(c.blob, c.index); ok {
			t.Errorf("find(%d, %d) before set = %d", c.blob, c.index, at)
		}
		p.set(c.blob, c.index, uint32(i))
	}
	for i, c := range all {
		if at, ok := p.find(c.blob, c.index); !ok || at != uint32(i) {
			t.Errorf("find(%d, %d) = %d, %v, want %d", c.blob, c.index, at, ok, i)
		}
	}
}
