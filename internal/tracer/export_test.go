package tracer

import "time"

// Ready is how many servers stand by.
func (r *Reserve) Ready() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.ready)
}

// Keep has servers that are asked for from now on stand by for d.
func (r *Reserve) Keep(d time.Duration) { r.keep = d }
