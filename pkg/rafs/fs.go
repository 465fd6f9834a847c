package rafs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

// FS is an image's tree as a read-only file system. Safe for concurrent use. It implements [fs.FS],
// [fs.ReadDirFS], [fs.ReadFileFS], [fs.StatFS] and [fs.ReadLinkFS]; symlinks resolve inside the
// image, absolute ones from its root. Sys of every FileInfo is the *[Inode].
// Names that are not UTF-8 are listed but cannot be opened by path: see [FS.OpenInode].
type FS struct {
	img   *Image
	blobs []func() (*BlobReader, error)
}

// FS returns the image's tree as a file system. open gives the reader of a blob and is called at most once
// per blob, when its first byte is read; with a nil open only metadata can be read. The caller
// closes what open opened when it is done with the file system.
func (img *Image) FS(open func(b Blob) (*BlobReader, error)) *FS {
	f := &FS{img: img}
	for _, b := range img.Blobs {
		f.blobs = append(f.blobs, sync.OnceValues(func() (*BlobReader, error) {
			if open == nil {
				return nil, fmt.Errorf("blob %s: no blobs given: %w", short(b.ID), fs.ErrNotExist)
			}
			r, err := open(b)
			if err != nil {
				return nil, fmt.Errorf("open blob %s: %w", short(b.ID), err)
			}
			return r, nil
		}))
	}
	return f
}

// readChunk returns verified bytes of a chunk.
func (f *FS) readChunk(ctx context.Context, c Chunk) ([]byte, error) {
	if int(c.Blob) >= len(f.blobs) {
		return nil, invalid("chunk", -1, "blob", c.Blob, fmt.Sprintf("below %d", len(f.blobs)))
	}
	r, err := f.blobs[c.Blob]()
	if err != nil {
		return nil, err
	}
	return r.ReadChunk(ctx, c)
}

// maxLinks is how many symlinks one path may pass, as in the kernel (MAXSYMLINKS).
const maxLinks = 40

var errLoop = errors.New("too many levels of symbolic links")

