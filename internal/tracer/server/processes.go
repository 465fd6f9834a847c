package server

import (
	"bytes"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// maxStatus is more than the head of /proc/PID/status takes that is read, in bytes.
const maxStatus = 1 << 10

// relative is what is known of a process' place in the tree.
type relative struct {
	parent int32
	seen   int  // in what order processes were seen
	past   bool // its number was given to another process, or to a thread, since
}

// process returns the process that a thread belongs to. Of a thread that is gone, and that is not known
// to have been a process, the one that made it is the best guess.
func (c *comms) process(thread int32) int32 {
	if p, ok := c.status(thread, "Tgid"); ok && p > 0 {
		return p
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if r, ok := c.tree[thread]; ok && !r.past || thread == c.first {
		return thread
	}
	if maker, ok := c.born[thread]; ok {
		return maker
	}
	return thread
}

// forked notes that a thread or process was made by a process. Which of the two it is shows when
// it does something, and then what is noted here counts for those that are gone by then.
func (c *comms) forked(child, parent int32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, again := c.born[child]
	if again || len(c.born) < maxThreads {
		c.born[child] = parent
	}
	if !again {
		return // what is known of the number, if anything, is of this child: forks are heard of late
	}
	delete(c.cache, child)
	if r, ok := c.tree[child]; ok {
		r.past = true
		c.tree[child] = r
	}
}

// place notes a process and its ancestors, as far as they are known. The caller holds mu.
func (c *comms) place(pid int32) {
	for range maxDepth {
		if pid <= 0 || pid == c.outside {
			return
		}
		before, ok := c.tree[pid]
		if ok && !before.past || !ok && len(c.tree) >= maxThreads {
			return
		}
		seen := len(c.tree)
		if ok { // of two processes with one number, a list can tell of the later
			seen = before.seen
			delete(c.names, pid)
		}
		parent, known := c.born[pid]
		if !known {
			parent, _ = c.status(pid, "PPid")
		}
		if pid == c.first || parent == c.outside {
			parent = 0 // outside the container
		}
		c.tree[pid] = relative{parent: parent, seen: seen}
		if name, alive := c.read(pid); alive {
			c.names[pid] = name
		}
		pid = parent
	}
}

// maxDepth bounds the way from a process to the container's first.
const maxDepth = 256

// processes returns those that were noted, in the order of first sight, and their ancestors.
func (c *comms) processes() []trace.Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Those that were gone before they could be asked: forks tell who made them.
	orphans := make([]int32, 0, len(c.tree))
	for pid, r := range c.tree {
		if r.parent == 0 && !r.past && pid != c.first && c.born[pid] != 0 {
			orphans = append(orphans, pid)
		}
	}
	slices.SortFunc(orphans, func(a, b int32) int { return c.tree[a].seen - c.tree[b].seen })
	for _, pid := range orphans {
		r := c.tree[pid]
		r.parent = c.born[pid]
		c.tree[pid] = r
		c.place(r.parent)
	}
	out := make([]trace.Process, len(c.tree))
	for pid, r := range c.tree {
		out[r.seen] = trace.Process{PID: pid, Parent: r.parent, Command: c.names[pid]}
	}
	return out
}

// status returns a number from /proc/PID/status; false when the process is gone.
func (c *comms) status(pid int32, field string) (int32, bool) {
	fd, err := unix.Openat(c.proc, strconv.Itoa(int(pid))+"/status", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, false
	}
	var b [maxStatus]byte
	n, err := unix.Read(fd, b[:])
	if cerr := unix.Close(fd); err != nil || cerr != nil {
		return 0, false
	}
	_, rest, ok := bytes.Cut(b[:n], []byte("\n"+field+":\t"))
	line, _, ended := bytes.Cut(rest, []byte("\n"))
	v, err := strconv.ParseInt(string(line), 10, 32)
	return int32(v), ok && ended && err == nil
}
