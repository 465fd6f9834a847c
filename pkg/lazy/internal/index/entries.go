package index

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// step is how many entries are changed or walked at once: others wait for no more than that.
const step = 4096

// Lookup calls f with the places of those keys that have any, the latest first, until it returns false; places are f's. Its cost is that of the keys, not
// of the index. f must not call the index.
func (x *Index) Lookup(keys []Key, f func(n int, at []Place) bool) error {
	if len(keys) == 0 {
		return nil
	}
	return x.view(func(tx *bolt.Tx) error {
		chunks := tx.Bucket(bucketChunks)
		buf := make([]byte, 0, sizeKey)
		for n := range keys {
			v := chunks.Get(keys[n].append(buf))
			if v == nil {
				continue
			}
			at, err := parsePlaces(v)
			if err != nil {
				return err
			}
			if named := x.named(at); len(named) > 0 && !f(n, named) {
				return nil
			}
		}
		return nil
	})
}

// named returns the places in caches that live, the latest first.
func (x *Index) named(at []place) []Place {
	x.namesMu.RLock()
	defer x.namesMu.RUnlock()
	out := make([]Place, 0, len(at))
	for _, p := range slices.Backward(at) {
		if c := x.caches[p.cache]; c != nil && !c.dying {
			out = append(out, Place{c.name, int64(p.block) * blockSize})
		}
	}
	return out
}

// Add adds chunks of a cache, which must be durable in it, and notes known, a number that [Index.Known] returns. What is there already stays; of a chunk
// that has many places no more are kept. An error leaves some of the entries out.
func (x *Index) Add(name string, entries []Entry, known uint64) error {
	for i := range entries {
		if e := &entries[i]; e.Offset < 0 || e.Offset >= maxOffset || e.Offset%blockSize != 0 || e.Digester > 0xff {
			return fmt.Errorf("index: entry at %d of %s, want a multiple of %d below %d", e.Offset, name, blockSize, maxOffset)
		}
	}
	for {
		n := min(step, len(entries))
		part := slices.Clone(entries[:n])
		entries = entries[n:]
		if err := x.add(name, part, known, len(entries) == 0); err != nil {
			return fmt.Errorf("index: add %d chunks of %s: %w", n, name, err)
		}
		if len(entries) == 0 {
			return nil
		}
	}
}

// add adds a part of the entries.
func (x *Index) add(name string, entries []Entry, known uint64, last bool) error {
	keys := make([]byte, 0, len(entries)*sizeKey)
	slices.SortFunc(entries, func(a, b Entry) int {
		var k, l [sizeKey]byte
		return bytes.Compare(a.append(k[:0]), b.append(l[:0]))
	})
	x.changes.Lock()
	defer x.changes.Unlock()
	var c cache
	err := x.update(func(tx *bolt.Tx) error {
		var err error
		if c, err = x.cacheOf(tx, name); err != nil {
			return err
		}
		if last {
			c.known = known
		}
		if err := tx.Bucket(bucketCaches).Put(binary.BigEndian.AppendUint32(nil, c.id), c.value()); err != nil {
			return err
		}
		chunks := tx.Bucket(bucketChunks)
		keys = keys[:0]
		for i := range entries {
			e := &entries[i]
			at := len(keys)
			keys = e.append(keys)
			added, err := put(chunks, keys[at:], place{c.id, uint32(e.Offset / blockSize)}, x.lives) //nolint:gosec // below maxOffset
			if err != nil {
				return err
			}
			if !added {
				keys = keys[:at]
			}
		}
		if len(keys) == 0 {
			return nil
		}
		lists := tx.Bucket(bucketLists)
		seq, err := lists.NextSequence()
		if err != nil {
			return err
		}
		return lists.Put(listKey(c.id, seq), keys)
	})
	if err != nil {
		return err
	}
	x.namesMu.Lock()
	defer x.namesMu.Unlock()
	x.caches[c.id], x.names[name] = &c, &c
	x.last = max(x.last, c.id)
	return nil
}

func listKey(id uint32, seq uint64) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(make([]byte, 0, sizeList), id), seq)
}

