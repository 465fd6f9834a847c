package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/linksim"
)

func startNydusd(ctx context.Context, b *bench, img *image, link *linksim.Link, dir string) (*started, error) {
	return b.nydusd(ctx, img, link, dir, false)
}

func startNydusdPrefetch(ctx context.Context, b *bench, img *image, link *linksim.Link, dir string) (*started, error) {
	return b.nydusd(ctx, img, link, dir, true)
}

// nydusd brings the bootstrap and serves the image with the real nydusd, with the cache and prefetch settings of
// nydus-snapshotter's sample configuration (8 threads, requests of up to 1 MiB), but without prefetch_all: what the table
// names and no more.
func (b *bench) nydusd(ctx context.Context, img *image, link *linksim.Link, dir string, prefetch bool) (_ *started, err error) {
	program, err := b.tools.Ensure(ctx, "nydusd")
	if err != nil {
		return nil, err
	}
	s := &started{}
	defer func() {
		if err != nil {
			_ = s.close()
		}
	}()
	mnt, work, config, boot := filepath.Join(dir, "mnt"), filepath.Join(dir, "work"), filepath.Join(dir, "config.json"), filepath.Join(dir, "boot")
	text, err := json.Marshal(map[string]any{
		"device": map[string]any{
			"backend": map[string]any{"type": "registry", "config": map[string]any{"scheme": "http", "host": link.Host(), "repo": img.peer.repo}},
			"cache":   map[string]any{"type": "blobcache", "config": map[string]any{"work_dir": work}},
		},
		"mode": "direct", "enable_xattr": true,
		"fs_prefetch": map[string]any{"enable": prefetch, "threads_count": 8, "merging_size": 1 << 20, "prefetch_all": false},
	})
	if err := errors.Join(err, os.Mkdir(mnt, 0o700), os.Mkdir(work, 0o700), os.WriteFile(config, text, 0o600)); err != nil {
		return nil, err
	}
	s.began = time.Now()
	client := newRegistryClient(link.Host(), img.peer.repo)
	err = client.bootstrap(ctx, img.peer.tag, boot)
	client.close()
	if err != nil {
		return nil, err
	}
	said := &tailWriter{}
	cmd := exec.Command(program, "fuse", "--log-level", "warn", "--mountpoint", mnt, "--bootstrap", boot, "--config", config, "--rlimit-nofile", "0")
	cmd.Stdout, cmd.Stderr = said, said
	ended, err := launch(cmd)
	if err != nil {
		return nil, err
	}
	s.pids = []int{cmd.Process.Pid}
	s.onClose(func() error {
		err := unmount(mnt)
		_ = cmd.Process.Kill() // on SIGTERM it may hang
		<-ended
		return err
	})
	s.layers = []string{mnt}
	return s, waitFUSE(ctx, mnt, ended, said)
}

// launch starts cmd, which dies with this process, and returns a channel that is closed when it has ended.
func launch(cmd *exec.Cmd) (<-chan struct{}, error) {
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	begun, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // the signal comes when the thread that started it ends
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		begun <- err
		if err == nil {
			_ = cmd.Wait() // it is killed
			close(ended)
		}
	}()
	return ended, <-begun
}

func waitFUSE(ctx context.Context, mnt string, ended <-chan struct{}, said *tailWriter) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(30 * time.Second)
	defer limit.Stop()
	for {
		var st unix.Statfs_t
		if err := unix.Statfs(mnt, &st); err == nil && st.Type == unix.FUSE_SUPER_MAGIC {
			return nil
		}
		select {
		case <-tick.C:
		case <-ended:
			return fmt.Errorf("nydusd ended: %s", said.String())
		case <-limit.C:
			return fmt.Errorf("nydusd does not mount: %s", said.String())
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// unmount takes a mount away that may be busy for a moment after its last user has ended.
func unmount(dir string) (err error) {
	for range 100 {
		if err = unix.Unmount(dir, 0); err == nil || !errors.Is(err, unix.EBUSY) {
			return err
		}
		time.Sleep(20 * time.Millisecond) //nolint:forbidigo // nothing says when a file is released
	}
	return fmt.Errorf("unmount %s: %w", dir, err)
}
