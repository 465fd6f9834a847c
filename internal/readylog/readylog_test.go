package readylog_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"regexp/syntax"
	"strings"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/readylog"
)

const stamp = "2026-01-02T03:04:05.678901234Z "

func write(t *testing.T, path, text string, flag int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|flag, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestWaitForms(t *testing.T) {
	const part = 16 << 10 // containerd's
	long := strings.Repeat("x", part)
	for name, tc := range map[string]struct{ log, pattern, want string }{
		"whole":             {stamp + "stdout F one\n" + stamp + "stderr F ready now\n", "^ready", "ready now"},
		"parts":             {stamp + "stdout P rea\n" + stamp + "stderr F noise\n" + stamp + "stdout P dy \n" + stamp + "stdout F now\n", "^ready now$", "ready now"},
		"tag with more":     {stamp + "stdout F:x ready\n", "ready", "ready"},
		"empty text":        {stamp + "stdout F \n", "^$", ""},
		"no text":           {stamp + "stdout F\n", "^$", ""},
		"other lines":       {"garbage\n\n" + stamp + "stdlog F ready\n" + stamp + "stdout F ready 2\n", "ready", "ready 2"},
		"after a long one":  {stamp + "stdout F " + long + "ready\n" + stamp + "stdout F ready\n", "ready", "ready"},
		"within a long one": {stamp + "stdout F " + long[:readylog.MaxLine-6] + "ready" + long + "\n", "ready", long[:readylog.MaxLine-6] + "readyx"},
		"behind a long one": {stamp + "stdout P " + long + "\n" + stamp + "stdout F ready\n" + stamp + "stdout F ready 4\n", "ready", "ready 4"},
		"after long parts":  {strings.Repeat(stamp+"stdout P "+long+"\n", 9) + stamp + "stdout F ready\n" + stamp + "stdout F ready 3\n", "ready", "ready 3"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "0.log")
			write(t, path, tc.log, 0)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if got, err := readylog.Wait(ctx, path, time.Time{}, regexp.MustCompile(tc.pattern)); err != nil || got != tc.want {
				t.Errorf("Wait = %.40q, %v, want %q", got, err, tc.want)
			}
		})
	}
}

// A file that appears late, is rotated twice and truncated in between.
func TestWaitFollows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	type result struct {
		line string
		err  error
	}
	got := make(chan result, 1)
	go func() {
		line, err := readylog.Wait(t.Context(), path, time.Time{}, regexp.MustCompile("ready"))
		got <- result{line, err}
	}()
	pause := func() { time.Sleep(120 * time.Millisecond) } // for a look or two
	pause()
	write(t, path, stamp+"stdout F first\n"+stamp+"stdout P rea", 0)
	awaitOpen(t, path)
	pause()
	write(t, path, stamp+"stdout F cut\n", os.O_TRUNC)
	pause()
	for range 2 {
		if err := os.Rename(path, path+".old"); err != nil {
			t.Fatal(err)
		}
		pause()
		write(t, path, stamp+"stdout F rotated\n", 0)
		awaitOpen(t, path)
	}
	// Rotated again with the line still unread: the open file is read to its end.
	write(t, path, stamp+"stdout F ready at last\n", os.O_APPEND)
	if err := os.Rename(path, path+".older"); err != nil {
		t.Fatal(err)
	}
	select {
	case r := <-got:
		if r.err != nil || r.line != "ready at last" {
			t.Errorf("Wait = %q, %v", r.line, r.err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Wait does not return")
	}
}

// Runtimes append: what an earlier container has said in the file is not this one's, and what follows is. A moment without a file, while it is rotated, ends nothing.
func TestWaitSince(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	since := time.Date(2026, 1, 2, 3, 4, 6, 0, time.UTC)
	later := "2026-01-02T05:04:06.5+02:00 "
	write(t, path, stamp+"stdout F ready, says another\n"+stamp+"stdout P rea\n"+later+"stdout F dy not\n", 0)
	got := make(chan string, 1)
	go func() {
		line, err := readylog.Wait(t.Context(), path, since, regexp.MustCompile("^ready"))
		if err != nil {
			line = err.Error()
		}
		got <- line
	}()
	awaitOpen(t, path)
	old, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = old.Close() }()
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)                                                    // some looks, where the machine is not busy
	if _, err := old.WriteString(stamp + "stdout F ready, says this one\n"); err != nil { // by a clock that was set back
		t.Fatal(err)
	}
	select {
	case line := <-got:
		if line != "ready, says this one" {
			t.Errorf("Wait = %q", line)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Wait does not return")
	}
}

