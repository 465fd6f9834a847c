package lazy

import (
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/share"
)

// An index that is broken, and cannot be begun anew, keeps no cache from going.
func TestCondemnWithoutIndex(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dir")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	x, err := index.Open(filepath.Join(dir, "index"), index.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := &sharing{index: x, log: zap.NewNop(), sweep: make(chan struct{}, 1), Share: share.New(share.Options{Index: x})}
	c := &cacheIndex{}
	if err := c.RemoveCache("early"); err != nil {
		t.Error(err)
	}
	if err := c.use(s); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := x.Reset(); err == nil {
		t.Fatal("Reset() where there is no directory succeeded")
	}
	if err := c.RemoveCache("one"); err != nil {
		t.Errorf("RemoveCache() = %v, and nothing is in the index", err)
	}
	if err := x.Close(); err != nil {
		t.Error(err)
	}
}
