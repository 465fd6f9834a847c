package persist_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/persist"
)

// unknownLine matches header lines whose keys no version knows.
var unknownLine = regexp.MustCompile(`^[a-z-]+ `)

func knownOnly(in []byte) []byte {
	known := regexp.MustCompile(`^(reference|digest|platform|container|name|pod|namespace|arg|engine|grade|started|duration|ended|verdict|events|skipped|loss|process) `)
	var out []byte
	header := true
	for i, line := range bytes.SplitAfter(in, []byte("\n")) {
		header = header && !bytes.HasPrefix(line, []byte("accesses\t"))
		if i > 0 && header && unknownLine.Match(line) && !known.Match(line) {
			continue
		}
		out = append(out, line...)
	}
	return out
}

func seeds(f *testing.F) {
	f.Add([]byte(golden))
	f.Add([]byte("headstart-access-list v2\nnode n1\nverdict complete\naccesses\thow\telapsed_ns\tsize\tpid\tcommand\tranges\tpath\nend 0 accesses 0 ranges 0 losses\n"))
	f.Add([]byte(goldenV1))
	f.Add([]byte("headstart-access-list v3\n"))
	f.Add([]byte("/a\r\n\r\n/b/\r\r\n/c"))
	f.Add([]byte("/a\r\n/b\r\r\n/c\n"))
	for _, write := range []func(*bytes.Buffer) (int, error){
		func(b *bytes.Buffer) (int, error) { return awkward().WritePaths(b) },
		func(b *bytes.Buffer) (int, error) { return awkward().WriteCSV(b, false) },
		func(b *bytes.Buffer) (int, error) { return awkward().WriteCSV(b, true) },
		func(b *bytes.Buffer) (int, error) { return awkward().WriteJSON(b) },
	} {
		var b bytes.Buffer
		if _, err := write(&b); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	recorded, err := filepath.Glob("testdata/*")
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range recorded {
		if b, err := os.ReadFile(name); err == nil {
			f.Add(b)
		}
	}
}

func FuzzRead(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		l, err := persist.Read(bytes.NewReader(in))
		if err != nil {
			if l != nil || !errors.Is(err, persist.ErrInvalid) && !errors.Is(err, persist.ErrUnsupported) {
				t.Fatalf("Read = %v, %v, want nil and ErrInvalid or ErrUnsupported", l, err)
			}
			return
		}
		var b bytes.Buffer
		if _, err := l.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		if bytes.HasPrefix(in, []byte("headstart-access-list v1\n")) {
			back, err := persist.Read(&b)
			if d := cmp.Diff(l, back); d != "" || err != nil {
				t.Fatalf("version 1 after version 2: %v, (-read +back):\n%s", err, d)
			}
			return
		}
		if want := knownOnly(in); !bytes.Equal(b.Bytes(), want) {
			t.Fatalf("written back %q, want %q", b.Bytes(), want)
		}
	})
}

func FuzzReadAny(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		l, err := persist.ReadAny(bytes.NewReader(in))
		if err != nil {
			if l != nil || !errors.Is(err, persist.ErrInvalid) && !errors.Is(err, persist.ErrUnsupported) {
				t.Fatalf("ReadAny = %v, %v, want nil and ErrInvalid or ErrUnsupported", l, err)
			}
			return
		}
		var b bytes.Buffer
		if _, err := l.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		back, err := persist.Read(&b)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(l, back); d != "" {
			t.Fatalf("read back (-read +back):\n%s", d)
		}
		checkPaths(t, l)
	})
}

// checkPaths fails unless what WritePaths writes is read back, and nothing is left out without need.
func checkPaths(t *testing.T, l *persist.List) {
	t.Helper()
	want, returns := []string{}, true
	for _, a := range l.Accesses {
		if !strings.Contains(a.Path, "\n") {
			want, returns = append(want, a.Path), returns && strings.HasSuffix(a.Path, "\r")
		}
	}
	if returns {
		want = []string{}
	}
	var b bytes.Buffer
	omitted, err := l.WritePaths(&b)
	if err != nil || omitted != len(l.Accesses)-len(want) {
		t.Fatalf("WritePaths = %d, %v, want %d, nil", omitted, err, len(l.Accesses)-len(want))
	}
	text := b.String()
	back, err := persist.ReadAny(&b)
	if err != nil {
		t.Fatalf("read back %q: %v", text, err)
	}
	got := []string{}
	for _, a := range back.Accesses {
		got = append(got, a.Path)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatalf("paths read back (-want +got):\n%s", d)
	}
}
