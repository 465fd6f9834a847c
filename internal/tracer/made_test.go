package tracer_test

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/tracer"
)

// TestIdleWhileWriting holds that a run which goes on making files, as servers do, is idle all the same, and
// that what it made is skipped.
func TestIdleWhileWriting(t *testing.T) {
	b := newDiskBox(t, identitySetup)
	args := []string{"/program", "files", "read:/s/plain"}
	for i := range 200 {
		args = append(args, fmt.Sprintf("write:/s/made%d", i), "pause:100ms")
	}
	c := b.create(t, pivot, args...)
	s := start(t, c, tracer.Options{Idle: 2 * time.Second})
	c.letGo(t)
	r := result(t, s)
	if r.End != tracer.EndIdle || r.Err != nil || !r.Trace.Complete() || r.Trace.Skipped < 1 {
		t.Errorf("end %q, error %v, losses %q, skipped %d; want %q without a loss", r.End, r.Err, lossOf(r), r.Trace.Skipped, tracer.EndIdle)
	}
	if got, want := identityOf(r), []string{"/s/plain 10000"}; !slices.Equal(got, want) {
		t.Errorf("files %q, want %q", got, want)
	}
}

// TestSkippedOnce holds that files which are not of the image, though their numbers might be, are counted
// once, by whichever engine.
func TestSkippedOnce(t *testing.T) {
	const n = 20
	b := newDiskBox(t, identitySetup)
	args := []string{"/program", "files", "read:/s/plain"}
	for i := range n {
		// Older than the recording: that of a container which runs already has such files.
		p := fmt.Sprintf("/s/older%d", i)
		if err := os.WriteFile(b.merged+p, make([]byte, 5000), 0o644); err != nil {
			t.Fatal(err)
		}
		args = append(args, "read:"+p)
	}
	time.Sleep(50 * time.Millisecond) // by more than a clock tick
	r := b.record(t, pivot, args...)
	if r.Trace.Skipped < n || r.Trace.Skipped > n+1 { // a busy machine may fault the program again that executed the command
		t.Errorf("skipped %d files, want %d, and one more at most", r.Trace.Skipped, n)
	}
	if got, want := identityOf(r), []string{"/s/plain 10000"}; !slices.Equal(got, want) {
		t.Errorf("files %q, want %q", got, want)
	}
}
