package builder

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestEarlyWriter writes more than is written to the disk at once, in pieces of all sizes, to a file and to what is none.
func TestEarlyWriter(t *testing.T) {
	t.Parallel()
	want := make([]byte, 3*earlyBytes+1000)
	if _, err := rand.NewChaCha8([32]byte{1}).Read(want); err != nil {
		t.Fatal(err)
	}
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	piped := make(chan []byte, 1)
	go func() {
		all, _ := io.ReadAll(r) // what is missing is seen below
		piped <- all
	}()
	o := Options{WriteEarly: true}
	for _, f := range []*os.File{file, pipe} {
		w := o.writer(f)
		rng := rand.New(rand.NewPCG(1, 2))
		for p := want; len(p) > 0; {
			n := min(len(p), 1+rng.IntN(earlyBytes+earlyBytes/2))
			if m, err := w.Write(p[:n]); m != n || err != nil {
				t.Fatalf("Write = %d, %v, want %d", m, err, n)
			}
			p = p[n:]
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	got, err := os.ReadFile(file.Name())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the file has %d bytes, want %d, the same (%v)", len(got), len(want), err)
	}
	if got := <-piped; !bytes.Equal(got, want) {
		t.Errorf("the pipe had %d bytes, want %d, the same", len(got), len(want))
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if n, err := o.writer(file).Write([]byte("x")); n != 0 || err == nil {
		t.Errorf("Write to a closed file = %d, %v", n, err)
	}
}
