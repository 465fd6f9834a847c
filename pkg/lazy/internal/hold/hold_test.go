package hold_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/endproc"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/hold"
)

// The test binary is the daemon and the holder of its tests, too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		var err error
		switch os.Args[1] {
		case "a-holder":
			err = hold.Run(context.Background(), nil)
		case "a-daemon":
			err = daemon(os.Args[2])
		default:
			testenv.Main(m)
			return
		}
		if err != nil {
			_, _ = fmt.Fprintln(os.Stderr, os.Args[1], err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testenv.Main(m)
}

// state is what the daemon of the tests says of itself.
type state struct {
	PID, Holder, Kept int
	Spare             int
	Restarted, Whole  bool
	Names             []string
}

// daemon keeps a number of files in dir until a file "done" is there, and a pipe that it was
// started with: who holds the other end sees when nobody has it any more.
func daemon(dir string) error {
	pause, err := time.ParseDuration(os.Getenv(envSpare))
	if err != nil {
		return err
	}
	link, taken, err := hold.Join(hold.Options{Holder: []string{"a-holder", "a-holder"}, Daemon: os.Args, Spare: pause})
	if err != nil {
		return err
	}
	if !taken.Restarted {
		if err := link.Keep("pipe", os.NewFile(3, "pipe")); err != nil {
			return err
		}
		for i := range 300 {
			f, err := os.CreateTemp(dir, "kept-*")
			if err == nil {
				_, err = fmt.Fprintf(f, "file %d", i)
			}
			if err = errors.Join(err, link.Keep(fmt.Sprintf("file-%d", i), f), f.Close(), os.Remove(f.Name())); err != nil {
				return err
			}
		}
		if err := link.Drop("file-299", "nothing"); err != nil {
			return err
		}
	}
	s := state{PID: os.Getpid(), Restarted: taken.Restarted, Whole: taken.Whole}
	for name, f := range taken.Files {
		s.Names = append(s.Names, name)
		b, err := io.ReadAll(io.NewSectionReader(f, 0, 100))
		if i, ok := strings.CutPrefix(name, "file-"); ok && (err != nil || string(b) != "file "+i) {
			return fmt.Errorf("%s has %q, %w", name, b, err)
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	for {
		if s.Holder, s.Spare, s.Kept = link.Holder(), link.Spare(), link.Kept(); s.Kept == 300 {
			b, err := json.Marshal(s)
			if err = errors.Join(err, os.WriteFile(filepath.Join(dir, "new"), b, 0o600), os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "state"))); err != nil {
				return err
			}
		}
		if _, err := os.Stat(filepath.Join(dir, "done")); err == nil {
			return link.Done()
		}
		program := filepath.Join(dir, "program")
		if path, err := os.ReadFile(program); err == nil {
			link.Program(string(path))
			return errors.Join(os.Remove(program), link.Close())
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// box is a daemon with its holder.
type box struct {
	t    *testing.T
	dir  string
	pipe *os.File
	last state
}

func start(t *testing.T) *box { return startWith(t, -1) }

// envSpare is the pause before the daemon of the tests starts its spare.
const envSpare = "HOLD_TEST_SPARE"

func startWith(t *testing.T, spare time.Duration) *box {
	t.Helper()
	b := &box{t: t, dir: t.TempDir()}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	b.pipe = r
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"a-daemon", "a-daemon", b.dir}
	cmd.ExtraFiles, cmd.Stderr = []*os.File{w}, os.Stderr
	cmd.Env = append(os.Environ(), envSpare+"="+spare.String())
	wait := testenv.Start(t, cmd)
	t.Cleanup(func() {
		if t.Failed() && !b.gone() {
			_ = os.WriteFile(filepath.Join(b.dir, "done"), nil, 0o600) // whoever it is that lives
			_ = endproc.All(b.last.PID, b.last.Holder, b.last.Spare)
		}
		_ = wait()
		r.Close()
	})
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b.wait(func(state) bool { return true })
	return b
}

// gone reports whether nobody has the pipe any more.
func (b *box) gone() bool {
	b.t.Helper()
	if err := b.pipe.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		b.t.Error(err)
	}
	_, err := b.pipe.Read(make([]byte, 1))
	return errors.Is(err, io.EOF)
}

// wait returns the state that the daemon writes once it is as ok wants it.
func (b *box) wait(ok func(state) bool) state {
	b.t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		data, err := os.ReadFile(filepath.Join(b.dir, "state"))
		if err == nil {
			var s state
			if err := json.Unmarshal(data, &s); err != nil {
				b.t.Fatal(err)
			}
			if s.PID != 0 && s.Holder != 0 && ok(s) {
				b.last = s
				return s
			}
		}
	}
	b.t.Fatalf("the daemon's state stays %+v", b.last)
	return state{}
}

func TestKill(t *testing.T) {
	b := start(t)
	first := b.last
	if first.Restarted || first.Kept != 300 {
		t.Errorf("first daemon: %+v, want 300 kept", first)
	}
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	for i := range rounds {
		before := b.last
		if err := unix.Kill(before.PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		after := b.wait(func(s state) bool { return s.PID != before.PID })
		if after.Holder != before.Holder || !after.Restarted || !after.Whole || len(after.Names) != 300 {
			t.Fatalf("round %d: after the daemon's death: %+v, want the same holder %d, restarted, whole, 300 names", i, after, before.Holder)
		}
		if err := unix.Kill(after.Holder, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		again := b.wait(func(s state) bool { return s.Holder != after.Holder })
		if again.PID != after.PID {
			t.Fatalf("round %d: after the holder's death: %+v, want the same daemon %d", i, again, after.PID)
		}
		if b.gone() {
			t.Fatalf("round %d: the pipe was closed", i)
		}
	}
	b.end()
}

// The daemon dies in the moment in which it starts a new holder.
func TestKillHolderThenDaemon(t *testing.T) {
	b := start(t)
	before := b.last
	if err := unix.Kill(before.Holder, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	between := b.wait(func(s state) bool { return s.Holder != before.Holder })
	if err := unix.Kill(between.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	after := b.wait(func(s state) bool { return s.PID != before.PID })
	if !after.Whole || len(after.Names) != 300 || b.gone() {
		t.Errorf("after both died one after the other: %+v, want everything", after)
	}
	b.end()
}

// end makes the daemon say that it is done, and sees that nothing stays.
func (b *box) end() {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.dir, "done"), nil, 0o600); err != nil {
		b.t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if b.gone() {
			return
		}
	}
	b.t.Error("holder or daemon do not end")
}

func TestNames(t *testing.T) {
	link, taken, err := hold.Join(hold.Options{Holder: []string{"a-holder", "a-holder"}, Daemon: []string{"none"}})
	if err != nil {
		t.Fatal(err)
	}
	if taken.Restarted || len(taken.Files) > 0 {
		t.Errorf("Join() took %+v, want nothing", taken)
	}
	for _, name := range []string{"", strings.Repeat("n", 256)} {
		if err := link.Keep(name, os.Stderr); err == nil {
			t.Errorf("Keep(name of %d bytes) succeeded", len(name))
		}
	}
	if err := link.Keep("one", os.Stderr); err != nil {
		t.Error(err)
	}
	if err := link.Keep("one", os.Stderr); err != nil || link.Kept() != 1 {
		t.Errorf("Keep(again) = %v, %d kept, want 1", err, link.Kept())
	}
	if err := errors.Join(link.Done(), link.Done()); err != nil {
		t.Error(err)
	}
	if err := link.Keep("two", os.Stderr); err == nil {
		t.Error("Keep() after Done succeeded")
	}
}

// Keeping a descriptor changes nothing about the file that others have, too.
func TestKeepNonblocking(t *testing.T) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	link, _, err := hold.Join(hold.Options{Holder: []string{"a-holder", "a-holder"}, Daemon: []string{"none"}})
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(link.Keep("listener", f), f.Close()); err != nil {
		t.Error(err)
	}
	accepted := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		accepted <- err
	}()
	time.Sleep(20 * time.Millisecond)
	closed := make(chan error, 1)
	go func() { closed <- l.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Close hangs: the listener blocks")
	}
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept() = %v, want ErrClosed", err)
	}
	if err := link.Done(); err != nil {
		t.Error(err)
	}
}
