package store

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Reserve takes the room on disk that Put of chunk c needs, and changes no data. An error is ENOSPC or EDQUOT; where the file system
// cannot do so it returns nil. Blocks that are shared with another file may need room all the same.
func (b *Blob) Reserve(c rafs.Chunk) error {
	r := record(c)
	for {
		err := unix.Fallocate(int(b.data.Fd()), unix.FALLOC_FL_KEEP_SIZE, int64(r.Offset), int64(r.end()*BlockSize-r.Offset)) //nolint:gosec // below Size
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
			return fmt.Errorf("blob %s: room for chunk %d at %d: %w", b.name, c.Index, r.Offset, err)
		}
		return nil
	}
}