// awaitOpen waits until this process has the file at path open.
func awaitOpen(t *testing.T, path string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		links, err := filepath.Glob("/proc/self/fd/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range links {
			if to, err := os.Readlink(l); err == nil && to == path {
				return
			}
		}
	}
	t.Fatalf("%s is not opened", path)
}

func TestWaitEnds(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
	defer cancel()
	if _, err := readylog.Wait(ctx, filepath.Join(dir, "missing"), time.Time{}, regexp.MustCompile("x")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait for a file that never comes = %v", err)
	}
	if _, err := readylog.Wait(t.Context(), dir, time.Time{}, regexp.MustCompile("x")); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("Wait for a directory = %v, want an error with its name", err)
	}
}

func TestCompile(t *testing.T) {
	for pattern, want := range map[string]string{
		strings.Repeat("x", readylog.MaxPattern+1): "pattern of 1025 bytes",
		"(":                                     "missing closing )",
		strings.Repeat("(a?){1000}", 101) + "b": "pattern of about ",
		strings.Repeat("(a?b?){1000}", 2):       "pattern of about ",
		"(a{99,}b){9}(c{99,}){9}(d{99,}){9}(e{99,}){9}": "pattern of about ",
		"(a{20}){30}{2}": "invalid nested repetition operator",
	} {
		if _, err := readylog.Compile(pattern); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Compile(%.60q) = %v, want an error with %q", pattern, err, want)
		}
	}
	for _, pattern := range []string{
		strings.Repeat("x", readylog.MaxPattern), strings.Repeat(`\w`, readylog.MaxPattern/2), strings.Repeat("x*", readylog.MaxPattern/2),
		strings.Repeat("()", readylog.MaxPattern/2), strings.Repeat("a|", readylog.MaxPattern/2), strings.Repeat("(?:ab|c)?", readylog.MaxPattern/9),
		"", `^\d{4}-\d{2}-\d{2}T[0-9:.]{8,35}Z? .{0,200}(ready|started) in \d{1,6} ?ms$`, "(((a{9}){9}b){1,})(x|y{70}){0,1}z{1000}",
	} {
		if _, err := readylog.Compile(pattern); err != nil {
			t.Errorf("Compile(%.60q) = %v", pattern, err)
		}
	}
}

// The program of a pattern that is taken is bounded. Empty alternatives may take a little more than was
// estimated.
func FuzzCompile(f *testing.F) {
	f.Add("(a?){700}b")
	f.Add("(?i)((x{3,}){4}|[a-z]{0,7}?)*$")
	f.Fuzz(func(t *testing.T, pattern string) {
		if _, err := readylog.Compile(pattern); err != nil {
			return
		}
		parsed, err := syntax.Parse(pattern, syntax.Perl)
		if err != nil {
			t.Fatal(err)
		}
		prog, err := syntax.Compile(parsed.Simplify())
		if err != nil || len(prog.Inst) > 2*readylog.MaxProgram {
			t.Errorf("%q: %v, or more than %d instructions: %d", pattern, err, 2*readylog.MaxProgram, len(prog.Inst))
		}
	})
}

func TestTee(t *testing.T) {
	var out bytes.Buffer
	var lines []string
	w := readylog.NewTee(&out, regexp.MustCompile("^ready"), func(line string) { lines = append(lines, line) })
	text := "not ready\nrea" + "dy 1\nready 2\n"
	for _, b := range []byte(text) {
		if n, err := w.Write([]byte{b}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	if out.String() != text || len(lines) != 1 || lines[0] != "ready 1" {
		t.Errorf("passed on %q, found %q", out.String(), lines)
	}
}

func FuzzWait(f *testing.F) {
	f.Add([]byte(stamp + "stdout P a\n" + stamp + "stdout F b\n"))
	f.Add([]byte("\n \n  \n   \n stdout P \nx stderr F"))
	f.Add([]byte(stamp + "stderr P " + strings.Repeat("x", readylog.MaxLine))) // what is begun is ended below
	f.Fuzz(func(t *testing.T, log []byte) {
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, append(bytes.Clone(log), "\nt stderr F\nt stderr F the end\n"...), 0o600); err != nil {
			t.Fatal(err)
		}
		line, err := readylog.Wait(t.Context(), path, time.Time{}, regexp.MustCompile("the end$"))
		if err != nil || !strings.HasSuffix(line, "the end") || len(line) > readylog.MaxLine {
			t.Errorf("Wait = %q, %v", line, err)
		}
	})
}
