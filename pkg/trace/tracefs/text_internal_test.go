package tracefs

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	diff "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// The kernel's own rendering of an event is another way to its content than this package's.
var (
	textLine = regexp.MustCompile(`-(\d+) +\[\d+\] \S+ +(\d+)\.(\d{6}): (\w+): (.*)$`)
	textPage = regexp.MustCompile(`^dev=?\s?(\d+):(\d+) ino=?\s?([0-9a-f]+) (?:pfn=0x[0-9a-f]+ )?ofs=(\d+)(?:-(\d+))?(?: order=(\d+))?$`)
	textFork = regexp.MustCompile(`pid=(\d+) child_comm=.* child_pid=(\d+)$`)
	textExec = regexp.MustCompile(`pid=(\d+) old_pid=(\d+)$`)
	textWait = regexp.MustCompile(` prev_pid=(\d+) prev_prio=-?\d+ prev_state=D\S* ==> `)
)

// parseText returns the events of a file trace, times in microseconds.
func parseText(text string) ([]Event, error) {
	var events []Event
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		m := textLine.FindStringSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("line %q", line)
		}
		k := slices.IndexFunc(tracepoints[:], func(p tracepoint) bool { return filepath.Base(p.dir) == m[4] })
		e := Event{Kind: Kind(k), PID: int32(number(m[1], 10)), Time: int64(number(m[2], 10)*1e6 + number(m[3], 10))}
		switch e.Kind {
		case Fork, Exec:
			p := textFork.FindStringSubmatch(m[5])
			if e.Kind == Exec {
				p = textExec.FindStringSubmatch(m[5])
			}
			if p == nil || int32(number(p[1], 10)) != e.PID {
				return nil, fmt.Errorf("line %q", line)
			}
			e.Other = int32(number(p[2], 10))
		case Wait:
			p := textWait.FindStringSubmatch(m[5])
			if p == nil || int32(number(p[1], 10)) != e.PID {
				return nil, fmt.Errorf("line %q", line)
			}
		default:
			p := textPage.FindStringSubmatch(m[5])
			if p == nil {
				return nil, fmt.Errorf("line %q", line)
			}
			page := uint64(os.Getpagesize())
			e.Device, e.Inode = uint32(number(p[1], 10)<<minorBits|number(p[2], 10)), number(p[3], 16)
			e.First = number(p[4], 10) / page
			e.Last = e.First
			if p[5] != "" {
				e.Last = number(p[5], 10) / page
			}
			if p[6] != "" {
				e.Last += 1<<number(p[6], 10) - 1
			}
		}
		events = append(events, e)
	}
	return events, nil
}

func number(s string, base int) uint64 {
	n, err := strconv.ParseUint(s, base, 64)
	if err != nil {
		panic(err) // the patterns match digits
	}
	return n
}

// rounded returns events as the kernel's text has them: rounded to microseconds, and in an
// order that does not depend on what the text leaves out.
func rounded(events []Event, unit int64) []Event {
	out := slices.Clone(events)
	for i := range out {
		out[i].Time = (out[i].Time + unit/2) / unit
	}
	slices.SortFunc(out, func(a, b Event) int {
		return cmp.Or(cmp.Compare(a.Time, b.Time), cmp.Compare(a.PID, b.PID), cmp.Compare(a.Kind, b.Kind),
			cmp.Compare(a.Inode, b.Inode), cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
	})
	return out
}

func TestCapturedPagesReadLikeTheirText(t *testing.T) {
	l := capturedLayout(t)
	names, err := filepath.Glob(filepath.Join(captured, "*.page"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no captured pages: %v", err)
	}
	var got []Event
	for _, name := range names {
		var info pageInfo
		if got, info, err = l.decodePage(got, readFile(t, filepath.Base(name))); err != nil || info != (pageInfo{}) {
			t.Fatalf("%s: %+v, %v", name, info, err)
		}
	}
	want, err := parseText(string(readFile(t, "trace.txt")))
	if err != nil || len(want) == 0 {
		t.Fatalf("captured text: %d events, %v", len(want), err)
	}
	if d := diff.Diff(rounded(want, 1), rounded(got, 1000)); d != "" {
		t.Errorf("events (-text +decoded):\n%s", d)
	}
}

// Everything that programs of many processes do is decoded to what the kernel prints of it.
func TestEventsReadLikeTheirText(t *testing.T) {
	testenv.Root(t)
	fs, err := Open()
	testenv.Kernel(t, "tracefs", err)
	defer fs.Close()
	in, err := fs.Create(Options{Events: all})
	testenv.Kernel(t, "page cache tracepoints", err)
	defer in.Close()
	r, err := in.Reader()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := in.Arm(unix.Gettid()); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `for i in 1 2 3; do cat /etc/passwd | wc -l; done; sleep 0.3; find /etc -type f | head -n 50 | xargs cat`)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	f, err := os.CreateTemp(t.TempDir(), "new")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 1<<20)); err != nil { // insertions, of large folios if any
		t.Fatal(err)
	}
	if err := in.Pause(); err != nil {
		t.Fatal(err)
	}
	text, err := in.dir.read("trace")
	if err != nil || len(text) >= maxText {
		t.Fatalf("%d bytes of text, %v", len(text), err)
	}
	want, err := parseText(string(text))
	if err != nil {
		t.Fatal(err)
	}
	r.Stop()
	var got []Event
	seen := map[Kind]int{}
	buf := make([]Event, 100)
	for {
		n, err := r.Read(buf)
		for _, e := range buf[:n] {
			got = append(got, e)
			seen[e.Kind]++
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, k := range []Kind{Read, Around, Insert, Fork, Exec, Wait} {
		if seen[k] == 0 {
			t.Errorf("no %s seen", k)
		}
	}
	if d := diff.Diff(rounded(want, 1), rounded(got, 1000)); d != "" {
		t.Errorf("events (-text +decoded):\n%.3000s", d)
	}
	t.Logf("%d events: %v", len(got), seen)
}
