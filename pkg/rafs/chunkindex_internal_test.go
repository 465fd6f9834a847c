package rafs

import (
	"math/rand/v2"
	"testing"
)

// A map is the judge of the index.
func TestChunkIndex(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	type chunkKey struct {
		digest Digest
		size   uint32
	}
	want := map[chunkKey]uint32{}
	var x chunkIndex
	for range 200_000 {
		var key chunkKey
		key.digest[r.IntN(32)] = byte(r.IntN(256)) // few bits differ
		key.digest[r.IntN(32)] ^= byte(r.IntN(16))
		key.size = uint32(r.IntN(3))
		i, ok := x.find(key.digest, key.size)
		w, known := want[key]
		if ok != known || ok && i != w {
			t.Fatalf("find = %d, %v, want %d, %v", i, ok, w, known)
		}
		if !ok {
			if want[key] = x.add(Chunk{Digest: key.digest, UncompressedSize: key.size}); int(want[key]) != len(want)-1 {
				t.Fatalf("add = %d, want %d", want[key], len(want)-1)
			}
		}
	}
	for key, w := range want {
		if i, ok := x.find(key.digest, key.size); !ok || i != w {
			t.Fatalf("find = %d, %v, want %d", i, ok, w)
		}
	}
	if len(want) < 50_000 || len(x.slots)*3/4 < len(want) {
		t.Errorf("%d keys in %d slots", len(want), len(x.slots))
	}
}
