package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/endproc"
	"github.com/headstart-oci/headstart/internal/linksim"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

func startLazy(ctx context.Context, b *bench, img *image, link *linksim.Link, dir string) (*started, error) {
	return b.lazy(ctx, "erofs", img.lazy, img, link, dir)
}

func startPrefetch(ctx context.Context, b *bench, img *image, link *linksim.Link, dir string) (*started, error) {
	return b.lazy(ctx, "erofs", img.fast, img, link, dir)
}

func startFUSE(ctx context.Context, b *bench, img *image, link *linksim.Link, dir string) (*started, error) {
	return b.lazy(ctx, "fuse", img.lazy, img, link, dir)
}

func startFUSEPrefetch(ctx context.Context, b *bench, img *image, link *linksim.Link, dir string) (*started, error) {
	return b.lazy(ctx, "fuse", img.fast, img, link, dir)
}

// lazyMount is a lazy mount with directories, a daemon and a holder of its own.
type lazyMount struct {
	b             *bench
	state, runDir string
	dir           string
}

// lazy mounts a tag of the image lazily with a driver. The daemon is not there before and starts within the time. Nothing is fetched
// in the background, so that what passes the link is the start's.
func (b *bench) lazy(ctx context.Context, driver, tag string, img *image, link *linksim.Link, dir string) (_ *started, err error) {
	m := &lazyMount{b: b, state: filepath.Join(dir, "state"), runDir: filepath.Join(dir, "run"), dir: filepath.Join(dir, "mnt")}
	s := &started{layers: []string{m.dir}, report: func(r *result) error { return m.report(ctx, r) }, after: func(r *result) error { return m.after(ctx, r) }}
	if err := errors.Join(os.Mkdir(m.state, 0o700), os.Mkdir(m.runDir, 0o700), os.Mkdir(m.dir, 0o755)); err != nil {
		return nil, err
	}
	s.began = time.Now()
	if _, err := m.optimizer(ctx, "mount", "--driver", driver, "--plain-http", "--background", "none", link.Host()+"/"+img.name+":"+tag, m.dir); err != nil {
		return nil, err
	}
	s.onClose(func() error { return m.close(context.WithoutCancel(ctx)) })
	defer func() {
		if err != nil {
			_ = s.close()
		}
	}()
	st, err := m.status(ctx)
	if err != nil {
		return nil, err
	}
	s.pids = []int{st.PID, st.Holder}
	return s, nil
}

func (m *lazyMount) optimizer(ctx context.Context, verb string, args ...string) ([]byte, error) {
	return m.b.command(ctx, nil, m.b.optimizer, append([]string{verb, "--state-dir", m.state, "--run-dir", m.runDir}, args...)...)
}

func (m *lazyMount) status(ctx context.Context) (s lazy.Status, err error) {
	out, err := m.optimizer(ctx, "status", "-o", "json")
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	if err == nil && len(s.Mounts) != 1 {
		err = fmt.Errorf("status has %d mounts, want one", len(s.Mounts))
	}
	return s, err
}

// report says what was fetched on demand until the program was ready, and why.
func (m *lazyMount) report(ctx context.Context, r *result) error {
	s, err := m.status(ctx)
	if err != nil {
		return err
	}
	mount := s.Mounts[0]
	r.Misses, r.Overtakes, r.Fetched = int(mount.Stats.Misses), int(mount.Stats.Overtakes), &mount.Stats
	for _, miss := range mount.Misses {
		if !miss.Overtake {
			r.MissBytes += miss.Size
		}
	}
	r.Missed = missed(&mount)
	return nil
}

// after says what the program missed from then on, until it had ended.
func (m *lazyMount) after(ctx context.Context, r *result) error {
	s, err := m.status(ctx)
	if err != nil {
		return err
	}
	r.AfterReady = without(missed(&s.Mounts[0]), r.Missed)
	return nil
}

// without returns all but as many of each as before has: misses are listed by blob, so new ones may come anywhere.
func without(all, before []string) []string {
	count := map[string]int{}
	for _, m := range before {
		count[m]++
	}
	return slices.DeleteFunc(slices.Clone(all), func(m string) bool {
		count[m]--
		return count[m] >= 0
	})
}

// missed says of each miss and overtake of a mount what it was. Without a prefetch blob every chunk is one, and they are not named.
func missed(mount *lazy.Mount) []string {
	if mount.Stats.Prefetch.Chunks == 0 {
		return nil
	}
	var out []string
	for _, miss := range mount.Misses {
		what := "missed"
		switch {
		case miss.Overtake:
			what = "overtook the prefetch blob"
		case miss.Late:
			what = "missed after the prefetch blob"
		}
		out = append(out, fmt.Sprintf("%s: chunk %d of blob %.12s, %d bytes at %d, %s", what, miss.Index, miss.Blob, miss.Size, miss.Offset, miss.Path))
	}
	return out
}

// close unmounts, and ends holder and daemon, which would wait a while for another mount.
func (m *lazyMount) close(ctx context.Context) error {
	s, err := m.status(ctx)
	for range 100 {
		if _, uerr := m.optimizer(ctx, "umount", m.dir); uerr == nil {
			break
		}
		time.Sleep(20 * time.Millisecond) //nolint:forbidigo // nothing says when a killed reader's files are released
	}
	if err != nil {
		return errors.Join(err, unix.Unmount(m.dir, unix.MNT_DETACH))
	}
	if err := endproc.Logging(m.runDir, s.Spare, s.Holder, s.PID); err != nil {
		return err
	}
	var st, parent unix.Stat_t
	if err := errors.Join(unix.Stat(m.dir, &st), unix.Stat(filepath.Dir(m.dir), &parent)); err != nil {
		return err
	}
	if st.Dev != parent.Dev {
		return fmt.Errorf("%s is still mounted", m.dir)
	}
	return nil
}