// cacheOf returns the cache called name, a new one where there is none. Only one transaction changes the file at a time.
func (x *Index) cacheOf(tx *bolt.Tx, name string) (cache, error) {
	x.namesMu.RLock()
	known, id := x.names[name], x.last+1
	x.namesMu.RUnlock()
	if known != nil {
		return *known, nil
	}
	if v := tx.Bucket(bucketMeta).Get(keyLast); len(v) == 4 {
		id = max(id, binary.BigEndian.Uint32(v)+1)
	}
	return cache{id: id, name: name}, tx.Bucket(bucketMeta).Put(keyLast, binary.BigEndian.AppendUint32(nil, id))
}

// lives reports whether the entries of a cache count.
func (x *Index) lives(id uint32) bool {
	x.namesMu.RLock()
	defer x.namesMu.RUnlock()
	c := x.caches[id]
	return c != nil && !c.dying
}

// put adds a place of a chunk and reports whether it was not there; one place of each cache is kept, and none of caches that do not live where
// there is no room. The key is kept.
func put(chunks *bolt.Bucket, key []byte, p place, lives func(id uint32) bool) (bool, error) {
	v := chunks.Get(key)
	at, err := parsePlaces(v)
	if err != nil {
		return false, err
	}
	if slices.ContainsFunc(at, func(o place) bool { return o.cache == p.cache }) {
		return false, nil
	}
	if len(at) >= maxPlaces {
		at = slices.DeleteFunc(at, func(o place) bool { return !lives(o.cache) })
	}
	if len(at) >= maxPlaces {
		return false, nil
	}
	out := make([]byte, 0, maxPlaces*sizePlace)
	for _, o := range append(at, p) {
		out = o.append(out)
	}
	return true, chunks.Put(key, out)
}

// drop removes the place of a chunk in a cache.
func drop(chunks *bolt.Bucket, key []byte, id uint32) error {
	v := chunks.Get(key)
	if v == nil {
		return nil
	}
	at, err := parsePlaces(v)
	if err != nil {
		return err
	}
	rest := make([]byte, 0, len(v))
	for _, p := range at {
		if p.cache != id {
			rest = p.append(rest)
		}
	}
	switch {
	case len(rest) == len(v):
		return nil
	case len(rest) == 0:
		return chunks.Delete(key)
	default:
		return chunks.Put(key, rest)
	}
}

// Known returns the number that was noted by the last [Index.Add] for a cache; false: the index has nothing of it.
func (x *Index) Known(name string) (uint64, bool) {
	x.namesMu.RLock()
	defer x.namesMu.RUnlock()
	c := x.names[name]
	if c == nil {
		return 0, false
	}
	return c.known, true
}

// Caches returns the names of all caches that have entries, in order.
func (x *Index) Caches() []string {
	x.namesMu.RLock()
	defer x.namesMu.RUnlock()
	names := make([]string, 0, len(x.names))
	for name := range x.names {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Remove forgets chunks of a cache: they are not there, or not right.
func (x *Index) Remove(name string, keys []Key) error {
	for len(keys) > 0 {
		n := min(step, len(keys))
		if err := x.remove(name, keys[:n]); err != nil {
			return fmt.Errorf("index: remove %d chunks of %s: %w", n, name, err)
		}
		keys = keys[n:]
	}
	return nil
}

func (x *Index) remove(name string, keys []Key) error {
	x.changes.Lock()
	defer x.changes.Unlock()
	x.namesMu.RLock()
	c := x.names[name]
	x.namesMu.RUnlock()
	if c == nil {
		return nil
	}
	return x.update(func(tx *bolt.Tx) error {
		chunks := tx.Bucket(bucketChunks)
		for i := range keys {
			if err := drop(chunks, keys[i].append(make([]byte, 0, sizeKey)), c.id); err != nil {
				return err
			}
		}
		return nil
	})
}

// RemoveCache forgets a cache. From the first moment on no [Index.Lookup] finds it, also after a crash; then its entries are removed, in
// steps between which others change the index. When it returns nil no entry of it is left; what ctx or a crash left
// is removed by [Index.Sweep]. A cache of that name may be added again at any time.
func (x *Index) RemoveCache(ctx context.Context, name string) error {
	id, known, err := x.condemn(name)
	if err != nil {
		return fmt.Errorf("index: remove %s: %w", name, err)
	}
	if !known {
		return nil
	}
	return x.empty(ctx, id)
}

// Condemn is the first step of [Index.RemoveCache], which takes as long as one entry; [Index.Sweep] does the rest.
func (x *Index) Condemn(name string) error {
	if _, _, err := x.condemn(name); err != nil {
		return fmt.Errorf("index: remove %s: %w", name, err)
	}
	return nil
}

// condemn makes a cache one whose entries count no more.
func (x *Index) condemn(name string) (id uint32, known bool, err error) {
	x.changes.Lock()
	defer x.changes.Unlock()
	x.namesMu.RLock()
	c := x.names[name]
	x.namesMu.RUnlock()
	if c == nil {
		return 0, false, nil
	}
	gone := *c
	gone.dying = true
	if err := x.update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketCaches).Put(binary.BigEndian.AppendUint32(nil, c.id), gone.value())
	}); err != nil {
		return 0, false, err
	}
	x.namesMu.Lock()
	defer x.namesMu.Unlock()
	x.caches[c.id] = &gone
	delete(x.names, name)
	return c.id, true, nil
}

