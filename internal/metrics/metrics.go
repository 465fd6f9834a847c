// Package metrics counts what the plugin does, for Prometheus.
//
// Every name begins with "headstart_", carries its base unit, and has labels of few values only.
// Nothing is served unless [Server] is told to.
package metrics

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Verdicts of a run, as [Metrics.Run] takes them.
const (
	Complete   = "complete"   // nothing is known to be missing
	Incomplete = "incomplete" // the list was kept and has a loss
	Failed     = "failed"     // nothing was recorded, or the list was not saved
)

// Results of a rebuild, as [Metrics.Rebuild] takes them.
const (
	Built     = "built"
	NotBuilt  = "failed"
	Unchanged = "unchanged"  // the image was built for what the run read already
	NotQueued = "not_queued" // nothing was to be built, or the queue did not take it
)

// Metrics counts. Its methods are safe for concurrent use, and do nothing on a nil *Metrics.
type Metrics struct {
	registry *prometheus.Registry

	runs, losses, rebuilds *prometheus.CounterVec
	events, lost, late     prometheus.Counter
	listBytes              prometheus.Counter
	hooks                  *prometheus.HistogramVec
	active                 prometheus.Gauge
}

// hookBuckets are bounds in seconds. Hooks take milliseconds; the deadline is 0.2 s by default, the
// watchdog's 1 s.
var hookBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .2, .5, 1}

// reasons are the words that losses are counted by; others are "other", so that the number of
// series is bounded. Source: trace.Loss.
var reasons = map[string]bool{
	"overflow": true, "late": true, "killed": true, "unresolved": true, "limit": true,
	"overrun": true, "pages": true, "exec": true,
}

const otherReason = "other"

// New returns Metrics in which nothing was counted, with those of the Go runtime and of the process.
func New() *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		runs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "headstart_runs_total", Help: "Recorded container starts, by verdict: complete, incomplete, failed.",
		}, []string{"verdict"}),
		losses: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "headstart_losses_total", Help: "Losses that lists say of themselves, by reason; one loss may be of many events.",
		}, []string{"reason"}),
		rebuilds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "headstart_rebuilds_total", Help: "Rebuilds of images, by result: built, failed, unchanged, not_queued.",
		}, []string{"result"}),
		events: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "headstart_events_total", Help: "Kernel events that recordings were made from.",
		}),
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "headstart_lost_events_total", Help: "Events known to be lost; losses of an unknown number are in headstart_losses_total only.",
		}),
		late: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "headstart_armed_late_total", Help: "Container starts that went on before their tracer was ready.",
		}),
		listBytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "headstart_list_bytes_total", Help: "Bytes of access lists written.",
		}),
		hooks: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "headstart_hook_duration_seconds", Help: "How long NRI hooks held the runtime.", Buckets: hookBuckets,
		}, []string{"hook"}),
		active: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "headstart_recordings", Help: "Recordings that go on or are being saved.",
		}),
	}
	m.registry.MustRegister(m.runs, m.losses, m.rebuilds, m.events, m.lost, m.late, m.listBytes, m.hooks, m.active,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// Series that are there from the start have a rate from their first count on.
	for _, v := range []string{Complete, Incomplete, Failed} {
		m.runs.WithLabelValues(v)
	}
	for _, v := range []string{Built, NotBuilt, Unchanged, NotQueued} {
		m.rebuilds.WithLabelValues(v)
	}
	return m
}

// Gatherer returns what a scrape shows.
func (m *Metrics) Gatherer() prometheus.Gatherer { return m.registry }

// Handler serves the metrics in the formats of Prometheus.
func (m *Metrics) Handler() http.Handler {
	// A collector that fails leaves the others: a scrape with most is better than one with none.
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 4, Timeout: 5 * time.Second})
}

// Run counts the end of a run with the kernel events it was made from.
func (m *Metrics) Run(verdict string, events int64) {
	if m == nil {
		return
	}
	m.runs.WithLabelValues(verdict).Inc()
	m.events.Add(float64(max(events, 0)))
}

// Loss counts one loss of a run. Events is how many events are missing; below 0: nobody knows.
func (m *Metrics) Loss(reason string, events int64) {
	if m == nil {
		return
	}
	if !reasons[reason] {
		reason = otherReason
	}
	m.losses.WithLabelValues(reason).Inc()
	m.lost.Add(float64(max(events, 0)))
}

// Late counts a start that did not wait for its tracer any longer.
func (m *Metrics) Late() {
	if m != nil {
		m.late.Inc()
	}
}

// List counts the bytes of a list that was written.
func (m *Metrics) List(bytes int64) {
	if m != nil {
		m.listBytes.Add(float64(max(bytes, 0)))
	}
}

// Rebuild counts a rebuild by its result.
func (m *Metrics) Rebuild(result string) {
	if m != nil {
		m.rebuilds.WithLabelValues(result).Inc()
	}
}

// Hook counts a hook that took d. Hook must be one of a fixed set of names.
func (m *Metrics) Hook(hook string, d time.Duration) {
	if m != nil {
		m.hooks.WithLabelValues(hook).Observe(d.Seconds())
	}
}

// Began and Ended count recordings that go on.
func (m *Metrics) Began() {
	if m != nil {
		m.active.Inc()
	}
}

// Ended is the end of what Began counted.
func (m *Metrics) Ended() {
	if m != nil {
		m.active.Dec()
	}
}
