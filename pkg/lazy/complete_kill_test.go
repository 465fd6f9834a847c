package lazy_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// The daemon dies in the moment in which it has written that a mount is complete: marks are there still, and readers wait for
// answers. The next one lets them pass, and finds the mount complete.
func TestKillWhenComplete(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	keep := b.mount(b.mountpoint("keep"), layout(t)) // incomplete: the daemon stays
	variants := []string{"v6-zstd", "v6-lz4_block", "v6-zstd-batch", "v6-zstd-sha256-64k"}
	if testing.Short() {
		variants = variants[:1]
	}
	for _, variant := range variants {
		t.Run(variant, func(t *testing.T) { b.killWhenComplete(t, variant) })
	}
	b.unmount(keep.Dir)
}

func (b *box) killWhenComplete(t *testing.T, variant string) {
	r := loose(t, variant)
	r.Background = "full"
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, filepath.Join(b.state, "mounts"), unix.IN_MOVED_TO); err != nil {
		t.Fatal(err)
	}
	m := b.mount(b.mountpoint(variant), r)
	pid := b.status().PID
	stop := make(chan struct{})
	var readers errgroup.Group
	sums := newSums()
	for range 4 {
		readers.Go(func() error { return sums.readUntil(stop, m.Dir) })
	}
	if err := awaitComplete(watch, filepath.Join(b.state, "mounts", m.ID+".json")); err != nil {
		t.Error(err)
	}
	kill(t, pid)
	eventually(t, func() string {
		s, err := b.client.Status(t.Context(), false)
		for _, got := range s.Mounts {
			if got.ID == m.ID && got.State == lazy.StateComplete && s.PID != pid {
				return ""
			}
		}
		return fmt.Sprintf("after the death of %d: %+v, %v, want another daemon and %s complete", pid, s, err, m.ID)
	})
	close(stop)
	if err := readers.Wait(); err != nil {
		t.Error(err)
	}
	compare(t, m.Dir)
	b.unmount(m.Dir)
}

// awaitComplete returns when a mount's record says that it is complete.
func awaitComplete(watch int, record string) error {
	for buf := make([]byte, 4096); ; {
		if text, err := os.ReadFile(record); err == nil && strings.Contains(string(text), `"complete": true`) {
			return nil
		}
		poll := []unix.PollFd{{Fd: int32(watch), Events: unix.POLLIN}}
		if n, err := unix.Poll(poll, 60_000); n != 1 && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("%s never says that it is complete: %w", record, err)
		}
		if _, err := unix.Read(watch, buf); err != nil {
			return err
		}
	}
}

// sums are what files read as, which is always the same.
type sums struct {
	mu   sync.Mutex
	seen map[string][sha256.Size]byte
}

func newSums() *sums { return &sums{seen: map[string][sha256.Size]byte{}} }

// readUntil reads all files below dir from the disk, not from the page cache, again and again.
func (s *sums) readUntil(stop <-chan struct{}, dir string) error {
	for {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			select {
			case <-stop:
				return fs.SkipAll
			default:
			}
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			return s.read(path)
		})
		select {
		case <-stop:
			return err
		default:
		}
		if err != nil {
			return err
		}
	}
}

func (s *sums) read(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	sum := [sha256.Size]byte(h.Sum(nil))
	s.mu.Lock()
	defer s.mu.Unlock()
	if before, ok := s.seen[path]; ok && before != sum {
		return fmt.Errorf("%s reads as %x and as %x", path, before, sum)
	}
	s.seen[path] = sum
	return nil
}
