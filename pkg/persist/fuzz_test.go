package persist_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"regexp"
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
	})
}
