package store

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/internal/atomicfile"
)

// Index knows where chunks are. What it says of a data file goes before the file does, so that it
// never names bytes that are not there.
type Index interface {
	// RemoveCache forgets, durably, all that is said of the data file called name.
	RemoveCache(name string) error
}

// ErrPinned is returned for a blob that is to stay.
var ErrPinned = errors.New("blob is pinned")

// Policy says what the collector removes. Blobs that somebody has open and pinned ones stay in any case.
type Policy struct {
	// Limit bounds what the state directory takes on disk, in bytes; 0: no bound. When there is more, what was not
	// used for longest goes until Low bytes are left; 0: 9/10 of Limit.
	Limit, Low int64
	// Age is how long a blob stays that nobody uses; 0: for ever.
	Age time.Duration
}

// Mark is how many bytes are left of more than Limit.
func (p Policy) Mark() int64 {
	if p.Low > 0 && p.Low <= p.Limit {
		return p.Low
	}
	return p.Limit / 10 * 9
}

// Live are what mounts have, whether somebody has it open or not.
type Live struct {
	Blobs      map[string]bool // by name
	Bootstraps map[string]bool // by digest
}

// Collected is what one run of the collector did.
type Collected struct {
	Removed []string `json:"removed"` // names of blobs
	Freed   int64    `json:"freed_bytes"`
	Before  int64    `json:"before_bytes"` // what the state directory took on disk
	After   int64    `json:"after_bytes"`
	// Wanted is how much more had to go to reach the mark: what is left is in use or pinned.
	Wanted int64 `json:"wanted_bytes"`
	// Busy is how many stay only because they are open, though no mount is known to have them: a holder closes its descriptors when it gets to
	// it, and who lends or looks at one is done some time.
	Busy int `json:"-"`
	// More: time was up, and there may be more to do.
	More bool `json:"more"`
}

// Collect removes blobs by p, one after the other, and what earlier runs and daemons left, until ctx ends, which is no
// error: More is set then. A blob goes in three steps, after any of which the process may die: the index forgets it, its directory
// is renamed to a name that nobody opens, that is deleted (else by the next Collect or [Open]). A blob that
// somebody opens meanwhile stays, or is made anew.
func (s *Store) Collect(ctx context.Context, p Policy, live Live) (Collected, error) {
	entries, err := s.Entries(false)
	if err != nil {
		return Collected{}, err
	}
	rest, err := s.rest()
	if err != nil {
		return Collected{}, err
	}
	c := Collected{Removed: []string{}, Before: rest}
	var errs []error
	books := newLedger(entries)
	for i := range entries {
		c.Before += books.take(&entries[i])
	}
	c.After = c.Before
	free := func(e *Entry) { n := books.give(e); c.Freed += n; c.After -= n }
	for _, e := range entries {
		if e.Aside && ctx.Err() != nil {
			c.More = true
			break
		}
		if e.Aside {
			gone, err := s.sweepAside(e.Name)
			errs = append(errs, err)
			if gone {
				free(&e)
			} else if err == nil {
				c.Busy++
			}
		}
	}
	now := time.Now()
	patient := now.Add(leaveLimit / 4) // for all of them: more may be a mount that nobody knows of
	over := p.Limit > 0 && c.After > p.Limit
	for _, e := range candidates(entries, live) {
		old := p.Age > 0 && now.Sub(e.Used) > p.Age
		if !old && (!over || c.After <= p.Mark()) {
			continue
		}
		if ctx.Err() != nil {
			c.More = true
			break
		}
		switch err := s.removePatiently(ctx, e.Name, patient); {
		case err == nil:
			c.Removed = append(c.Removed, e.Name)
			free(&e)
		case errors.Is(err, ErrInUse):
			c.Busy++
		case !errors.Is(err, ErrPinned):
			errs = append(errs, err)
		}
	}
	if over && !c.More {
		c.Wanted = max(0, c.After-p.Mark())
	}
	return c, errors.Join(errs...)
}

// candidates are what may be removed, what was not used for longest first.
func candidates(entries []Entry, live Live) []Entry {
	var out []Entry
	for _, e := range entries {
		if !e.Aside && !e.Pinned && !live.Blobs[e.Name] {
			out = append(out, e)
		}
	}
	slices.SortStableFunc(out, func(a, b Entry) int { return cmp.Or(a.Used.Compare(b.Used), strings.Compare(a.Name, b.Name)) })
	return out
}

