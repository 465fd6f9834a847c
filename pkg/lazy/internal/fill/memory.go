package fill

import (
	"context"

	"golang.org/x/sync/semaphore"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// pool is a bound on bytes: of demands and what is read ahead of them, and of all others.
type pool [2]*semaphore.Weighted

func newPool(n int64) (p pool) {
	for i := range p {
		p[i] = semaphore.NewWeighted(max(1, n))
	}
	return p
}

// Share is a part of a scheduler's memory, half of it: that of one mount, whose sources may all stop in the middle of
// what they send. The other half is for others then. Safe for concurrent use.
type Share struct {
	s      *Scheduler
	memory pool
}

// Share returns a share for the blobs of one mount.
func (s *Scheduler) Share() *Share { return &Share{s, newPool(s.o.Memory / 4)} }

// Open is [Scheduler.Open] for a blob with this share of the memory.
func (h *Share) Open(cache Cache, src Source, info rafs.Blob, chunks []rafs.Chunk) (*Blob, error) {
	return h.s.open(h, cache, src, info, chunks)
}

// weight is the memory that a unit takes: as it came, in the reader's buffer, and decompressed.
func weight(u unit) int64 {
	var most uint32
	for _, c := range u.chunks {
		most = max(most, c.UncompressedSize)
	}
	return 2*u.size + int64(most)
}

// hold reserves memory for class, at most all of the share. Others wait for it: nobody holds it while he waits for a source that
// has sent nothing of the unit.
func (h *Share) hold(ctx context.Context, class Class, n int64) (release func(), err error) {
	at := min(class, 1)
	if class == Ahead { // instead of a demand, not beside it: more would be in use at once
		at = 0
	}
	own, all := h.memory[at], h.s.memory[at]
	n = min(n, max(1, h.s.o.Memory/4))
	if err := own.Acquire(ctx, n); err != nil {
		return nil, context.Cause(ctx)
	}
	if err := all.Acquire(ctx, n); err != nil {
		own.Release(n)
		return nil, context.Cause(ctx)
	}
	return func() {
		all.Release(n)
		own.Release(n)
	}, nil
}
