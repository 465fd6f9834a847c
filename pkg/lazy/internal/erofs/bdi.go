package erofs

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// bdiDir has one entry per backing device; those of file-backed EROFS superblocks are called
// erofs-N, N counting all filesystems since boot (fs/super.c super_setup_bdi).
const (
	bdiDir    = "/sys/class/bdi"
	bdiPrefix = "erofs-"
)

// lockLimit is how long New waits for others: a mount takes milliseconds, and more than a few at once are rare.
const lockLimit = 2 * time.Second

// lockBDIs keeps every other caller on this machine out until unlock is called. The lock is
// on the directory itself, which is the same for all processes and needs no file of ours. Everybody
// who can read the directory may hold it, so that nobody waits for it longer than limit, and goes on without
// it then: it spares attempts, and is not what tells backing devices apart.
func lockBDIs(ctx context.Context, limit time.Duration) (unlock func(), err error) {
	fd, err := unix.Open(bdiDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s (is sysfs mounted?): %w", bdiDir, err)
	}
	unlock = func() { _ = unix.Close(fd) }
	deadline := time.Now().Add(limit)
	for wait := time.Millisecond; ; wait = min(2*wait, 16*time.Millisecond) {
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil, errors.Is(err, unix.EWOULDBLOCK) && time.Now().After(deadline):
			return unlock, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			unlock()
			return nil, fmt.Errorf("lock %s: %w", bdiDir, err)
		}
		if err := pause(ctx, wait); err != nil {
			unlock()
			return nil, err
		}
	}
}

// pause waits for about d, so that those who began at once do not go on at once.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d/2 + rand.N(d))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// bdis returns the backing devices of EROFS superblocks.
func bdis() (map[string]bool, error) {
	d, err := os.Open(bdiDir)
	if err != nil {
		return nil, err
	}
	names, err := d.Readdirnames(-1)
	if err = errors.Join(err, d.Close()); err != nil {
		return nil, err
	}
	set := map[string]bool{}
	for _, n := range names {
		if strings.HasPrefix(n, bdiPrefix) {
			set[n] = true
		}
	}
	return set, nil
}

// Living returns the backing devices of all EROFS superblocks of the machine, mounted from
// files: one look for many mounts. See [Alive].
func Living() (map[string]bool, error) { return bdis() }

// Alive reports whether the superblock with this backing device still exists: it is mounted
// somewhere, or somebody has a file of it open. The name must be of this boot.
func Alive(bdi string) (bool, error) {
	_, err := os.Stat(filepath.Join(bdiDir, bdi))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// SetReadAhead sets how many KiB are read ahead for files that are opened from then on.
// os.ErrNotExist when the superblock is gone.
func SetReadAhead(bdi string, kib int) error {
	f, err := os.OpenFile(readAheadFile(bdi), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.Itoa(kib))
	return errors.Join(err, f.Close())
}

// ReadAhead returns the KiB that are read ahead.
func ReadAhead(bdi string) (int, error) {
	b, err := os.ReadFile(readAheadFile(bdi))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

func readAheadFile(bdi string) string { return filepath.Join(bdiDir, bdi, "read_ahead_kb") }
