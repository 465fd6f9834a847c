package server

import (
	"bytes"
	"math"
	"os"
	"path"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// commFresh is how long a command name is believed without asking again; a process
	// may change it, and its id may be reused.
	commFresh = 100 * time.Millisecond
	// maxComm is more than a command name and its newline take, in bytes: the kernel's
	// TASK_COMM_LEN is 16, and kernel threads' names may be longer.
	maxComm = 64
	// taskComm is how many bytes of a name the kernel keeps: TASK_COMM_LEN less the end.
	taskComm = 15
	// maxComms bounds the cache; it is emptied when full.
	maxComms = 4096
)

// comms tells the command names of processes and who made them. Safe for concurrent use.
type comms struct {
	proc    int   // the host's /proc
	first   int32 // the container's first process
	outside int32 // this process

	// mu guards what follows.
	mu    sync.Mutex
	cache map[int32]comm
	names map[int32]string // the last name of each process of the tree
	tree  map[int32]relative
	born  map[int32]int32 // by a fork: who made it
	list  []string        // of names that were given numbers
	at    map[string]uint16
}

type comm struct {
	name  string
	at    time.Time
	stale bool      // the process was about to execute something else
	since time.Time // when it was
	next  string    // what it will be called then, as far as the file's name tells
}

func newComms(proc, first int) *comms {
	return &comms{
		proc: proc, first: int32(first), outside: int32(os.Getpid()), //nolint:gosec // process ids fit: the kernel's limit is 2^22
		cache: make(map[int32]comm), names: make(map[int32]string), tree: make(map[int32]relative), born: make(map[int32]int32),
		list: []string{""}, at: map[string]uint16{"": 0},
	}
}

// of returns the command name of process pid, "" when it is unknown. exec says that the
// process is executing a file, after which its name will be another.
func (c *comms) of(pid int32, exec bool) string {
	if pid <= 0 {
		return ""
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	have, ok := c.cache[pid]
	if ok && !have.stale && now.Sub(have.at) < commFresh {
		if exec {
			have.stale, have.since = true, now
			c.cache[pid] = have
		}
		return have.name
	}
	name, alive := c.read(pid)
	switch {
	case !alive && have.stale:
		name = have.next
	case !alive:
		name = have.name // what it was called when it was last seen
	}
	if len(c.cache) >= maxComms {
		clear(c.cache)
	}
	next := comm{name: name, at: now, stale: exec, since: now}
	if alive && !exec && have.stale && name == have.name && now.Sub(have.since) < commFresh {
		// It opened what it will execute and is not there yet.
		next.stale, next.next, next.since = true, have.next, have.since
	}
	c.cache[pid] = next
	c.place(pid)
	if _, ok := c.tree[pid]; ok && name != "" {
		c.names[pid] = name
	}
	return name
}

// number returns a number for a command name, 0 for none and for what is too many.
func (c *comms) number(name string) uint16 {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, ok := c.at[name]
	if !ok && len(c.list) < math.MaxUint16 {
		n = uint16(len(c.list)) //nolint:gosec // bounded above
		c.list, c.at[name] = append(c.list, name), n
	}
	return n
}

// called returns the name that has a number.
func (c *comms) called(n uint16) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.list[n]
}

// changes notes that process pid is about to execute a file that is known already.
func (c *comms) changes(pid int32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if have, ok := c.cache[pid]; ok {
		have.stale, have.next, have.since = true, "", time.Now()
		c.cache[pid] = have
	}
}

// executes notes the file that process pid, of which c was asked, is about to execute. The
// first one counts: interpreters follow. Source: fs/exec.c begin_new_exec.
func (c *comms) executes(pid int32, file string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	have, ok := c.cache[pid]
	if !ok || !have.stale || have.next != "" {
		return
	}
	have.next = path.Base(file)
	have.next = have.next[:min(len(have.next), taskComm)]
	c.cache[pid] = have
}

func (c *comms) read(pid int32) (string, bool) {
	fd, err := unix.Openat(c.proc, strconv.Itoa(int(pid))+"/comm", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", false
	}
	var b [maxComm]byte
	n, err := unix.Read(fd, b[:])
	if cerr := unix.Close(fd); err != nil || cerr != nil {
		return "", false
	}
	return string(bytes.TrimSuffix(b[:n], []byte("\n"))), true
}
