package server

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// layered returns a session at its end over one layer that has the files /0 to /9, and the inodes of
// these. What it sends goes to the file sent.
func layered(t *testing.T) (s *session, ids []inode, sent *os.File) {
	t.Helper()
	dir := t.TempDir()
	sent, err := os.Create(filepath.Join(t.TempDir(), "sent"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sent.Close() })
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	for _, name := range []string{"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"} {
		var st unix.Stat_t
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte("content"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := unix.Stat(p, &st); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, inode{1, st.Ino})
	}
	tt := &target{upper: -1, proc: -1, layers: []layer{{fd: fd, dev: 1, kind: "ext4"}}}
	s = &session{
		c: Config{MaxFiles: 100}, t: tt, out: newOutput(sent), comms: newComms(-1, 1), lean: newLean(numbering{}),
		armed: time.Now().Add(time.Hour), dated: time.Now().Add(time.Hour), pages: &pageLog{t: tt, spec: tracefs.Spec{Events: tracefs.Pages}},
	}
	return s, ids, sent
}

// frames returns what a session sent.
func frames(t *testing.T, s *session, sent *os.File) []stream.Frame {
	t.Helper()
	if err := s.out.finish(); err != nil {
		t.Fatal(err)
	}
	if _, err := sent.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(sent)
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, bytes.Clone(b))
}

// TestSettled holds that files which the run made, whose numbers were all looked for, are neither searched for
// once more nor counted again.
func TestSettled(t *testing.T) {
	s, ids, sent := layered(t)
	for i, id := range ids {
		e := entry{ino: id.ino, state: waiting}
		if i > 0 {
			e.state = left // which the search would find here, if there was one
			s.skipped++
		}
		n := s.lean.firsts.add(first{ino: id.ino, entry: s.entries.add(e)})
		s.lean.byNumber.add(n, id.ino)
		s.pages.files.touch(s.pages.files.add(pageFile{inode: id, how: trace.Opened}), 0, 0, 0, true)
	}
	s.lean.unnamed = 1
	s.resolvePages()
	var names []string
	for _, f := range frames(t, s, sent) {
		switch f := f.(type) {
		case stream.Touch:
			names = append(names, f.Access.Path)
		case stream.Found:
			t.Errorf("%s was searched for", f.Access.Path)
		}
	}
	if len(names) != 1 || names[0] != "/0" || s.skipped != 9 || len(s.losses.Trace().Losses) > 0 {
		t.Errorf("named %q, skipped %d, losses %+v; want /0 named and 9 skipped", names, s.skipped, s.losses.Trace().Losses)
	}
}

// TestBeat holds that the parent hears of the server while it searches at the end, and not before.
func TestBeat(t *testing.T) {
	for name, tt := range map[string]struct {
		beaten time.Time
		want   bool
	}{
		"while the workload runs": {},
		"at the end, soon":        {beaten: time.Now().Add(time.Hour)},
		"at the end, later":       {beaten: time.Now().Add(-2 * beatTime), want: true},
	} {
		for search, run := range map[string]func(s *session){
			"numbers": func(s *session) { _ = s.nameEntries(nil) },
			"pages":   func(s *session) { _ = (&identity{s: s, wanted: 1}).search() },
			"entries": func(s *session) { s.entries.add(entry{state: left}); s.resolvePages() },
		} {
			s, _, sent := layered(t)
			s.beaten, s.lean.unnamed = tt.beaten, 1
			run(s)
			beat := len(frames(t, s, sent)) > 0
			if beat != tt.want {
				t.Errorf("%s, search of %s: beat %t, want %t", name, search, beat, tt.want)
			}
		}
	}
}
