package store

// Strangers reports whether somebody has the data file open whom this process may not know, such as a mount whose record was lost, and not all
// that any image ever needed is durable: without the mark the holes would read as zeros. Descriptors that were kept are this process' own, wherever copies
// of them are. It may be a mount that has all it needs, too, or one of which the kernel has not closed the files yet.
func (b *Blob) Strangers() bool { return !b.known && !b.Durable() && inUse(b.data) }

// Leave has the last [Blob.Close] leave the blob as it is found by a process that takes over, with its mark: its descriptors are among
// [Store.Unadopted] then, for somebody who opens it again, or for [Store.Release].
func (b *Blob) Leave() { b.stays.Store(true) }

// Left reports whether the descriptors of the blob called name are kept for somebody who has not come yet, or will be ([Blob.Leave]) when
// nobody lends of it or looks at it any more; of any blob when name is empty.
func (s *Store) Left(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if name == "" && len(s.kept) > 0 || s.kept[name].Data != nil {
		return true
	}
	for _, b := range s.blobs {
		if b.stays.Load() && (name == "" || name == b.name) {
			return true
		}
	}
	return false
}

// keep gives the descriptors to the store. The caller holds store.mu, and calls release.
func (b *Blob) keep() error {
	b.store.kept[b.name] = b.Descriptors()
	b.data = nil
	b.mu.Lock() // status may be looking
	defer b.mu.Unlock()
	b.gone = true
	return b.ready.Unmap()
}
