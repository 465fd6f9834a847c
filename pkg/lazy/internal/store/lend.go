package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/headstart-oci/headstart/internal/atomicfile"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// feedStep bounds how many chunks [Blob.Feed] hands over at once.
const feedStep = 4096

// Feed calls f with the chunks that are durable and that no Feed before has handed over, as far as its calls returned nil; known is the
// number of durable blocks, with the last call, else 0. have is that number of an earlier process: when it is the same, nothing is handed over.
// Feed reads the chunk table, and calls nothing when there is nothing new. The caller has the blob open.
func (b *Blob) Feed(have uint64, f func(chunks []rafs.Chunk, known uint64) error) error {
	b.feedMu.Lock()
	defer b.feedMu.Unlock()
	b.syncMu.Lock()
	durable := slices.Clone(b.durable)
	b.syncMu.Unlock()
	b.lasting(durable)
	known := population(durable)
	if have == 0 {
		b.fed = nil // whoever knew has forgotten all
	} else if b.fed == nil && have == known {
		b.fed = slices.Clone(durable)
	}
	fed := make([]uint64, len(durable))
	for w := range min(len(fed), len(b.fed)) {
		fed[w] = b.fed[w] & durable[w]
	}
	var part []rafs.Chunk
	last, fresh := int64(-1), false
	for w := range durable {
		if durable[w]&^fed[w] == 0 {
			continue
		}
		fresh = true
		chunks, err := b.Chunks(int64(w)*64*BlockSize, 64*BlockSize)
		if err != nil {
			return err
		}
		for _, c := range chunks {
			r := record(c)
			if int64(r.Offset) <= last || !covered(durable, []chunkRecord{r}) || covered(fed, []chunkRecord{r}) { //nolint:gosec // below Size
				continue
			}
			last, part = int64(r.Offset), append(part, c) //nolint:gosec // below Size
		}
		if len(part) >= feedStep {
			if err := f(part, 0); err != nil {
				return err
			}
			part = part[:0]
		}
	}
	if fresh || have != known {
		if err := f(part, known); err != nil {
			return err
		}
	}
	b.fed = slices.Clone(durable)
	return nil
}

// lasting leaves of durable bits those that are ready or claimed: what turned out wrong is in the file "ready" until the next Sync.
func (b *Blob) lasting(durable []uint64) {
	words := b.ready.Words()
	for w := range durable {
		keep := uint64(0)
		if w < len(words) {
			keep = b.claimOf(uint64(w)) // before what is ready: what is confirmed is that first
			keep |= words[w].Load()
		}
		durable[w] &= keep
	}
}

func population(words []uint64) (n uint64) {
	for _, w := range words {
		n += uint64(bits.OnesCount64(w)) //nolint:gosec // at most 64
	}
	return n
}

// DurableBlocks returns how many blocks of the blob called name would be there after the machine stopped, without opening
// its data file, and 0 where that cannot be told.
func (s *Store) DurableBlocks(name string) uint64 {
	if entryName(name) != nil {
		return 0
	}
	dir, err := s.root.OpenRoot(path.Join("blobs", name))
	if err != nil {
		return 0
	}
	defer func() { _ = dir.Close() }() // nothing was written
	p, err := readState(dir, "ready", 8)
	if err != nil {
		return 0
	}
	id, err := blobOf(dir)
	if err != nil {
		return 0
	}
	h, _, err := decode(p, magicReady, id, 8)
	if err != nil {
		return 0
	}
	words, err := parseReady(p, id, h.Size, int64(h.Size)) //nolint:gosec // at most maxBlocks blocks
	if err != nil {
		return 0
	}
	return population(words)
}

// Names returns the names of all blobs that there are, in order.
func (s *Store) Names() ([]string, error) {
	names, err := s.names()
	return slices.DeleteFunc(names, func(name string) bool { return strings.HasPrefix(name, ".") }), err
}

// scopesName is the file that says where the bytes of a data file came from: one line each, ordered.
const scopesName = "scopes"

// maxScopes bounds the lines of that file, maxScope their length.
const (
	maxScopes = 256
	maxScope  = 1024
)

// Scopes returns where bytes of the blob came from, as [Blob.AddScope] noted; nil when nobody knows.
func (b *Blob) Scopes() ([]string, error) {
	b.scopeMu.Lock()
	defer b.scopeMu.Unlock()
	return b.loadScopes()
}

func (b *Blob) loadScopes() ([]string, error) {
	if b.scopes != nil {
		return b.scopes, nil
	}
	err := b.inDir(func(dir *os.Root) (err error) {
		f, err := dir.Open(scopesName)
		if err != nil {
			return err
		}
		p, err := io.ReadAll(io.LimitReader(f, maxScopes*maxScope))
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		b.scopes = slices.DeleteFunc(strings.Split(string(p), "\n"), func(s string) bool { return s == "" })
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		b.scopes, err = []string{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("scopes of blob %s: %w", b.name, err)
	}
	return b.scopes, nil
}

// AddScope notes, durably, that bytes of the blob came from scope, a line of text. Noting it again costs nothing.
func (b *Blob) AddScope(scope string) error {
	if scope == "" || len(scope) >= maxScope || strings.ContainsAny(scope, "\n\x00") {
		return fmt.Errorf("blob %s: scope %.80q: want a line of at most %d bytes", b.name, scope, maxScope)
	}
	b.scopeMu.Lock()
	defer b.scopeMu.Unlock()
	have, err := b.loadScopes()
	if err != nil || slices.Contains(have, scope) || len(have) >= maxScopes {
		return err
	}
	all := append(slices.Clone(have), scope)
	slices.Sort(all)
	if err := b.inDir(func(dir *os.Root) error {
		return atomicfile.Write(dir, ".", scopesName, 0o600, func(w io.Writer) error {
			_, err := io.WriteString(w, strings.Join(all, "\n")+"\n")
			return err
		})
	}); err != nil {
		return fmt.Errorf("scopes of blob %s: %w", b.name, err)
	}
	b.scopes = all
	return nil
}

// ReadChunk reads the bytes of a chunk of the same size as c at offset into p, which it grows, when they are ready. It reads through the first
// descriptor, which raises no event. What comes is not verified.
func (b *Blob) ReadChunk(size uint32, offset int64, p []byte) (_ []byte, ok bool, err error) {
	end := uint64(offset) + uint64(size) //nolint:gosec // not below 0
	if offset < 0 || offset%BlockSize != 0 || size == 0 || end > uint64(b.Size()) || !b.allReady(offset, int64(size)) {
		return p, false, nil
	}
	if cap(p) < int(size) {
		p = make([]byte, size)
	}
	p = p[:size]
	_, err = b.data.ReadAt(p, offset)
	return p, err == nil, err
}

// allReady reports whether every block of a range is ready or claimed, needed or not.
func (b *Blob) allReady(offset, length int64) bool {
	first, end := b.blocks(offset, length)
	ready := b.ready.Words()
	return eachWord(first, end, func(w, mask uint64) bool {
		return mask&^ready[w].Load() == 0 || mask&^b.claimOf(w)&^ready[w].Load() == 0
	})
}

// ReopenNow is [Store.Reopen] without patience: [ErrInUse] comes at once.
func (s *Store) ReopenNow(name string) (*Blob, error) {
	if err := entryName(name); err != nil {
		return nil, err
	}
	b, err := s.openNamed(name)
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", name, err)
	}
	return b, nil
}

// IsOpen reports whether somebody of this process has the blob called name open.
func (s *Store) IsOpen(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blobs[name] != nil
}
