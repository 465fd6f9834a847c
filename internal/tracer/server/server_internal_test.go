package server

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// decode returns the frames of a whole stream.
func decode(t *testing.T, b []byte) []stream.Frame {
	t.Helper()
	var frames []stream.Frame
	for r := stream.NewReader(bytes.NewReader(b)); ; {
		f, err := r.Next()
		if errors.Is(err, io.EOF) {
			return frames
		}
		if err != nil {
			t.Fatal(err)
		}
		frames = append(frames, f)
	}
}

// tickLength is longer than the kernel's clock of files takes for a tick: see fileTime.
const tickLength = 20 * time.Millisecond

// serve runs the server, lets do run once it is armed, then stops it, and returns what it
// wrote. It runs as a process: in this one it could take over the main thread for good.
func serve(t *testing.T, c Config, do func()) []stream.Frame {
	t.Helper()
	time.Sleep(tickLength) // what the test made is older than the run
	testenv.Root(t)
	testenv.Kernel(t, fanotify.FeatureOpenExec.String(), fanotify.Probe(fanotify.FeatureOpenExec))
	cmd := exec.Command(testenv.Binary(t, "optimizer-server"),
		"--pid", strconv.Itoa(c.PID), "--root", c.Root, "--max-files", strconv.Itoa(cmp.Or(c.MaxFiles, DefaultMaxFiles)))
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	cmd.Stdout = w
	stdin, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin = stdin
	wait := testenv.Start(t, cmd)
	if err := stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	head := make([]byte, len(stream.Magic)+4+1)
	if _, err := io.ReadFull(out, head); err != nil {
		t.Fatal(err)
	}
	if head[len(head)-1] == 'R' {
		do()
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	err = wait()
	frames := decode(t, append(head, rest...))
	if _, failed := frames[0].(stream.Failure); failed != (err != nil) {
		t.Errorf("server: %v, first frame %+v", err, frames[0])
	}
	return frames
}

// process returns the id of a process that does nothing until the test ends.
func process(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	testenv.Start(t, cmd)
	return cmd.Process.Pid
}

// TestDirectory holds that a directory inside a process' root can be traced, that what
// happens beside it is left out, and that a trace holds no more files than it may.
func TestDirectory(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "root")
	var args []string
	for _, name := range []string{"root/a", "beside", "root/sub/b", "root/c", "root/d"} {
		p := filepath.Join(top, name)
		args = append(args, p)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte("12345"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	gone := filepath.Join(top, "gone")
	if err := os.WriteFile(gone, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond) // older than the run by more than a clock tick
	cat := func() {
		if out, err := exec.Command("cat", args...).CombinedOutput(); err != nil {
			t.Errorf("cat: %v\n%s", err, out)
		}
		// A file beside the root that is read and deleted: its name could be anybody's.
		if out, err := exec.Command("sh", "-c", "if [ -e $0 ]; then exec 5< $0; rm $0; fi", gone).CombinedOutput(); err != nil {
			t.Errorf("rm: %v\n%s", err, out)
		}
	}
	paths := func(frames []stream.Frame) (paths []string) {
		for _, f := range frames {
			if touch, ok := f.(stream.Touch); ok {
				paths = append(paths, touch.Access.Path)
				if touch.Access.Size != 5 {
					t.Errorf("access %+v", touch.Access)
				}
			}
		}
		return paths
	}
	frames := serve(t, Config{PID: process(t), Root: dir}, cat)
	if got, want := paths(frames), []string{"/a", "/sub/b", "/c", "/d"}; !slices.Equal(got, want) {
		t.Errorf("paths %q, want %q", got, want)
	}
	end, ok := frames[len(frames)-1].(stream.End)
	if !ok || end.Reason != "stop" || len(end.Losses) > 0 || end.Skipped < 1 {
		t.Errorf("last frame %+v", frames[len(frames)-1])
	}
	frames = serve(t, Config{PID: process(t), Root: dir, MaxFiles: 1}, cat)
	end, ok = frames[len(frames)-1].(stream.End)
	if !ok || len(end.Losses) != 1 || end.Losses[0].Reason != "limit" || end.Losses[0].Count != -1 {
		t.Errorf("last frame with one file allowed: %+v", frames[len(frames)-1])
	}
}

func TestNoDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		c          Config
		code, text string
	}{
		"process gone": {Config{PID: gone.Process.Pid}, codeLate, "no such process"},
		"no directory": {Config{PID: process(t), Root: "/nonexistent"}, codeLate, "open /nonexistent: no such file"},
		"a file":       {Config{PID: process(t), Root: file}, codeInternal, "not a directory"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			frames := serve(t, tt.c, func() { t.Error("armed") })
			f, ok := frames[0].(stream.Failure)
			if !ok || f.Code != tt.code || !strings.Contains(f.Text, tt.text) || len(frames) != 1 {
				t.Errorf("frames %+v, want a failure %q with %q", frames, tt.code, tt.text)
			}
		})
	}
}

