package convert

import (
	"fmt"
	"sync"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// reporter turns the builder's and the target's reports into those of this package. Layers
// may be read two at a time, and blobs are pushed several at a time.
type reporter struct {
	to     func(Event)
	prefix string // before every task: "linux/arm64: "
	layers int

	mu   sync.Mutex
	open []Event         // tasks that were begun and not finished; guarded by mu
	past map[string]bool // tasks that were finished; guarded by mu
}

func (r *reporter) build(e builder.Event) {
	task := string(e.Stage)
	switch e.Stage {
	case builder.StageLayer:
		task = fmt.Sprintf("layer %d/%d", e.Layer+1, r.layers)
	case builder.StagePrefetch:
		task = "prefetch blob"
	}
	task = r.prefix + task
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.Stage != builder.StageLayer {
		// The stages after the layers follow each other.
		r.finishAll(task)
	}
	r.send(Event{Task: task, Done: e.Done, Total: e.Total, Finished: e.Total > 0 && e.Done >= e.Total})
}

func (r *reporter) push(p remote.Progress) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.send(Event{
		Task: r.prefix + "push " + p.Descriptor.Digest.Encoded()[:12], Done: p.Offset, Total: p.Descriptor.Size,
		Finished: p.Result != 0,
	})
}

// again forgets which tasks were finished: the image is built a second time.
func (r *reporter) again() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.finishAll("")
	r.past = nil
}

// finish ends every task that is open.
func (r *reporter) finish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.finishAll("")
}

func (r *reporter) finishAll(but string) {
	for _, e := range append([]Event(nil), r.open...) {
		if e.Task != but {
			e.Finished = true
			r.send(e)
		}
	}
}

func (r *reporter) send(e Event) {
	if r.to == nil || r.past[e.Task] {
		return
	}
	if e.Finished {
		if r.past == nil {
			r.past = map[string]bool{}
		}
		r.past[e.Task] = true
	}
	at := -1
	for i := range r.open {
		if r.open[i].Task == e.Task {
			at = i
		}
	}
	switch {
	case e.Finished && at >= 0:
		r.open = append(r.open[:at], r.open[at+1:]...)
	case !e.Finished && at >= 0:
		r.open[at] = e
	case !e.Finished:
		r.open = append(r.open, e)
	}
	r.to(e)
}
