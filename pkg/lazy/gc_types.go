package lazy

import (
	"fmt"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// ErrPinned is the error of what would remove a part of the cache that is to stay.
var ErrPinned = store.ErrPinned

// CachePolicy says what is removed from a state directory by itself: what no mount has and what is not pinned goes
// when it was not used for Age, and, when all takes more than Limit bytes on disk, what was not used for longest goes until
// Low bytes are left. Zeros mean: never, no limit, and 9/10 of Limit.
type CachePolicy struct {
	Limit int64         `json:"limit_bytes"`
	Low   int64         `json:"low_bytes"`
	Age   time.Duration `json:"age_ns"`
}

func (p CachePolicy) check() error {
	switch {
	case p.Limit < 0 || p.Low < 0 || p.Age < 0:
		return fmt.Errorf("cache policy %+v: want nothing below 0", p)
	case p.Low > 0 && p.Limit == 0:
		return fmt.Errorf("cache policy: a mark of %d bytes to come down to, and no limit", p.Low)
	case p.Low > p.Limit:
		return fmt.Errorf("cache policy: a mark of %d bytes to come down to, above the limit of %d", p.Low, p.Limit)
	}
	return nil
}

func (p CachePolicy) store() store.Policy {
	return store.Policy{Limit: p.Limit, Low: p.Low, Age: p.Age}
}

// CacheEntry is what a state directory has of one blob, and who has it mounted.
type CacheEntry struct {
	store.Entry
	// Mounts are the directories of the mounts that have it, as [Mount].Dir.
	Mounts []string `json:"mounts"`
}

// Cache is what a state directory has. Policy is the daemon's; nil: no daemon runs.
type Cache struct {
	StateDir string       `json:"state_dir"`
	Policy   *CachePolicy `json:"policy,omitempty"`
	Usage    CacheUsage   `json:"usage"`
	Entries  []CacheEntry `json:"entries"`
}

// CacheUsage is what a state directory takes on disk, in bytes.
type CacheUsage = store.Usage

// Collected is what was removed.
type Collected = store.Collected

// Verified is what [Client.VerifyCache] found.
type Verified struct {
	Blobs  int   `json:"blobs"`
	Chunks int64 `json:"chunks"` // that were read
	Bytes  int64 `json:"bytes"`
	// Bad chunks differed from their digests and were dropped; of these, Refetched are there again, because mounts have them.
	Bad       []BadChunk `json:"bad"`
	Refetched int        `json:"refetched"`
	// Removed are blobs of which nothing could be used, by name.
	Removed []string `json:"removed"`
	// Failed says what could not be looked at, or is wrong and stays.
	Failed []string `json:"failed"`
}

// BadChunk is a chunk whose bytes on disk were wrong.
type BadChunk struct {
	Name   string `json:"name"` // of the [CacheEntry]
	Offset int64  `json:"offset"`
	Size   int64  `json:"size"`
	Digest string `json:"digest"`
}

func (v *Verified) add(o Verified) {
	v.Blobs += o.Blobs
	v.Chunks += o.Chunks
	v.Bytes += o.Bytes
	v.Bad = append(v.Bad, o.Bad...)
	v.Refetched += o.Refetched
	v.Removed = append(v.Removed, o.Removed...)
	v.Failed = append(v.Failed, o.Failed...)
}

// cacheCall is what a client asks about the cache.
type cacheCall struct {
	Detail bool         `json:"detail,omitempty"` // ls
	Policy *CachePolicy `json:"policy,omitempty"` // gc; nil: the daemon's own
	Names  []string     `json:"names,omitempty"`  // pin, unpin
	Name   string       `json:"name,omitempty"`   // verify: one blob, from
	Offset int64        `json:"offset,omitempty"` // verify: this byte on
}

// cacheAnswer is what it gets.
type cacheAnswer struct {
	Cache     *Cache     `json:"cache,omitempty"`
	Collected *Collected `json:"collected,omitempty"`
	Verified  *Verified  `json:"verified,omitempty"`
	Next      int64      `json:"next,omitempty"` // verify: where to go on
	Done      bool       `json:"done,omitempty"` // verify: this blob is done
}

// The values of call.Op for the cache. Each call is of bounded work: a client asks again until there is no more to do.
const (
	opCacheList   = "cache-ls"
	opCacheGC     = "cache-gc"
	opCacheVerify = "cache-verify"
	opCachePin    = "cache-pin"
	opCacheUnpin  = "cache-unpin"
)
