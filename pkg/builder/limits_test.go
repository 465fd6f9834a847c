package builder_test

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
)

// TestFullDisk builds into a file system that is too small.
func TestFullDisk(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		testenv.Kernel(t, "tmpfs mounts", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	src := tars(t, makeTar(t, reg("a", string(noise(1, 3<<20)))))
	o := builder.DefaultOptions()
	o.TempDir = dir
	res, err := builder.Convert(t.Context(), src, o)
	if res != nil || !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("Convert = %v, %v; want %v", res, err, unix.ENOSPC)
	}
	for _, want := range []string{"layer 0 (sha256:", "write blob", "no space left on device"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error is %q, want %q in it", err, want)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// counting is an endless reader whose every 4 KiB differ.
type counting struct{ n uint64 }

func (c *counting) Read(p []byte) (int, error) {
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], c.n/64*0x9e3779b97f4a7c15)
		c.n++
	}
	return len(p) &^ 7, nil
}

// writeBig writes a tar of n files of a MiB each without holding it.
func writeBig(w io.Writer, n int) error {
	tw := tar.NewWriter(w)
	var data counting
	for i := range n {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("f", i), Mode: 0o644, Size: 1 << 20}); err != nil {
			return err
		}
		if _, err := io.CopyN(tw, &data, 1<<20); err != nil {
			return err
		}
	}
	return tw.Close()
}

// countHash is a hash that counts.
type countHash struct {
	hash.Hash
	n int64
}

func (c *countHash) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return c.Hash.Write(p)
}

const memoryVariable = "BUILDER_TEST_MEMORY_MIB"

// TestMemory converts images of different sizes in processes of their own and compares
// how much memory those took at most.
func TestMemory(t *testing.T) {
	if mib := os.Getenv(memoryVariable); mib != "" {
		n, err := strconv.Atoi(mib)
		if err != nil {
			t.Fatal(err)
		}
		convertBig(t, n)
		return
	}
	if testing.Short() {
		t.Skip("skipped: takes seconds")
	}
	if raceEnabled {
		t.Skip("skipped: the race detector takes memory of its own")
	}
	peak := map[int]int{}
	for _, mib := range []int{32, 512} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestMemory$", "-test.v")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", memoryVariable, mib))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%d MiB: %v\n%s", mib, err, out)
		}
		_, rest, _ := strings.Cut(string(out), "VmHWM:")
		fields := strings.Fields(rest)
		if len(fields) == 0 {
			t.Fatalf("no peak in %s", out)
		}
		kib, err := strconv.Atoi(fields[0])
		if err != nil {
			t.Fatal(err)
		}
		peak[mib] = kib >> 10
	}
	t.Logf("peak resident memory in MiB by image size in MiB: %v", peak)
	const most, more = 150, 40
	if peak[512] > most || peak[512] > peak[32]+more {
		t.Errorf("peak memory is %d MiB for 512 MiB of data and %d for 32, want at most %d and at most %d more", peak[512], peak[32], most, more)
	}
}

func convertBig(t *testing.T, mib int) {
	sum := &countHash{Hash: sha256.New()}
	if err := writeBig(sum, mib); err != nil {
		t.Fatal(err)
	}
	id := digest.NewDigest(digest.SHA256, sum)
	src := builder.Source{Layers: []builder.Layer{{
		Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: id, Size: sum.n},
		Open: func(context.Context) (io.ReadCloser, error) {
			r, w := io.Pipe()
			go func() { _ = w.CloseWithError(writeBig(w, mib)) }()
			return r, nil
		},
	}}}
	src.Config, _ = json.Marshal(ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{id}}})
	o := builder.DefaultOptions()
	o.List = listOf("/f3", "/f1")
	o.VerifyData = true
	res := convert(t, src, o)
	if n := res.Stats.Chunks; n != mib {
		t.Errorf("%d chunks, want %d", n, mib)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println(string(status))
}
