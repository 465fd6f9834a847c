package lazy

import (
	"sync"
	"weak"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// trees are those of FUSE mounts, by the digests of their bootstraps: mounts of one image have one. It goes with the last of them. Safe for
// concurrent use.
type trees struct {
	mu   sync.Mutex // guards what follows
	live map[string]weak.Pointer[fuse.Tree]
}

// get returns the tree of a bootstrap, whose image was aligned.
func (t *trees) get(digest string, img *rafs.Image) (*fuse.Tree, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if tree := t.live[digest].Value(); tree != nil {
		return tree, nil
	}
	tree, err := fuse.NewTree(img)
	if err != nil {
		return nil, err
	}
	for digest, p := range t.live {
		if p.Value() == nil {
			delete(t.live, digest)
		}
	}
	if t.live == nil {
		t.live = map[string]weak.Pointer[fuse.Tree]{}
	}
	t.live[digest] = weak.Make(tree)
	return tree, nil
}
