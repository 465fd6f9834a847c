package lazy

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// Protocol is the version of what client and daemon say to each other. A message is 4
// bytes of length, little-endian, and as many of JSON; the descriptor of a mount goes with the
// first byte. Every version has the fields protocol and version in every message.
const Protocol = 1

// maxMessage bounds a message in bytes: the status of several thousand mounts.
const maxMessage = 16 << 20

// call is what a client asks.
type call struct {
	Protocol int    `json:"protocol"`
	Version  string `json:"version"`
	Op       string `json:"op"`

	Request *Request `json:"request,omitempty"` // mount
	Dir     string   `json:"dir,omitempty"`     // mount, attached: where, for people to read
	Device  uint64   `json:"device,omitempty"`  // check, wait: of which mount
	Detail  bool     `json:"detail,omitempty"`  // status: with misses
	// Files are the local files of the request as the client sees them: the daemon may live in
	// another mount namespace.
	Files []fileID `json:"files,omitempty"`
	Error string   `json:"error,omitempty"` // attached: why it was not
	// Program is the file to go on with; restart.
	Program string `json:"program,omitempty"`

	Cache *cacheCall `json:"cache,omitempty"` // those of the cache
}

// fileID is a file or directory at a path.
type fileID struct {
	Path string `json:"path"`
	Dev  uint64 `json:"dev"`
	Ino  uint64 `json:"ino"`
}

func identify(path string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fileID{}, &os.PathError{Op: "look at", Path: path, Err: err}
	}
	return fileID{Path: path, Dev: st.Dev, Ino: st.Ino}, nil
}

// The values of call.Op.
const (
	opMount    = "mount"    // answered with a detached mount, which the client attaches
	opAttached = "attached" // follows on the same connection
	opStatus   = "status"
	opCheck    = "check" // look for superblocks that are gone
	opWait     = "wait"  // until the mount is complete
	opRestart  = "restart"
)

// answer is what the daemon says.
type answer struct {
	Protocol int      `json:"protocol"`
	Version  string   `json:"version"`
	Error    string   `json:"error,omitempty"`
	Classes  []string `json:"classes,omitempty"` // of the error
	Status   *Status  `json:"status,omitempty"`
	Mount    *Mount   `json:"mount,omitempty"`

	Cache *cacheAnswer `json:"cache,omitempty"`
}

// classes are errors that stay themselves on the way from the daemon to its client.
var classes = map[string]error{
	"fanotify-permission": fanotify.ErrPermission, "fanotify-unsupported": fanotify.ErrUnsupported,
	"invalid": nydusimage.ErrInvalid, "locked": store.ErrLocked, "unsupported": ErrUnsupported, "permission": ErrPermission,
	"version": ErrVersion, "pinned": ErrPinned, "not-mounted": ErrNotMounted, "failed": ErrFailed, "canceled": context.Canceled,
	"rafs-digest": rafs.ErrDigest, "rafs-invalid": rafs.ErrInvalid, "rafs-unsupported": rafs.ErrUnsupported,
	"remote-digest": remote.ErrDigest, "remote-invalid": remote.ErrInvalid, "remote-not-found": remote.ErrNotFound,
	"remote-platform": remote.ErrPlatform, "remote-stalled": remote.ErrStalled, "remote-unauthorized": remote.ErrUnauthorized,
	"remote-unavailable": remote.ErrUnavailable, "remote-unsupported": remote.ErrUnsupported,
	"no-file": fs.ErrNotExist, "no-space": unix.ENOSPC,
}

// remoteError is an error of the daemon at its client.
type remoteError struct {
	text string
	is   []error
}

func (e *remoteError) Error() string   { return e.text }
func (e *remoteError) Unwrap() []error { return e.is }

// failure is the answer that tells err.
func failure(err error) answer {
	a := answer{Error: err.Error()}
	for name, class := range classes {
		if errors.Is(err, class) {
			a.Classes = append(a.Classes, name)
		}
	}
	slices.Sort(a.Classes)
	return a
}

// err is the error that the answer tells, nil when it tells none.
func (a *answer) err() error {
	if a.Error == "" {
		return nil
	}
	e := &remoteError{text: a.Error}
	for _, name := range a.Classes {
		if class := classes[name]; class != nil {
			e.is = append(e.is, class)
		}
	}
	return e
}

// writeMessage sends v, and f with it unless it is nil.
func writeMessage(c *net.UnixConn, v any, f *os.File) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("message of %d bytes, want at most %d", len(b), maxMessage)
	}
	frame := binary.LittleEndian.AppendUint32(nil, uint32(len(b))) //nolint:gosec // bounded above
	var rights []byte
	if f != nil {
		rights = unix.UnixRights(int(f.Fd()))
	}
	if _, _, err := c.WriteMsgUnix(frame, rights, nil); err != nil {
		return err
	}
	_, err = c.Write(b)
	return err
}

// readMessage receives v, and the descriptor that came with it, if one did. io.EOF when the
// other has nothing more to say.
func readMessage(c *net.UnixConn, v any) (f *os.File, err error) {
	var size [4]byte
	oob := make([]byte, unix.CmsgSpace(4*16))
	n, oobn, _, _, err := c.ReadMsgUnix(size[:], oob)
	if err == nil && oobn > 0 {
		f, err = oneFile(oob[:oobn])
	}
	if err == nil && n < len(size) {
		_, err = io.ReadFull(c, size[n:])
	}
	if err == nil {
		length := binary.LittleEndian.Uint32(size[:])
		if length > maxMessage {
			err = fmt.Errorf("message of %d bytes, want at most %d: who speaks there?", length, maxMessage)
		} else {
			b := make([]byte, length)
			if _, err = io.ReadFull(c, b); err == nil {
				err = json.Unmarshal(b, v)
			}
		}
	}
	if err != nil && f != nil {
		err = errors.Join(err, f.Close())
		f = nil
	}
	return f, err
}

// oneFile returns the first descriptor in control data and closes others.
func oneFile(oob []byte) (f *os.File, err error) {
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
			if f == nil {
				f = os.NewFile(uintptr(fd), "mount")
			} else {
				_ = unix.Close(fd)
			}
		}
	}
	return f, nil
}