// TestLosses holds what events that lead to no file become.
func TestLosses(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = r.Close(), w.Close() }()
	s := &session{self: 7, out: newOutput(w)}
	for _, e := range []fanotify.Event{
		{Mask: fanotify.Overflow, FD: fanotify.NoFD},
		{Mask: fanotify.Open, FD: fanotify.NoFD, PID: 7, Err: unix.EMFILE}, // our own
		{Mask: fanotify.Open, FD: fanotify.NoFD, PID: 8, Err: unix.EMFILE},
		{Mask: fanotify.Open, FD: fanotify.NoFD, PID: 8, Err: unix.ENXIO},
		{Mask: fanotify.Open, FD: fanotify.NoFD, PID: 8},
	} {
		s.handle(&e)
	}
	want := []trace.Loss{
		{Reason: "overflow", Count: -1, Detail: "the kernel's event queue overflowed"},
		{Reason: "unresolved", Count: 2, Detail: "open of a touched file: too many open files"},
	}
	if got := s.end(); !slices.Equal(got.Losses, want) || got.Skipped != 1 || got.Events != 3 {
		t.Errorf("end = %+v, want losses %+v, 1 skipped, 3 events", got, want)
	}
}

// TestOutput holds that writing never waits while tracing, that the end waits for the
// reader, and that a reader that is gone is an error.
func TestOutput(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = r.Close(), w.Close() }()
	o := newOutput(w)
	const n = 10_000
	for i := range n { // more than a pipe holds
		o.send(stream.Touch{ID: uint32(i), Access: trace.Access{Path: fmt.Sprintf("/some/path/%d", i)}})
		o.flush()
	}
	if !o.waiting() {
		t.Error("nothing waits to be written to a full pipe")
	}
	got := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(r)
		got <- b
	}()
	if err := errors.Join(o.finish(), w.Close()); err != nil {
		t.Fatal(err)
	}
	frames := decode(t, <-got)
	if len(frames) != n || frames[n-1].(stream.Touch).ID != n-1 {
		t.Errorf("%d frames came out, want %d in order", len(frames), n)
	}

	r2, w2, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	o = newOutput(w2)
	if err := r2.Close(); err != nil {
		t.Fatal(err)
	}
	o.send(stream.Pending{})
	if err := o.finish(); !errors.Is(err, unix.EPIPE) {
		t.Errorf("finish without a reader = %v, want %v", err, unix.EPIPE)
	}
	o.send(stream.Pending{})
	if o.waiting() {
		t.Error("a dead output still takes frames")
	}
	if err := w2.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestComms(t *testing.T) {
	proc, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(proc) }()
	c := newComms(proc, 1)
	b, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	want := strings.TrimSpace(string(b))
	self := int32(os.Getpid())
	if got := c.of(self, true); got != want {
		t.Errorf("of(self) = %q, want %q", got, want)
	}
	c.cache[self] = comm{name: "before", at: time.Now(), stale: true}
	if got := c.of(self, false); got != want {
		t.Errorf("of(self) after an exec = %q, want %q", got, want)
	}
	c.cache[self] = comm{name: "cached", at: time.Now()}
	if got := c.of(self, false); got != "cached" {
		t.Errorf("of(self) = %q, want the cached name", got)
	}
	c.cache[1<<30] = comm{name: "shell", at: time.Now(), stale: true}
	c.executes(1<<30, "/usr/bin/a-long-program-name")
	c.executes(1<<30, "/lib/ld.so")
	if got := c.of(1<<30, false); got != "a-long-program-" {
		t.Errorf("of a process that executed and is gone = %q, want the program", got)
	}
	delete(c.cache, 1<<30)
	for _, pid := range []int32{0, -1, 1 << 30} {
		if got := c.of(pid, false); got != "" {
			t.Errorf("of(%d) = %q, want nothing", pid, got)
		}
	}
	c.cache[1<<30] = comm{name: "shell", at: time.Now(), stale: true}
	if got := c.of(1<<30, false); got != "" {
		t.Errorf("of a process that executed something unknown and is gone = %q, want nothing", got)
	}
	c.cache[1<<30] = comm{name: "was", at: time.Now().Add(-time.Hour)}
	if got := c.of(1<<30, false); got != "was" {
		t.Errorf("of a process that is gone = %q, want its last name", got)
	}
}

// TestReusedNumber holds that a process which gets the number of one that is gone is not taken for it.
func TestReusedNumber(t *testing.T) {
	proc, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(proc) }()
	const first, maker, other, reused = 1 << 30, 1<<30 + 1, 1<<30 + 2, 1<<30 + 3 // no process has these
	c := newComms(proc, first)
	l := &pageLog{comms: c, threads: make(map[int32]int32)}
	fork := func(by, child int32) { l.fold(&tracefs.Event{Kind: tracefs.Fork, PID: by, Other: child}) }
	name := func(pid int32, name string) {
		c.cache[pid] = comm{name: name, at: time.Now().Add(-time.Hour)} // as it was seen, and gone since
		if got := c.of(pid, false); got != name {
			t.Fatalf("of(%d) = %q, want %q", pid, got, name)
		}
	}
	for _, pid := range []int32{maker, other} {
		fork(first, pid)
		name(pid, "parent")
	}
	name(reused, "one") // before its fork is heard of
	fork(maker, reused)
	if got := l.process(reused); got != reused || c.of(reused, false) != "one" {
		t.Errorf("process %d, called %q: want %d, called one", got, c.of(reused, false), reused)
	}
	fork(other, reused) // a thread or a process: nobody knows yet
	if got := l.process(reused); got != other {
		t.Errorf("process(a reused number that is gone) = %d, want its maker %d", got, other)
	}
	if got := c.of(reused, false); got != "" {
		t.Errorf("the second process is called %q, after the first", got)
	}
	name(reused, "two")
	var got []trace.Process
	for _, p := range c.processes() {
		if p.PID == reused {
			got = append(got, p)
		}
	}
	if want := []trace.Process{{PID: reused, Parent: other, Command: "two"}}; !slices.Equal(got, want) {
		t.Errorf("processes %+v, want %+v", got, want)
	}
}
