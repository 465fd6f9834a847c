package watch

import (
	"os"
	"sync"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// watched is a blob with the number of Adds that had no Remove, and the events that are being looked at.
type watched struct {
	blob   *store.Blob
	refs   int
	events sync.WaitGroup
}

// gone is what is known of a file that is not watched any more: events may be under way that were raised when it was.
type gone struct {
	ready func(offset, length int64) bool // as it was at the end
	stays bool                            // until the file is added: all of it was ready, or there is a mark
	end   int64                           // which of all Removes it was
}

// look is one event's view of its file. Until done is called the blob stays open.
type look struct {
	known *watched
	ready func(offset, length int64) bool // nil: nobody knows the file
}

func (l look) blob() *store.Blob {
	if l.known == nil {
		return nil
	}
	return l.known.blob
}

// has reports whether what e asks for is ready.
func (l look) has(e event) bool { return l.ready != nil && l.ready(e.offset, e.count) }

func (l look) done() {
	if l.known != nil {
		l.known.events.Done()
	}
}

// look finds the file of an event. The caller calls done.
func (w *Watcher) look(id file) look {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if known := w.blobs[id]; known != nil {
		known.events.Add(1)
		return look{known, known.blob.ReadyRange}
	}
	return look{ready: w.gone[id].ready}
}

// Unsure says, before Run, that there may be marked files that were not added. Then nobody can tell what an inherited event
// asks for whose file is not known, and it fails.
func (w *Watcher) Unsure() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.unsure = true
}

// lookAll is look for an event whose file nobody knows: it may be any of them.
func (w *Watcher) lookAll() []look {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.unsure {
		return []look{{}}
	}
	all := make([]look, 0, len(w.blobs))
	for _, known := range w.blobs {
		known.events.Add(1)
		all = append(all, look{known, known.blob.ReadyRange})
	}
	return all
}

// forget ends the watch of a blob that has no mark any more, or is left with it. Mounts that have all they need of it may have the file still, and
// events of theirs may be queued. The caller holds mu.
func (w *Watcher) forget(id file, b *store.Blob, left bool) {
	delete(w.blobs, id)
	w.removes++
	ready, whole := b.Freeze()
	w.gone[id] = gone{ready: ready, stays: whole || left, end: w.removes}
	if !whole && !left {
		w.drain()
	}
}

// drain has Run have a look at the queue, and call drained. The caller holds mu.
func (w *Watcher) drain() {
	w.partial = true
	w.signal()
}

// Release takes the mark off a data file that was left with it ([Watcher.End]), where there is one, or was kept and that nobody adopted; nobody has it
// open any more.
func (w *Watcher) Release(f *os.File) error {
	id := fileOf(int32(f.Fd())) //nolint:gosec // a descriptor
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.Unmark(f); err != nil {
		return err
	}
	if g, ok := w.gone[id]; ok {
		w.removes++
		w.gone[id] = gone{ready: g.ready, end: w.removes}
		w.drain()
	}
	return nil
}

// AddWhole is [Watcher.AddReady] for a file of which all is local.
func (w *Watcher) AddWhole(dev, ino uint64) {
	w.AddReady(dev, ino, func(int64, int64) bool { return true })
}

// AddReady makes events of what is ready pass of a file that no mount needs to have watched, and that is not: mounts have all that they need of it. An
// earlier process may have left some, or a mark on it. It lasts until the file is added.
func (w *Watcher) AddReady(dev, ino uint64, ready func(offset, length int64) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := file{dev, ino}
	if w.blobs[id] == nil {
		w.gone[id] = gone{ready: ready, stays: true}
	}
}

// ended returns how many Removes there were.
func (w *Watcher) ended() int64 {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.removes
}

// drained drops what was kept for events of incomplete files, which takes memory: after the first so many Removes the
// queue was empty. What is complete takes none.
func (w *Watcher) drained(removes int64) {
	w.mu.RLock()
	partial := w.partial
	w.mu.RUnlock()
	if !partial {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.partial = false
	for id, g := range w.gone {
		if g.stays {
			continue
		}
		if g.end <= removes {
			delete(w.gone, id)
		} else {
			w.partial = true
		}
	}
}
