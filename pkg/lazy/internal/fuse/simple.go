package fuse

import (
	"bytes"
	"os"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// copyLimit is the most that an answer copies through memory; what is larger goes through a pipe.
const copyLimit = 128 << 10

// answers are buffers for them, for all servers of the process. The header ends where a page does, so that data comes in whole pages.
var answers = sync.Pool{New: func() any {
	p := make([]byte, blockSize+copyLimit)
	p = p[blockSize-sizeOutHeader:]
	return &p
}}

// simple answers what takes no data of the blobs, and therefore at once.
func (s *Server) simple(h *fuse.InHeader, in []byte) {
	buf := answers.Get().(*[]byte)
	defer answers.Put(buf)
	p := *buf
	n, errno := s.answer(h, in, p[sizeOutHeader:])
	if n < 0 {
		return
	}
	if errno != 0 {
		n = 0
	}
	putHeader(p, h.Unique, int32(errno), sizeOutHeader+n) //nolint:gosec // an errno
	s.send(p[:sizeOutHeader+n])
}

// answer writes the answer to a request and returns its length, negative when there is none.
func (s *Server) answer(h *fuse.InHeader, in, out []byte) (n int, errno unix.Errno) {
	switch h.Opcode {
	case opForget, opBatchForget, opNotifyReply:
		return -1, 0
	case opInit:
		return s.init(in, out)
	case opDestroy, opRelease, opReleasedir:
		return 0, 0
	case opOpen:
		return s.open(fuse.CAP_NO_OPEN_SUPPORT, fuse.FOPEN_KEEP_CACHE, out)
	case opOpendir:
		return s.open(fuse.CAP_NO_OPENDIR_SUPPORT, fuse.FOPEN_KEEP_CACHE|fuse.FOPEN_CACHE_DIR, out)
	}
	node := s.c.Tree.node(h.NodeId)
	if node == nil {
		return 0, unix.ESTALE
	}
	switch h.Opcode {
	case opLookup:
		return s.lookup(h, in[sizeInHeader:], out)
	case opGetattr:
		a := view[fuse.AttrOut](out)
		*a = fuse.AttrOut{AttrValid: forever}
		s.c.Tree.attr(h.NodeId, &a.Attr)
		return len(raw(a)), 0
	case opReadlink:
		if node.mode&modeType != modeLink {
			return 0, unix.EINVAL
		}
		return copy(out, s.c.Tree.target(node)), 0
	case opStatfs:
		a := view[fuse.StatfsOut](out)
		s.c.Tree.statfs(a)
		return len(raw(a)), 0
	case opGetxattr, opListxattr:
		return xattrs(h, s.c.Tree.xattrs[h.NodeId], in, out)
	case opReaddir, opReaddirplus:
		return s.readdir(h, node, in, out)
	}
	return 0, unix.ENOSYS // what has no other meaning than "not here": the kernel does not ask again
}

// init agrees with the kernel on what is used.
func (s *Server) init(in, out []byte) (int, unix.Errno) {
	const fields = 40 + 16 // the header, and what every kernel sends
	if len(in) < fields {
		return 0, unix.EINVAL
	}
	q := new(fuse.InitIn)
	copy(raw(q), in)
	if q.Major != major || q.Minor < minMinor {
		s.c.Log.Error("the kernel's FUSE is too old", zap.Uint32("major", q.Major), zap.Uint32("minor", q.Minor), zap.Int("want", minMinor))
		return 0, unix.EPROTO
	}
	flags := q.Flags64() & wanted
	if s.c.Tree.acls { // it has the kernel ask for ACLs of every inode
		flags |= q.Flags64() & fuse.CAP_POSIX_ACL
	}
	a := view[fuse.InitOut](out)
	*a = fuse.InitOut{
		Major: major, Minor: min(q.Minor, ourMinor), MaxReadAhead: q.MaxReadAhead, MaxBackground: background, CongestionThreshold: congested,
		MaxWrite: maxWrite, TimeGran: 1, MaxPages: uint16(maxRead / os.Getpagesize()), Flags: uint32(flags), Flags2: uint32(flags >> 32), //nolint:gosec // at most 128 pages
	}
	s.c.Table.agree(flags) // before the kernel acts on it
	return len(raw(a)), 0
}

// open answers an open: with ENOSYS the kernel spares itself later ones, where it agreed to that.
func (s *Server) open(unneeded uint64, flags uint32, out []byte) (int, unix.Errno) {
	if s.c.Table.agreed()&unneeded != 0 {
		return 0, unix.ENOSYS
	}
	a := view[fuse.OpenOut](out)
	*a = fuse.OpenOut{OpenFlags: flags}
	return len(raw(a)), 0
}

func (s *Server) lookup(h *fuse.InHeader, name, out []byte) (int, unix.Errno) {
	name = cut(name)
	id := h.NodeId
	switch {
	case len(name) > rafs.MaxName:
		return 0, unix.ENAMETOOLONG
	case string(name) == ".": // of a handle that was made of a file (fs/fuse/inode.c fuse_get_dentry)
	case !s.c.Tree.node(h.NodeId).isDir():
		return 0, unix.ENOTDIR
	default:
		id = s.c.Tree.child(h.NodeId, name)
	}
	a := view[fuse.EntryOut](out)
	if id == 0 {
		*a = fuse.EntryOut{EntryValid: forever} // the kernel remembers that there is none
	} else {
		s.c.Tree.entry(id, a)
	}
	return len(raw(a)), 0
}

// cut returns a name without its end.
func cut(p []byte) []byte {
	name, _, _ := bytes.Cut(p, []byte{0})
	return name
}

func (s *Server) readdir(h *fuse.InHeader, dir *node, in, out []byte) (int, unix.Errno) {
	q := view[fuse.ReadIn](in)
	switch {
	case q == nil:
		return 0, unix.EINVAL
	case !dir.isDir():
		return 0, unix.ENOTDIR
	}
	entries := fuse.NewDirEntryList(out[:min(int(q.Size), len(out))], q.Offset)
	s.c.Tree.list(h.NodeId, q.Offset, h.Opcode == opReaddirplus, entries)
	return len(entries.Bytes()), 0
}

// xattrs answers for the value of one xattr, or the names of all.
func xattrs(h *fuse.InHeader, all []rafs.Xattr, in, out []byte) (int, unix.Errno) {
	q := view[fuse.GetXAttrIn](in)
	if q == nil {
		return 0, unix.EINVAL
	}
	n, found := 0, h.Opcode == opListxattr
	add := func(p string) {
		if n+len(p) <= len(out) {
			copy(out[n:], p)
		}
		n += len(p)
	}
	name := string(cut(in[len(raw(q)):]))
	for _, x := range all {
		switch {
		case h.Opcode == opListxattr && (h.Uid == 0 || !bytes.HasPrefix([]byte(x.Name), []byte("trusted."))):
			// As elsewhere, only who may read them sees trusted ones (xattr(7)); whose capabilities these are is not told here.
			add(x.Name + "\x00")
		case h.Opcode == opGetxattr && x.Name == name:
			found = true
			add(string(x.Value))
		}
	}
	switch {
	case !found:
		return 0, unix.ENODATA
	case q.Size == 0:
		a := view[fuse.GetXAttrOut](out)
		*a = fuse.GetXAttrOut{Size: uint32(n)}
		return len(raw(a)), 0
	case n > int(q.Size):
		return 0, unix.ERANGE
	case n > len(out):
		return 0, unix.E2BIG
	}
	return n, 0
}