// Sweep removes what is left of caches whose removal was cut short.
func (x *Index) Sweep(ctx context.Context) error {
	x.namesMu.RLock()
	var ids []uint32
	for id, c := range x.caches {
		if c.dying {
			ids = append(ids, id)
		}
	}
	x.namesMu.RUnlock()
	slices.Sort(ids)
	for _, id := range ids {
		if err := x.empty(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// empty removes the entries of a dying cache, then the cache.
func (x *Index) empty(ctx context.Context, id uint32) error {
	prefix := binary.BigEndian.AppendUint32(nil, id)
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		err := func() error {
			x.changes.Lock()
			defer x.changes.Unlock()
			return x.update(func(tx *bolt.Tx) (err error) {
				more, err = emptyStep(tx, prefix, id)
				return err
			})
		}()
		if err != nil {
			return fmt.Errorf("index: remove a cache's chunks: %w", err)
		}
	}
	x.namesMu.Lock()
	defer x.namesMu.Unlock()
	delete(x.caches, id)
	return nil
}

// emptyStep removes the chunks of one list, then the list; at the end the cache.
func emptyStep(tx *bolt.Tx, prefix []byte, id uint32) (more bool, err error) {
	k, keys := tx.Bucket(bucketLists).Cursor().Seek(prefix)
	if k == nil || !bytes.HasPrefix(k, prefix) {
		return false, tx.Bucket(bucketCaches).Delete(prefix)
	}
	if len(keys)%sizeKey != 0 {
		return false, fmt.Errorf("%w: list of %d bytes, want a multiple of %d", ErrBroken, len(keys), sizeKey)
	}
	chunks := tx.Bucket(bucketChunks)
	list := bytes.Clone(k)
	for rest := bytes.Clone(keys); len(rest) > 0; rest = rest[sizeKey:] {
		if err := drop(chunks, rest[:sizeKey], id); err != nil {
			return false, err
		}
	}
	return true, tx.Bucket(bucketLists).Delete(list)
}

// Walk calls f with every chunk and its places, in the order of keys, until it returns an error, which Walk returns. Those of caches that are being removed
// are left out. It is done in steps: what changes meanwhile may be seen or not. f may call the index.
func (x *Index) Walk(f func(k Key, at []Place) error) error {
	type found struct {
		key Key
		at  []Place
	}
	var from []byte
	for {
		var part []found
		err := x.view(func(tx *bolt.Tx) error {
			c := tx.Bucket(bucketChunks).Cursor()
			k, v := c.First()
			if from != nil {
				k, v = c.Seek(from)
			}
			for ; k != nil && len(part) < step; k, v = c.Next() {
				key, err := parseKey(k)
				if err != nil {
					return err
				}
				at, err := parsePlaces(v)
				if err != nil {
					return err
				}
				from = append(bytes.Clone(k), 0) // behind it
				part = append(part, found{key, x.named(at)})
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("index: walk: %w", err)
		}
		if len(part) == 0 {
			return nil
		}
		for _, p := range part {
			if len(p.at) == 0 {
				continue
			}
			if err := f(p.key, p.at); err != nil {
				return err
			}
		}
	}
}
