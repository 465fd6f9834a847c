package peakmem_test

import (
	"os"
	"testing"

	"github.com/headstart-oci/headstart/internal/peakmem"
)

func TestRSS(t *testing.T) {
	before, err := peakmem.RSS(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, 32<<20)
	for i := range page {
		page[i] = byte(i)
	}
	after, err := peakmem.RSS(os.Getpid())
	if err != nil || before < 1<<20 || after < before {
		t.Errorf("RSS = %d, then %d, %v; want a MiB at least, and no less later", before, after, err)
	}
	if after < 32<<20 {
		t.Errorf("RSS = %d with %d bytes in use", after, len(page))
	}
	twice, err := peakmem.RSS(os.Getpid(), os.Getpid())
	if err != nil || twice < 2*after {
		t.Errorf("RSS of two processes of %d bytes = %d, %v", after, twice, err)
	}
	if n, err := peakmem.RSS(os.Getpid(), 1<<30); err == nil || n != 0 {
		t.Errorf("RSS of a process that is none = %d, %v", n, err)
	}
}
