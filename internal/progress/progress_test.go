package progress_test

import (
	"bytes"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/progress"
	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestLines(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	d := progress.New(&b)
	d.Update("layer 1/2", 0, 2048, false)
	d.Update("layer 1/2", 1024, 2048, false)
	d.Update("layer 1/2", 2048, 2048, true)
	d.Printf("note %d", 7)
	d.Update("verify", 0, 0, false)
	d.Update("verify", 0, 0, true)
	d.Close()
	d.Update("late", 1, 1, true)
	want := regexp.MustCompile(`^layer 1/2: 2\.0 KiB in [0-9.]+m?s\nnote 7\nverify: [0-9.]+m?s\n$`)
	if !want.Match(b.Bytes()) {
		t.Errorf("got %q, want %s", b.String(), want)
	}
}

func TestNothing(t *testing.T) {
	t.Parallel()
	var none *progress.Display
	for _, d := range []*progress.Display{none, {}} {
		d.Update("x", 1, 2, true)
		d.Printf("x")
		d.Close()
	}
}

// A terminal gets a bar that is gone when the task is done.
func TestBar(t *testing.T) {
	t.Parallel()
	master, slave := openTerminal(t)
	var got bytes.Buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(&got, master) // ends with EIO when the other end is closed
	}()
	d := progress.New(slave)
	for i := range int64(20) {
		d.Update("push 0123", i*100, 2000, false)
		time.Sleep(20 * time.Millisecond)
	}
	d.Update("push 0123", 2000, 2000, true)
	d.Close()
	if err := slave.Close(); err != nil {
		t.Fatal(err)
	}
	<-done
	out := got.String()
	if !strings.Contains(out, "\r") || !strings.Contains(out, "push 0123") || !strings.Contains(out, "%") {
		t.Errorf("no bar in %q", out)
	}
	if last := out[strings.LastIndex(out, "\r")+1:]; !strings.HasPrefix(strings.TrimLeft(out[strings.LastIndex(strings.TrimRight(out, "\r\n"), "\r")+1:], "\x1b[2K\r "), "push 0123: 2.0 KiB in") {
		t.Errorf("ends in %q, want the finished task's line", last)
	}
}

func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("skipped: no pseudo terminals: %v", err)
	}
	t.Cleanup(func() {
		if err := master.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	name := "/dev/pts/" + strconv.Itoa(n)
	slave, err = os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}); err != nil {
		t.Fatal(err)
	}
	return master, slave
}

func TestConcurrent(t *testing.T) {
	t.Parallel()
	d := progress.New(io.Discard)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range int64(100) {
				d.Update(string(rune('a'+i)), j, 100, j == 99)
			}
		})
	}
	wg.Wait()
	d.Close()
}

func TestBytes(t *testing.T) {
	t.Parallel()
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1 << 20: "1.0 MiB", 1<<63 - 1: "8.0 EiB"} {
		if got := progress.Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %q, want %q", n, got, want)
		}
	}
}
