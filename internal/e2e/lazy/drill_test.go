package lazy_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/linksim"
)

// kill ends a process by SIGKILL and waits until it is gone.
func kill(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // ended by itself
	}
	defer func() { _ = unix.Close(fd) }()
	_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(patience/time.Millisecond))
}

// killUnderLoad reads the image by 8 processes over a link that is slow enough for it to take a while, and kills daemon or holder at random
// moments meanwhile. No reader sees a wrong byte or an error, and none hangs.
func killUnderLoad(t *testing.T, driver string, img *images, kills int) (done int) {
	t.Helper()
	ref, _ := inRegistry(t, img, img.ours(t, "plain"), linksim.Profile{RTT: 2 * time.Millisecond, BitsPerSecond: 200e6})
	r := newRigOf(t, driver)
	dir := r.mount(t, "--background", "none", "--plain-http", ref)
	type end struct {
		sums map[string]string
		err  error
	}
	ends := make(chan end)
	const readers = 8
	for i := range readers {
		wait := startWalker(t, walk{Root: dir, Seed: uint64(i + 1), Part: 4, Ways: ways})
		go func() {
			sums, err := wait()
			ends <- end{sums, err}
		}()
	}
	random := rand.New(rand.NewPCG(uint64(kills), uint64(os.Getpid())))
	limit := time.After(3 * time.Minute)
	left := readers
	for left > 0 {
		pause := time.After(time.Duration(random.IntN(400)) * time.Millisecond)
		select {
		case e := <-ends:
			left--
			if e.err != nil {
				t.Errorf("a reader: %v", e.err)
			}
			compareSums(t, e.sums, img.want, 4)
		case <-pause:
			if done >= kills {
				continue
			}
			s, err := r.status()
			if err != nil {
				continue // it is starting again
			}
			if done%2 == 0 {
				kill(t, s.PID)
			} else {
				kill(t, s.Holder)
			}
			done++
		case <-limit:
			t.Fatalf("%d readers hang after %d kills", left, done)
		}
	}
	must(t, r.umount(dir))
	return done
}

// TestKill kills daemon and holder a few times while the image is read.
func TestKill(t *testing.T) {
	if testing.Short() {
		t.Skip("reads for a while")
	}
	img := newImages(t)
	eachDriver(t, func(t *testing.T, driver string) {
		if done := killUnderLoad(t, driver, img, 6); done == 0 {
			t.Error("the readers were faster than the first kill: nothing was shown")
		} else {
			t.Logf("%d kills", done)
		}
	})
}

// TestSoakKill does it for as long as SOAK says, and a hundred times at least.
func TestSoakKill(t *testing.T) {
	limit, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Skip("SOAK is not set to a duration")
	}
	img := newImages(t)
	eachDriver(t, func(t *testing.T, driver string) {
		began, done := time.Now(), 0
		for round := 0; done < 100 || time.Since(began) < limit; round++ {
			t.Run(fmt.Sprint(round), func(t *testing.T) { done += killUnderLoad(t, driver, img, 25) })
			if t.Failed() {
				break
			}
		}
		t.Logf("%d kills", done)
	})
}

// TestBackendDown breaks the link to the registry under readers: they wait, and go on when it is back, with nothing mounted
// anew.
func TestBackendDown(t *testing.T) {
	img := newImages(t)
	ref, link := inRegistry(t, img, img.ours(t, "plain"), linksim.Profile{BitsPerSecond: 400e6})
	r := newRig(t)
	dir := r.mount(t, "--background", "none", "--plain-http", ref)
	link.Cut()
	wait := startWalker(t, walk{Root: filepath.Join(dir, "usr"), Seed: 3, Part: 16, Ways: ways})
	r.waitStatus(t, "reader that waits", func(s status) bool { return len(s.Mounts) == 1 && s.Mounts[0].Stats.Misses > 0 })
	link.Mend()
	got, err := wait()
	if err != nil {
		t.Fatalf("a reader, with the link away for a while: %v", err)
	}
	for name, sum := range got {
		if sum != img.want["/usr"+name] {
			t.Errorf("/usr%s has the digest %.12s, want %.12s", name, sum, img.want["/usr"+name])
		}
	}
	if len(got) == 0 {
		t.Error("the reader read nothing")
	}
	must(t, r.umount(dir))
}
