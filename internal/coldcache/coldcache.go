// Package coldcache makes the trace of a run on a cold filesystem exact.
//
// Where a filesystem is mounted for one run, with nothing in its page cache and no read-ahead, a page is cached if the
// run had it read, and only then. A trace of such a run has what was certainly touched, and an upper bound: what the
// kernel says that it mapped around a fault, which may be pages that are not even cached. [Refine] asks the kernel which
// are.
package coldcache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// Refine takes what is not cached out of the ranges of accesses that are not certain, and makes the rest certain. root is where
// the filesystem is mounted, and holds files by the paths that accesses have. It reports whether all ranges are certain
// then: files that the runtime read whole count as such, other whole files do not. It must be called before anybody else reads
// the files. It opens files and reads none of them. On an error accesses are as they were. Linux 6.5.
func Refine(root string, accesses []trace.Access) (exact bool, err error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer func() { err = errors.Join(err, unix.Close(dir)) }()
	refined := make([][]trace.Range, len(accesses))
	exact = true
	for i := range accesses {
		a := &accesses[i]
		if refined[i] = a.Ranges; a.Ranges == nil {
			exact = exact && a.How&trace.Runtime != 0
			continue
		}
		if certain(a.Ranges) {
			continue
		}
		if refined[i], err = refine(dir, a); err != nil {
			return false, fmt.Errorf("%s: %w", filepath.Join(root, a.Path), err)
		}
	}
	for i := range accesses {
		accesses[i].Ranges = refined[i]
	}
	return exact, nil
}

func certain(ranges []trace.Range) bool {
	for _, r := range ranges {
		if !r.Certain {
			return false
		}
	}
	return true
}

func refine(dir int, a *trace.Access) (_ []trace.Range, err error) {
	fd, err := unix.Openat2(dir, strings.TrimPrefix(a.Path, "/"), &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	page := int64(os.Getpagesize())
	out := make([]trace.Range, 0, len(a.Ranges))
	for _, r := range a.Ranges {
		if r.Certain {
			out = append(out, r)
			continue
		}
		// Of a whole range that is not cached, one question is enough.
		if n, err := cached(fd, r.Offset, r.Length); err != nil {
			return nil, err
		} else if n == 0 {
			continue
		}
		open := false // the last of out ends at this page
		for at := r.Offset; at < r.Offset+r.Length; at += page {
			length := min(page, r.Offset+r.Length-at)
			n, err := cached(fd, at, length)
			if err != nil {
				return nil, err
			}
			switch {
			case n == 0:
				open = false
			case open:
				out[len(out)-1].Length += length
			default:
				out = append(out, trace.Range{Offset: at, Length: length, Elapsed: r.Elapsed, Certain: true})
				open = true
			}
		}
	}
	return out, nil
}

// cached returns how many pages of a range are in the page cache.
func cached(fd int, off, length int64) (uint64, error) {
	var st unix.Cachestat_t
	err := unix.Cachestat(uint(fd), &unix.CachestatRange{Off: uint64(off), Len: uint64(length)}, &st, 0) //nolint:gosec // positive
	if err != nil {
		return 0, fmt.Errorf("ask which pages are cached (Linux 6.5): %w", err)
	}
	return st.Cache, nil
}
