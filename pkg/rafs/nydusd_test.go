package rafs_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestNydusd lets the real nydusd 2.2.0 serve our images by FUSE: it reads blob.meta and chunk data
// with its own code. POSIX ACLs are left out, see combo.acl.
func TestNydusd(t *testing.T) {
	for i, o := range nydusdCombos {
		t.Run(o.String(), func(t *testing.T) {
			randomImage(t, uint64(200+i), o).build().compareNydusd(t)
		})
	}
}

// TestNydusdV5 does the same with v5 images, whose chunks nydusd finds through the bootstrap alone.
func TestNydusdV5(t *testing.T) {
	for i, o := range nydusdCombos {
		t.Run(o.String(), func(t *testing.T) {
			b := randomImage(t, uint64(300+i), o)
			b.img.Version = rafs.V5
			b.build().compareNydusd(t)
		})
	}
}

var nydusdCombos = []combo{
	{compressor: rafs.CompressorZstd, chunkSize: 1 << 20},
	{compressor: rafs.CompressorZstd, chunkSize: 4096, digester: rafs.DigesterSHA256, level: rafs.LevelBest},
	{compressor: rafs.CompressorLZ4, chunkSize: 64 << 10, toc: true},
	{compressor: rafs.CompressorNone, chunkSize: 64 << 10},
}

// compareNydusd serves the image by the real nydusd and compares every entry.
func (s *stored) compareNydusd(t *testing.T) {
	t.Helper()
	testenv.Root(t)
	nydusd := testenv.Tool(t, "nydusd")
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		testenv.Kernel(t, "FUSE", err)
	} else {
		must(t, f.Close())
	}
	img := s.open(t)
	want := flatten(t, img, img.FS(s.reader))
	got := flattenDir(t, mountNydusd(t, nydusd, s), want)
	for i := range min(len(got), len(want)) {
		if want[i].Mtime == 0 { // nydusd shows the time of the mount then
			got[i].Mtime, got[i].Nsec, want[i].Nsec = 0, 0, 0
		}
	}
	diff(t, "tree through nydusd", got, want)
}

// mountNydusd serves the image at a directory until the test ends.
func mountNydusd(t *testing.T, nydusd string, s *stored) string {
	t.Helper()
	dir := t.TempDir()
	bootstrap, blobs, _ := s.write(t, dir)
	mountpoint, work := filepath.Join(dir, "mnt"), filepath.Join(dir, "work")
	must(t, os.Mkdir(mountpoint, 0o700))
	must(t, os.Mkdir(work, 0o700))
	config, err := json.Marshal(map[string]any{
		"device": map[string]any{
			"backend": map[string]any{"type": "localfs", "config": map[string]any{"dir": blobs}},
			"cache":   map[string]any{"type": "blobcache", "config": map[string]any{"work_dir": work}},
		},
		"mode": "direct", "enable_xattr": true,
	})
	must(t, err)
	configFile := filepath.Join(dir, "config.json")
	must(t, os.WriteFile(configFile, config, 0o600))
	var log bytes.Buffer
	cmd := exec.Command(nydusd, "fuse", "--mountpoint", mountpoint, "--bootstrap", bootstrap, "--config", configFile, "--rlimit-nofile", "0")
	cmd.Stdout, cmd.Stderr = &log, &log
	wait := testenv.Start(t, cmd)
	t.Cleanup(func() {
		if err := unix.Unmount(mountpoint, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Errorf("unmount: %v", err)
		}
		// On SIGTERM it unmounts as well, and where the mount is gone already it may hang instead of ending.
		_ = cmd.Process.Kill()
		_ = wait()
		if t.Failed() {
			t.Logf("nydusd: %.3000s", log.String())
		}
	})
	ended := make(chan struct{})
	go func() { _ = wait(); close(ended) }()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		var st unix.Statfs_t
		err := unix.Statfs(mountpoint, &st)
		if err == nil && st.Type == unix.FUSE_SUPER_MAGIC {
			return mountpoint
		}
		select {
		case <-ended:
			t.Fatal("nydusd ended")
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("nydusd does not mount: %v, type %#x", err, st.Type)
		}
	}
}
