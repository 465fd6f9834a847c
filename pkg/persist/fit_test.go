package persist_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestFitLeavesAlone(t *testing.T) {
	t.Parallel()
	l := awkward()
	if l.Fit() != l {
		t.Error("Fit changed a list that fits")
	}
}

// A list beyond the bounds of the format is written all the same, and still holds every byte.
func TestFit(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("a million ranges")
	}
	r := rand.New(rand.NewPCG(1, 1))
	l := &persist.List{}
	total := 0
	for f, n := range []int{persist.MaxFileRanges + 5, 3, persist.MaxFileRanges, persist.MaxFileRanges, persist.MaxFileRanges, 10} {
		a := trace.Access{Path: "/f" + string(rune('0'+f)), Ranges: make([]trace.Range, 0, n)}
		at := int64(0)
		for i := range n {
			at += 4096 * (1 + r.Int64N(4))
			a.Ranges = append(a.Ranges, trace.Range{Offset: at, Length: 4096, Elapsed: 1, Certain: i%2 == 0})
			at += 4096
		}
		r.Shuffle(n, func(i, j int) { a.Ranges[i], a.Ranges[j] = a.Ranges[j], a.Ranges[i] })
		l.Accesses = append(l.Accesses, a)
		total += n
	}
	if _, err := l.WriteTo(io.Discard); err == nil {
		t.Fatalf("a list with %d ranges was written", total)
	}
	fit := l.Fit()
	if _, err := fit.WriteTo(io.Discard); err != nil {
		t.Fatal(err)
	}
	if fit.Fit() != fit {
		t.Error("what fits is changed")
	}
	left := 0
	for i, a := range fit.Accesses {
		left += len(a.Ranges)
		holds := map[int64]bool{}
		sure := map[int64]bool{}
		for _, x := range a.Ranges {
			for at := x.Offset; at < x.Offset+x.Length; at += 4096 {
				holds[at], sure[at] = true, x.Certain
			}
		}
		lost := 0
		for _, x := range l.Accesses[i].Ranges {
			if !holds[x.Offset] || sure[x.Offset] && !x.Certain {
				lost++
			}
		}
		if lost > 0 {
			t.Errorf("%s: %d ranges are not in the list, or more certain than they were", a.Path, lost)
		}
	}
	if left > persist.MaxRanges || left < persist.MaxRanges/2 {
		t.Errorf("%d ranges are left of %d, want about %d", left, total, persist.MaxRanges)
	}
	if !fit.Complete() || len(l.Accesses[0].Ranges) != persist.MaxFileRanges+5 {
		t.Error("a loss where nothing is missing, or the list itself was changed")
	}
}

func TestFitTooManyFiles(t *testing.T) {
	t.Parallel()
	l := &persist.List{Trace: trace.Trace{Accesses: make([]trace.Access, persist.MaxLines)}}
	fit := l.Fit()
	if len(fit.Accesses) >= persist.MaxLines || len(fit.Losses) != 1 || fit.Losses[0].Reason != "limit" || fit.Losses[0].Count != int64(persist.MaxLines-len(fit.Accesses)) {
		t.Errorf("Fit left %d accesses and %v", len(fit.Accesses), fit.Losses)
	}
	if again := fit.Fit(); again != fit {
		t.Errorf("what fits is changed: %v", again.Losses)
	}
}

// A list of more bytes than the format takes keeps the accesses that came first, as many as fit.
func TestFitTooManyBytes(t *testing.T) {
	t.Parallel()
	const n, escaped = 9000, 4000
	l := &persist.List{Reference: "app:v1", Trace: trace.Trace{
		Losses:    []trace.Loss{{Reason: "overflow", Count: 1}},
		Processes: []trace.Process{{PID: 1, Command: strings.Repeat("\x01", escaped)}},
	}}
	for i := range n {
		l.Accesses = append(l.Accesses, trace.Access{Path: fmt.Sprintf("/%d%s", i, strings.Repeat("\x01", escaped)), How: trace.Opened})
	}
	if _, err := l.WriteTo(io.Discard); !errors.Is(err, persist.ErrInvalid) {
		t.Fatalf("a list of more than %d bytes was written: %v", persist.MaxListSize, err)
	}
	fit := l.Fit()
	size, err := fit.WriteTo(io.Discard)
	// One access more would not fit, and there is a reserve of 4 KiB.
	if err != nil || size < persist.MaxListSize-4*escaped-5000 {
		t.Errorf("Fit left %d bytes of %d, %v", size, persist.MaxListSize, err)
	}
	if again := fit.Fit(); again != fit {
		t.Errorf("what fits is changed: %v", again.Losses)
	}
	left := len(fit.Accesses)
	if left == 0 || left >= n || fit.Accesses[left-1].Path != l.Accesses[left-1].Path {
		t.Errorf("Fit left %d accesses of %d", left, n)
	}
	if len(fit.Losses) != 2 || fit.Losses[1].Reason != "limit" || fit.Losses[1].Count != int64(n-left) {
		t.Errorf("Fit noted %v", fit.Losses)
	}
	if len(l.Accesses) != n || len(l.Losses) != 1 {
		t.Error("the list itself was changed")
	}
}