// resolve walks to name; a symlink at the end is followed only when follow is set.
func (f *FS) resolve(op, name string, follow bool) (*Inode, error) {
	fail := func(err error) (*Inode, error) { return nil, &fs.PathError{Op: op, Path: name, Err: err} }
	if !fs.ValidPath(name) {
		return fail(fs.ErrInvalid)
	}
	stack := []*Inode{f.img.Root}
	todo := strings.Split(name, "/")
	for links := 0; len(todo) > 0; {
		at := stack[len(stack)-1]
		element := todo[0]
		todo = todo[1:]
		switch {
		case !at.IsDir():
			return fail(fs.ErrNotExist)
		case element == "" || element == ".":
			continue
		case element == "..":
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		next := at.Child(element)
		if next == nil {
			return fail(fs.ErrNotExist)
		}
		if !next.IsSymlink() || len(todo) == 0 && !follow {
			stack = append(stack, next)
			continue
		}
		if links++; links > maxLinks {
			return fail(errLoop)
		}
		if strings.HasPrefix(next.Target, "/") {
			stack = stack[:1]
		}
		todo = append(strings.Split(next.Target, "/"), todo...)
	}
	return stack[len(stack)-1], nil
}

// Open opens a file or directory; symlinks are followed. Regular files implement
// [io.ReaderAt] and [io.Seeker] too, directories [fs.ReadDirFile].
func (f *FS) Open(name string) (fs.File, error) {
	ino, err := f.resolve("open", name, true)
	if err != nil {
		return nil, err
	}
	info := fileInfo{path.Base(name), ino}
	if ino.IsDir() {
		return &dir{info: info}, nil
	}
	return &File{fs: f, info: info}, nil
}

// OpenInode opens a regular file of the image by its inode. ErrInvalid for other types.
func (f *FS) OpenInode(ino *Inode) (*File, error) {
	if !ino.IsRegular() {
		return nil, invalid("inode", -1, "mode", fmt.Sprintf("%#o", ino.Mode), "a regular file")
	}
	return &File{fs: f, info: fileInfo{"", ino}}, nil
}

// Stat describes the file at name; symlinks are followed.
func (f *FS) Stat(name string) (fs.FileInfo, error) {
	ino, err := f.resolve("stat", name, true)
	if err != nil {
		return nil, err
	}
	return fileInfo{path.Base(name), ino}, nil
}

// Lstat describes the file at name; a symlink at its end is not followed.
func (f *FS) Lstat(name string) (fs.FileInfo, error) {
	ino, err := f.resolve("lstat", name, false)
	if err != nil {
		return nil, err
	}
	return fileInfo{path.Base(name), ino}, nil
}

// ReadLink returns the target of the symlink at name, as it is stored.
func (f *FS) ReadLink(name string) (string, error) {
	ino, err := f.resolve("readlink", name, false)
	if err != nil {
		return "", err
	}
	if !ino.IsSymlink() {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	return ino.Target, nil
}

// ReadDir lists a directory in order of name bytes.
func (f *FS) ReadDir(name string) ([]fs.DirEntry, error) {
	ino, err := f.resolve("readdir", name, true)
	if err != nil {
		return nil, err
	}
	if !ino.IsDir() {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: errors.New("not a directory")}
	}
	return dirEntries(ino.Children), nil
}

// ReadFile returns the content of the file at name. Memory grows with verified
// bytes, not with the size the image claims.
func (f *FS) ReadFile(name string) ([]byte, error) {
	ino, err := f.resolve("read", name, true)
	if err != nil {
		return nil, err
	}
	var p sliceWriter
	if err := f.CopyFile(context.Background(), &p, ino); err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	if p == nil {
		p = []byte{}
	}
	return p, nil
}

type sliceWriter []byte

func (s *sliceWriter) Write(p []byte) (int, error) {
	*s = append(*s, p...)
	return len(p), nil
}

// CopyFile writes the content of a regular file to w, chunk by chunk, each verified
// before it is written. Errors are those of [BlobReader.ReadChunk] and of w.
func (f *FS) CopyFile(ctx context.Context, w io.Writer, ino *Inode) error {
	if !ino.IsRegular() {
		return invalid("inode", -1, "mode", fmt.Sprintf("%#o", ino.Mode), "a regular file")
	}
	for _, c := range ino.Chunks {
		p, err := f.readChunk(ctx, c)
		if err != nil {
			return err
		}
		if _, err := w.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// fileInfo implements [fs.FileInfo].
type fileInfo struct {
	name  string
	inode *Inode
}

func (i fileInfo) Name() string       { return i.name }
func (i fileInfo) Size() int64        { return clampOffset(i.inode.Size) }
func (i fileInfo) Mode() fs.FileMode  { return i.inode.FileMode() }
func (i fileInfo) ModTime() time.Time { return i.inode.ModTime() }
func (i fileInfo) IsDir() bool        { return i.inode.IsDir() }
func (i fileInfo) Sys() any           { return i.inode }

// dirEntries converts children. They are sorted by bytes already; ReadDir wants it by
// name, which is the same.
func dirEntries(children []Dirent) []fs.DirEntry {
	entries := make([]fs.DirEntry, len(children))
	for i, c := range children {
		entries[i] = fs.FileInfoToDirEntry(fileInfo{c.Name, c.Inode})
	}
	if !slices.IsSortedFunc(children, func(a, b Dirent) int { return cmp.Compare(a.Name, b.Name) }) {
		slices.SortFunc(entries, func(a, b fs.DirEntry) int { return cmp.Compare(a.Name(), b.Name()) })
	}
	return entries
}

// dir is an open directory.
type dir struct {
	info fileInfo
	next int
}

func (d *dir) Stat() (fs.FileInfo, error) { return d.info, nil }
func (d *dir) Close() error               { return nil }

func (d *dir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.info.name, Err: errors.New("is a directory")}
}

func (d *dir) ReadDir(n int) ([]fs.DirEntry, error) {
	rest := d.info.inode.Children[d.next:]
	if n <= 0 {
		d.next += len(rest)
		return dirEntries(rest), nil
	}
	if len(rest) == 0 {
		return nil, io.EOF
	}
	rest = rest[:min(n, len(rest))]
	d.next += len(rest)
	return dirEntries(rest), nil
}

// File is an open file. ReadAt may be called from several goroutines at once; it keeps
// the last chunk it read.
type File struct {
	fs   *FS
	info fileInfo

	mu     sync.Mutex // guards what follows
	offset int64
	chunk  []byte // the chunk read last
	index  int    // its place in the file
	closed bool
}

// Stat describes the file.
func (f *File) Stat() (fs.FileInfo, error) { return f.info, nil }

// Close forgets the kept chunk; later reads fail with [fs.ErrClosed]. Calling it again is harmless.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed, f.chunk = true, nil
	return nil
}

// Read reads from the current offset.
func (f *File) Read(p []byte) (int, error) {
	f.mu.Lock()
	offset := f.offset
	f.mu.Unlock()
	n, err := f.ReadAt(p, offset)
	f.mu.Lock()
	f.offset = offset + int64(n)
	f.mu.Unlock()
	if n > 0 {
		err = nil
	}
	return n, err
}

// Seek sets the offset of the next Read.
func (f *File) Seek(offset int64, whence int) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		offset += f.offset
	case io.SeekEnd:
		offset += f.info.Size()
	default:
		return 0, &fs.PathError{Op: "seek", Path: f.info.name, Err: fs.ErrInvalid}
	}
	if offset < 0 {
		return 0, &fs.PathError{Op: "seek", Path: f.info.name, Err: fs.ErrInvalid}
	}
	f.offset = offset
	return offset, nil
}

// ReadAt reads len(p) bytes at offset; fewer, with [io.EOF], at the end of the file.
func (f *File) ReadAt(p []byte, offset int64) (int, error) {
	fail := func(err error) error { return &fs.PathError{Op: "read", Path: f.info.name, Err: err} }
	if !f.info.inode.IsRegular() || offset < 0 {
		return 0, fail(fs.ErrInvalid)
	}
	f.mu.Lock()
	closed := f.closed
	f.mu.Unlock()
	if closed {
		return 0, fail(fs.ErrClosed)
	}
	size, unit := f.info.Size(), int64(f.fs.img.ChunkSize)
	var n int
	for n < len(p) {
		at := offset + int64(n)
		if at >= size {
			return n, io.EOF
		}
		data, err := f.chunkAt(int(at / unit))
		if err != nil {
			return n, fail(err)
		}
		if at%unit >= int64(len(data)) {
			return n, fail(io.ErrUnexpectedEOF)
		}
		n += copy(p[n:], data[at%unit:])
	}
	return n, nil
}

// chunkAt returns chunk i, from the last read if it was that one.
func (f *File) chunkAt(i int) ([]byte, error) {
	f.mu.Lock()
	chunk, index, closed := f.chunk, f.index, f.closed
	f.mu.Unlock()
	switch {
	case closed:
		return nil, fs.ErrClosed
	case chunk != nil && index == i:
		return chunk, nil
	case i >= len(f.info.inode.Chunks):
		return nil, io.ErrUnexpectedEOF
	}
	chunk, err := f.fs.readChunk(context.Background(), f.info.inode.Chunks[i])
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	if !f.closed {
		f.chunk, f.index = chunk, i
	}
	f.mu.Unlock()
	return chunk, nil
}
