package fill

import (
	"slices"
	"time"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Traffic is what one class of fetches took.
type Traffic struct {
	Requests int64 `json:"requests"` // ranges that were asked for
	Bytes    int64 `json:"bytes"`    // that came
	Chunks   int64 `json:"chunks"`   // that went into the cache
}

// Stats is what happened to a blob since it was opened.
type Stats struct {
	Demand     Traffic `json:"demand"`     // a reader waited for it, and what came with it in one request
	Prefetch   Traffic `json:"prefetch"`   // the prefetch blob, from front to back
	Table      Traffic `json:"table"`      // the files of the prefetch table
	ReadAhead  Traffic `json:"read_ahead"` // what follows in a blob that somebody reads front to back
	Background Traffic `json:"background"` // the rest, by policy
	// Reused were copied from other caches of this node, not fetched: uncompressed bytes.
	ReusedChunks int64         `json:"reused_chunks"`
	ReusedBytes  int64         `json:"reused_bytes"`
	Waits        int64         `json:"waits"`     // reads that found something missing
	Waited       time.Duration `json:"waited_ns"` // all of them together
	Misses       int64         `json:"misses"`    // see Miss
	Overtakes    int64         `json:"overtakes"` // units that a list names, wanted long before their turn
	Retries      int64         `json:"retries"`   // requests that were repeated here; sources repeat some by themselves
	Corrupt      int64         `json:"corrupt"`   // units that were not what they should be
	Failed       int64         `json:"failed"`    // reads that got an error
}

// of returns the traffic of a class.
func (s *Stats) of(c Class) *Traffic {
	switch c {
	case Demand:
		return &s.Demand
	case Prefetch:
		return &s.Prefetch
	case Table:
		return &s.Table
	case Ahead:
		return &s.ReadAhead
	default:
		return &s.Background
	}
}

// Fetched returns what all classes took together.
func (s *Stats) Fetched() (all Traffic) {
	for c := range Class(numClasses) {
		t := s.of(c)
		all.Requests, all.Bytes, all.Chunks = all.Requests+t.Requests, all.Bytes+t.Bytes, all.Chunks+t.Chunks
	}
	return all
}

// Add adds o to s.
func (s *Stats) Add(o Stats) {
	for c := range Class(numClasses) {
		t, u := s.of(c), o.of(c)
		t.Requests, t.Bytes, t.Chunks = t.Requests+u.Requests, t.Bytes+u.Bytes, t.Chunks+u.Chunks
	}
	s.ReusedChunks, s.ReusedBytes = s.ReusedChunks+o.ReusedChunks, s.ReusedBytes+o.ReusedBytes
	s.Waits, s.Waited = s.Waits+o.Waits, s.Waited+o.Waited
	s.Misses, s.Overtakes = s.Misses+o.Misses, s.Overtakes+o.Overtakes
	s.Retries, s.Corrupt, s.Failed = s.Retries+o.Retries, s.Corrupt+o.Corrupt, s.Failed+o.Failed
}

// Miss is a chunk that a reader had to wait for, and which was fetched for him, because no list named it, or because what the list named
// had come already: what a better list would have brought. Or, with Overtake, one that a list names, and wanted long before its turn.
type Miss struct {
	Blob   string        `json:"blob"`
	Index  uint32        `json:"chunk"`  // of the chunk in its blob
	Offset int64         `json:"offset"` // in the blob's uncompressed address space
	Size   int64         `json:"size"`
	After  time.Duration `json:"after_ns"` // since the blob was opened
	Late   bool          `json:"late"`     // all that was to be prefetched was there, or had failed
	Listed bool          `json:"listed"`   // a list names it, and yet it was not there
	// Overtake: the list that names it was on its way, and it was fetched by itself because that was sooner. It does not count as a miss.
	Overtake bool   `json:"overtake,omitempty"`
	Path     string `json:"path,omitempty"`
}

// maxMisses bounds the misses that are kept of a blob.
const maxMisses = 1000

// miss notes that somebody waits for c; the caller holds b.s.mu. own: it is fetched for itself.
func (b *Blob) miss(c *rafs.Chunk, own bool) {
	listed := b.whole || b.listed[c.UncompressedOffset]
	overtake := listed && !b.over
	switch {
	case !overtake:
		b.stats.Misses++
	case own:
		b.stats.Overtakes++
	default:
		return
	}
	if len(b.misses) >= maxMisses {
		return
	}
	b.misses = append(b.misses, Miss{
		Blob: b.info.ID, Index: c.Index, Offset: int64(c.UncompressedOffset), Size: int64(c.UncompressedSize), //nolint:gosec // below 2^44
		After: time.Since(b.opened), Late: b.over, Listed: listed, Overtake: overtake,
	})
}

// Stats returns what happened so far.
func (b *Blob) Stats() Stats {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	return b.stats
}

// Misses returns the first of the misses and overtakes so far, at most a thousand.
func (b *Blob) Misses() []Miss {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	return slices.Clone(b.misses)
}

// Name sets the paths of misses: a file of img that has the chunk, the first where several do.
func Name(img *rafs.Image, misses []Miss) {
	type key struct {
		blob  string
		index uint32
	}
	want := map[key][]int{}
	for i, m := range misses {
		k := key{m.Blob, m.Index}
		want[k] = append(want[k], i)
	}
	_ = img.Walk(func(path string, ino *rafs.Inode) error {
		for i := range ino.Chunks {
			c := &ino.Chunks[i]
			if int(c.Blob) >= len(img.Blobs) {
				continue
			}
			k := key{img.Blobs[c.Blob].ID, c.Index}
			for _, at := range want[k] {
				misses[at].Path = path
			}
			delete(want, k)
		}
		return nil
	}) // its error is that of the function
}