// removePatiently is Remove, again and again until nobody else has the file open, or the deadline: see [leaveLimit].
func (s *Store) removePatiently(ctx context.Context, name string, deadline time.Time) error {
	for {
		err := s.Remove(name)
		if !errors.Is(err, ErrInUse) || s.has(name) || !time.Now().Before(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// has reports whether the blob called name is open here, or kept.
func (s *Store) has(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blobs[name] != nil || s.kept[name].Data != nil
}

// Remove removes the blob called name as [Store.Collect] does: [ErrInUse] while anybody has it, [ErrPinned] when it
// is pinned. It is no error when there is none.
func (s *Store) Remove(name string) error { return s.take(name, false) }

// Discard is Remove, for a blob of which nothing can be used: a pin does not keep it, and stays.
func (s *Store) Discard(name string) error { return s.take(name, true) }

func (s *Store) take(name string, pinned bool) error {
	if err := entryName(name); err != nil {
		return err
	}
	aside, full, err := s.evict(name, pinned)
	if err != nil || aside == "" {
		return err
	}
	if _, err = s.sweepAside(aside); full {
		err = errors.Join(err, s.forget(name))
	}
	return err
}

// evict takes an unused blob out of use and returns the name of what is left to be deleted; empty when there was none. full: the
// index could not forget it, for want of room on the disk, of which there is more when it is deleted. Until then what the index says is
// wrong, which costs who believes it a look.
func (s *Store) evict(name string, pinned bool) (aside string, full bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.busy[name] {
		s.idle.Wait()
	}
	if _, err := s.root.Lstat(path.Join(pinsDir, name)); err == nil && !pinned {
		return "", false, fmt.Errorf("remove blob %s: %w", name, ErrPinned)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", false, err
	}
	if s.blobs[name] != nil || s.kept[name].Data != nil {
		return "", false, fmt.Errorf("remove blob %s: %w", name, ErrInUse)
	}
	if _, err := s.root.Lstat(path.Join("blobs", name)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return "", false, err
	}
	used, err := s.used(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", false, fmt.Errorf("remove blob %s: %w", name, err)
	}
	if used {
		return "", false, fmt.Errorf("remove blob %s: %w", name, ErrInUse)
	}
	// The index may take a while: who wants this blob meanwhile waits, others do not.
	s.busy[name] = true
	s.mu.Unlock()
	err = s.forget(name)
	if full = errors.Is(err, syscall.ENOSPC); full {
		err = nil
	}
	s.mu.Lock()
	delete(s.busy, name)
	s.idle.Broadcast()
	if err == nil {
		aside, err = s.rename(name)
	}
	if err == nil {
		err = atomicfile.SyncDir(s.root, "blobs")
	}
	if err != nil {
		return "", false, fmt.Errorf("remove blob %s: %w", name, err)
	}
	return aside, full, nil
}

// forget has the index forget a data file.
func (s *Store) forget(name string) error {
	if s.index == nil {
		return nil
	}
	if err := s.index.RemoveCache(name); err != nil {
		return fmt.Errorf("index: %w", err)
	}
	return nil
}

// rename gives a blob's directory a name that nobody opens. The caller holds mu, or is alone.
func (s *Store) rename(name string) (aside string, err error) {
	delete(s.left, name)
	aside = asidePrefix + name + "-" + rand.Text()
	return aside, s.root.Rename(path.Join("blobs", name), path.Join("blobs", aside))
}

// sweepAside deletes a directory that was put aside once nobody uses it, and reports whether it is gone.
func (s *Store) sweepAside(name string) (gone bool, err error) {
	if err := s.removeAside(name, false); err != nil {
		return false, err
	}
	_, err = s.root.Lstat(path.Join("blobs", name))
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	return false, err
}

// CollectBootstraps removes the bootstraps that are not in live. The caller keeps others from storing one meanwhile.
func (s *Store) CollectBootstraps(live map[string]bool) error {
	list, err := fs.ReadDir(s.root.FS(), "bootstraps")
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range list {
		if name := f.Name(); !live[name] && !strings.HasPrefix(name, ".") {
			s.log.Debug("remove a bootstrap that no mount has", zap.String("sha256", name))
			errs = append(errs, s.RemoveBootstrap(name))
		}
	}
	return errors.Join(errs...)
}

// Usage is what the state directory takes on disk, in bytes. Blocks that several data files have count once.
type Usage struct {
	Blobs int64 `json:"blobs_bytes"` // data files and what belongs to them
	Aside int64 `json:"aside_bytes"` // of these, of mounts that lost their daemon
	InUse int64 `json:"in_use_bytes"`
	Pins  int64 `json:"pinned_bytes"` // pinned, and not in use
	Rest  int64 `json:"rest_bytes"`   // bootstraps, records, index
	Count int   `json:"blobs"`
}

// Total is all of it.
func (u Usage) Total() int64 { return u.Blobs + u.Rest }

// Usage adds up what is there.
func (s *Store) Usage(live Live) (u Usage, err error) {
	entries, err := s.Entries(true)
	if err != nil {
		return u, err
	}
	if u.Rest, err = s.rest(); err != nil {
		return u, err
	}
	u.Count = len(entries)
	// What several have counts for the first of these that has it.
	books := newLedger(entries)
	for _, kind := range []struct {
		sum *int64
		is  func(e *Entry) bool
	}{
		{&u.InUse, func(e *Entry) bool { return !e.Aside && (e.InUse || live.Blobs[e.Name]) }},
		{&u.Aside, func(e *Entry) bool { return e.Aside }},
		{&u.Pins, func(e *Entry) bool { return !e.Aside && e.Pinned && !e.InUse && !live.Blobs[e.Name] }},
		{new(int64), func(e *Entry) bool { return !e.Aside && !e.Pinned && !e.InUse && !live.Blobs[e.Name] }},
	} {
		for i := range entries {
			if e := &entries[i]; kind.is(e) {
				n := books.take(e)
				*kind.sum += n
				u.Blobs += n
			}
		}
	}
	return u, nil
}

// rest is what all but blobs take on disk.
func (s *Store) rest() (n int64, err error) {
	err = fs.WalkDir(s.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // a temporary file of somebody else
			}
			return err
		}
		if name == "blobs" {
			return fs.SkipDir
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) || d.IsDir() {
			return nil
		}
		if err != nil {
			return err
		}
		n += allocated(info)
		return nil
	})
	return n, err
}
