// Package progress shows how far long tasks are: bars on a terminal, plain lines
// elsewhere. Bars overwrite each other on the last line of the terminal; a task that is
// finished leaves a line behind.
package progress

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// Display shows tasks on a writer. The zero value and nil show nothing. Safe for
// concurrent use.
type Display struct {
	w    io.Writer
	bars bool
	now  func() time.Time

	mu     sync.Mutex // guards what follows
	begun  map[string]time.Time
	bar    *progressbar.ProgressBar
	shown  string // the task that bar shows
	said   map[string]time.Time
	closed bool
}

// every is how often a plain display speaks about a task that is not finished.
const every = 10 * time.Second

// New returns a display on w: with bars when w is a terminal, with lines elsewhere.
func New(w io.Writer) *Display {
	f, ok := w.(*os.File)
	return &Display{
		w: w, bars: ok && term.IsTerminal(int(f.Fd())), now: time.Now,
		begun: map[string]time.Time{}, said: map[string]time.Time{},
	}
}

// Update says that done of total bytes of a task are done; total is 0 when it is not
// known. finished ends the task, whatever was done.
func (d *Display) Update(task string, done, total int64, finished bool) {
	if d == nil || d.w == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	start, ok := d.begun[task]
	if !ok {
		start = d.now()
		d.begun[task], d.said[task] = start, start
	}
	switch {
	case finished:
		d.erase()
		if task == d.shown {
			d.bar, d.shown = nil, ""
		}
		d.line(task, done, d.now().Sub(start))
		delete(d.begun, task)
		delete(d.said, task)
	case d.bars:
		d.draw(task, done, total)
	case d.now().Sub(d.said[task]) >= every:
		d.said[task] = d.now()
		d.part(task, done, total)
	}
}

// Printf writes a line of text between the tasks.
func (d *Display) Printf(format string, args ...any) {
	if d == nil || d.w == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.erase()
	fmt.Fprintf(d.w, format+"\n", args...)
}

// Close takes the bar away. Later updates show nothing.
func (d *Display) Close() {
	if d == nil || d.w == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.erase()
	d.closed = true
}

func (d *Display) draw(task string, done, total int64) {
	if d.bar != nil && d.shown != task {
		return // of several tasks at once, one is shown until it is finished
	}
	if d.bar == nil {
		limit := total
		if limit <= 0 {
			limit = -1 // a spinner
		}
		d.bar = progressbar.NewOptions64(limit,
			progressbar.OptionSetWriter(d.w), progressbar.OptionSetDescription(task),
			progressbar.OptionShowBytes(true), progressbar.OptionUseIECUnits(true),
			progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionSetWidth(30),
			progressbar.OptionClearOnFinish(), progressbar.OptionSpinnerType(14))
		d.shown = task
	}
	// A terminal that cannot be written to is no reason to fail.
	_ = d.bar.Set64(done)
}

// erase takes the bar off the terminal; the next update draws it again.
func (d *Display) erase() {
	if d.bar != nil {
		_ = d.bar.Clear() // as in draw
	}
}

func (d *Display) line(task string, done int64, took time.Duration) {
	if done > 0 {
		fmt.Fprintf(d.w, "%s: %s in %s\n", task, Bytes(done), took.Round(10*time.Millisecond))
		return
	}
	fmt.Fprintf(d.w, "%s: %s\n", task, took.Round(10*time.Millisecond))
}

func (d *Display) part(task string, done, total int64) {
	if total > 0 {
		fmt.Fprintf(d.w, "%s: %s of %s\n", task, Bytes(done), Bytes(total))
		return
	}
	fmt.Fprintf(d.w, "%s: %s\n", task, Bytes(done))
}

// Bytes gives n as a person reads it: "512 B", "1.5 KiB", "20.3 MiB".
func Bytes[T int64 | uint64](n T) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n), -1
	for v >= 1024 && unit < 5 {
		v, unit = v/1024, unit+1
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGTPE"[unit])
}
