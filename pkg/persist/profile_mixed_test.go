package persist_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestProfileMixed(t *testing.T) {
	t.Parallel()
	for want, change := range map[string]func(l *persist.List){
		`image "sha256:4c1d" and ""`:               func(l *persist.List) { l.Digest = "" },
		`platform "linux/amd64" and "linux/arm64"`: func(l *persist.List) { l.Platform = "linux/arm64" },
		`command ["nginx"] and ["nginx" "-t"]`:     func(l *persist.List) { l.Command = []string{"nginx", "-t"} },
		`command ["nginx"] and ["nginx" ""]`:       func(l *persist.List) { l.Command = []string{"nginx", ""} },
	} {
		other := runAt(1)
		change(other)
		a, errA := persist.NewProfile(runAt(2))
		b, errB := persist.NewProfile(other)
		if errA != nil || errB != nil {
			t.Fatal(errA, errB)
		}
		p, err := persist.Merge(persist.MergeOptions{}, a, b)
		if p != nil || !errors.Is(err, persist.ErrMixed) || !strings.Contains(err.Error(), want) {
			t.Errorf("Merge = %v, %v, want ErrMixed with %s", p, err, want)
		}
		p, err = persist.Merge(persist.MergeOptions{Mixed: true}, a, b)
		if err != nil || len(p.Runs) != 2 || !errors.Is(p.Mixed(), persist.ErrMixed) {
			t.Errorf("Merge of mixed = %v, %v", p, err)
		}
	}
	if err := profileOf(t, runAt(1), runAt(2)).Mixed(); err != nil {
		t.Error(err)
	}
}

// Argument vectors are compared by their arguments, whatever bytes these have.
func TestProfileMixedCommands(t *testing.T) {
	t.Parallel()
	for _, c := range [][2][]string{
		{nil, {""}},
		{{"a\x00b"}, {"a", "b"}},
		{{"a", "\x00b"}, {"a\x00", "b"}},
	} {
		a, b := runAt(1), runAt(2)
		a.Command, b.Command = c[0], c[1]
		pa, pb := profileOf(t, a), profileOf(t, b)
		_, err := persist.Merge(persist.MergeOptions{}, pa, pb)
		if want := fmt.Sprintf("command %q and %q", c[0], c[1]); !errors.Is(err, persist.ErrMixed) || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("Merge of %q and %q: %v, want ErrMixed with %s", c[0], c[1], err, want)
		}
	}
}

// A profile with a recorded run was recorded, whichever engines its runs had: else its paths would be taken for patterns.
func TestProfileEngine(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		engines []string
		want    string
	}{
		{[]string{"", ""}, ""},
		{[]string{"fanotify", "fanotify"}, "fanotify"},
		{[]string{"fanotify", "fanotify+filemap"}, "fanotify+filemap"},
		{[]string{"fanotify+page-cache", "fanotify", "fanotify+filemap"}, "fanotify+filemap+page-cache"},
		{[]string{"", "fanotify"}, "fanotify"},
		{[]string{"z+a", "", "z+a"}, "z+a"},
	} {
		for range len(c.engines) {
			c.engines = append(c.engines[1:], c.engines[0])
			var lists []*persist.List
			for i, e := range c.engines {
				l := runAt(i, trace.Access{Path: "/[a]"})
				l.Engine = e
				lists = append(lists, l)
			}
			l := profileOf(t, lists...).List(persist.Union)
			if l.Engine != c.want {
				t.Errorf("runs by %q: the list has engine %q, want %q", c.engines, l.Engine, c.want)
			}
			var b bytes.Buffer
			if _, err := l.WriteTo(&b); err != nil {
				t.Fatal(err)
			}
			if back, err := persist.Read(&b); err != nil || back.Engine != c.want {
				t.Errorf("read back: %+v, %v", back, err)
			}
		}
	}
}
