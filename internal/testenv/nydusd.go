package testenv

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
)

// MountNydusd serves a Nydus image by FUSE through the real nydusd, with a cache of its own, and returns
// the mount point. blobs is a directory with the blobs by id. It is unmounted, and nydusd ended, when the test ends.
// It needs root and /dev/fuse. nydusd 2.2.0 shows files of mtime 0 with the time of the mount.
func MountNydusd(t testing.TB, bootstrap, blobs string) string {
	t.Helper()
	return mountNydusd(t, bootstrap, blobs, filepath.Join(t.TempDir(), "work"), false)
}

// MountNydusdCached does the same with the directory work as nydusd's cache, which may have files in it.
func MountNydusdCached(t testing.TB, bootstrap, blobs, work string) string {
	t.Helper()
	return mountNydusd(t, bootstrap, blobs, work, false)
}

// MountNydusdPrefetching does the same and lets nydusd fetch what the image's prefetch table names, as snapshotters have it.
//
// nydusd 2.2.0 gives wrong bytes where one read covers two chunks of a file that are both in its cache already, are in
// the same blob, and have a few other chunks between them there: it reads on behind the first chunk
// (storage/src/cache/cachedfile.rs, Region.append). Prefetching makes that likely for images with
// chunks that several files share in part. It also ends at a gzip blob.
func MountNydusdPrefetching(t testing.TB, bootstrap, blobs string) string {
	t.Helper()
	return mountNydusd(t, bootstrap, blobs, filepath.Join(t.TempDir(), "work"), true)
}

func mountNydusd(t testing.TB, bootstrap, blobs, work string, prefetch bool) string {
	t.Helper()
	Root(t)
	nydusd := Tool(t, "nydusd")
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		Kernel(t, "FUSE", err)
	} else if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	mountpoint := filepath.Join(dir, "mnt")
	config, err := json.Marshal(map[string]any{
		"device": map[string]any{
			"backend": map[string]any{"type": "localfs", "config": map[string]any{"dir": blobs}},
			"cache":   map[string]any{"type": "blobcache", "config": map[string]any{"work_dir": work}},
		},
		"mode": "direct", "enable_xattr": true,
		"fs_prefetch": map[string]any{"enable": prefetch, "threads_count": 2},
	})
	configFile := filepath.Join(dir, "config.json")
	if err := errors.Join(err, os.Mkdir(mountpoint, 0o700), os.MkdirAll(work, 0o700), os.WriteFile(configFile, config, 0o600)); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(nydusd, "fuse", "--mountpoint", mountpoint, "--bootstrap", bootstrap, "--config", configFile, "--rlimit-nofile", "0")
	cmd.Stdout, cmd.Stderr = &log, &log
	wait := Start(t, cmd)
	t.Cleanup(func() {
		// FUSE releases files after they are closed: the mount is busy for a moment.
		if err := Unmount(mountpoint); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Error(err)
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
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
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
