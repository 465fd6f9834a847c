// Package hold keeps the descriptors of a daemon alive when the daemon dies.
//
// Beside the daemon lives its holder, a small process that does nothing but keep named
// descriptors and start the daemon again with them. Each watches the other: a daemon that is
// gone is started anew and finds its descriptors ([Join]), a holder that is gone is replaced
// by the daemon, which gives the new one everything. So either may be killed at any moment and
// no kept descriptor is closed.
//
// A second holder, the spare, which the daemon starts when it has lived for a moment, has the same descriptors. It takes
// the holder's place when daemon and holder are gone together. The holder has a duplicate of the daemon's end of the
// socket to the spare: the spare sees the end of that socket when neither of them is there any more, and never two of them start
// a daemon. What is lost is lost when all three die within the moment that it takes to start a process.
//
// In the daemon:
//
//	link, taken, err := hold.Join(hold.Options{Holder: []string{"optimizer", "lazyd", "--hold"}, …})
//	if f := taken.Files["listener"]; f == nil {
//		… open it, and link.Keep("listener", f)
//	}
//	…
//	err = link.Done() // and the holder ends too
//
// The holder's process calls [Run]. Messages go one way at a time and are never answered:
// what was sent counts as held, because a socket's queue outlives its sender.
package hold

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// A message between daemon and holder is one packet of JSON with descriptors, in the order of Names.
type message struct {
	Op    string   `json:"op"`
	Names []string `json:"names,omitempty"`
	// Argv is the daemon's command line, Program the file to start; empty: the holder's own.
	Argv    []string `json:"argv,omitempty"`
	Program string   `json:"program,omitempty"`
	// Whole: what was sent before is everything that there is.
	Whole bool `json:"whole,omitempty"`
	// Known, with the name of the holder's pidfd: that holder has a duplicate of the socket to the spare that this is for.
	Known bool `json:"known,omitempty"`
}

// The values of message.Op.
const (
	opDaemon = "daemon" // Argv, and Program, start the daemon again
	opKeep   = "keep"   // names and descriptors; a name that is there already is replaced
	opEnd    = "end"    // of a list; Whole
	opDrop   = "drop"   // names
	opDone   = "done"   // end, and do not start the daemon again
)

// Limits of one message.
const (
	maxFiles   = 100     // the kernel takes 253 (SCM_MAX_FD)
	maxName    = 255     // bytes
	maxMessage = 1 << 16 // bytes; maxFiles names of maxName bytes fit
	// sendBuffer holds several thousand descriptors before a sender waits.
	sendBuffer = 4 << 20
)

// Descriptors that a process is started with.
const (
	fdLink = 3 // the socket to the other
	fdPeer = 4 // of a holder: a pidfd of the daemon
)

// envHeld says to a daemon that its holder started it.
const envHeld = "HEADSTART_HELD"

// pair returns two connected packet sockets.
func pair() (mine *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	for _, fd := range fds {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) != nil {
			// Without CAP_NET_ADMIN up to the system's limit; then the sender waits.
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer)
		}
	}
	theirs = os.NewFile(uintptr(fds[1]), "holder link")
	if mine, err = adopt(fds[0]); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return mine, theirs, nil
}

// adopt makes a connection of the descriptor of a packet socket, which it takes over.
func adopt(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "holder link")
	c, err := net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("descriptor %d is no unix socket", fd), c.Close())
	}
	return u, nil
}

// send sends one message.
func send(c *net.UnixConn, m message, fds []int) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("message of %d bytes, want at most %d", len(b), maxMessage)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, rights, nil)
	return err
}

// sendFiles sends files in as few messages as the limits allow, sorted by name.
func sendFiles(c *net.UnixConn, files map[string]*os.File) error {
	var names []string
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)
	for batch := range slices.Chunk(names, maxFiles) {
		fds := make([]int, len(batch))
		for i, n := range batch {
			fds[i] = int(files[n].Fd())
		}
		if err := send(c, message{Op: opKeep, Names: batch}, fds); err != nil {
			return err
		}
	}
	return nil
}

// receive returns the next message and its descriptors; io.EOF when the other is gone.
func receive(c *net.UnixConn) (message, []*os.File, error) {
	b, oob := make([]byte, maxMessage+1), make([]byte, unix.CmsgSpace(4*253))
	n, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return message{}, nil, err
	}
	files, err := received(oob[:oobn])
	var m message
	if err == nil {
		err = json.Unmarshal(b[:n], &m)
	}
	switch {
	case err != nil:
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = fmt.Errorf("message %q was cut: too many descriptors are open", m.Op)
	case m.Op == opKeep && len(files) != len(m.Names):
		err = fmt.Errorf("message has %d descriptors and %d names", len(files), len(m.Names))
	case m.Op != opKeep && len(files) > 0:
		err = fmt.Errorf("message %q has %d descriptors, want none", m.Op, len(files))
	}
	if err != nil {
		for _, f := range files {
			err = errors.Join(err, f.Close())
		}
		return message{}, nil, err
	}
	return m, files, nil
}

// received returns the descriptors in a message's control data.
func received(oob []byte) (files []*os.File, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	parts, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range parts {
		fds, err := unix.ParseUnixRights(&parts[i])
		if err != nil {
			continue // no descriptors in this part
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "held"))
		}
	}
	return files, nil
}
