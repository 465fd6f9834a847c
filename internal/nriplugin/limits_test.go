package nriplugin_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/headstart-oci/headstart/internal/creation"
	"github.com/headstart-oci/headstart/internal/metrics"
	"github.com/headstart-oci/headstart/internal/nriplugin"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

const withOverrides = `
timeout = 60
ready_log = "all ready"
[[override]]
images = ["nginx*"]
timeout = "5m"
ready_log = "start worker process"
[[override]]
images = ["nginx:latest", "redis"]
idle_timeout = "1s"
`

func TestLimits(t *testing.T) {
	base, err := nriplugin.ParseConfig([]byte(withOverrides), nriplugin.DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		image          string
		pod, container map[string]string
		timeout, idle  time.Duration
		warnings       int
	}{
		"configuration":    {image: "docker.io/library/busybox:1", timeout: time.Minute, idle: 30 * time.Second},
		"first override":   {image: "docker.io/library/nginx:latest", timeout: 5 * time.Minute, idle: 30 * time.Second},
		"another override": {image: "docker.io/library/redis:7", timeout: time.Minute, idle: time.Second},
		"pod":              {image: "nginx", pod: map[string]string{"headstart.dev/timeout": "10", "headstart.dev/idle-timeout": "0s"}, timeout: 10 * time.Second},
		"pod, one":         {image: "nginx", pod: map[string]string{"headstart.dev/timeout": "10", "headstart.dev/timeout.web": "11s", "headstart.dev/timeout.other": "1s"}, timeout: 11 * time.Second, idle: 30 * time.Second},
		"container":        {image: "nginx", pod: map[string]string{"headstart.dev/timeout.web": "11s"}, container: map[string]string{"headstart.dev/timeout": "12s"}, timeout: 12 * time.Second, idle: 30 * time.Second},
		"bad ones": {
			image: "nginx", pod: map[string]string{"headstart.dev/timeout": "10", "headstart.dev/timeout.web": "soon", "headstart.dev/idle-timeout": "-1s", "headstart.dev/ready-log": "("},
			timeout: 10 * time.Second, idle: 30 * time.Second, warnings: 3,
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := &world{t: t}
			w.open(func(c *nriplugin.Config, _ *nriplugin.Options) { *c = base })
			ctr := container("c", tc.container)
			ctr.Annotations["io.kubernetes.cri.image-name"] = tc.image
			if err := w.plugin.StartContainer(t.Context(), pod("default", tc.pod), ctr); err != nil {
				t.Fatal(err)
			}
			eventually(t, "a session", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.sessions) == 1 })
			o := w.session(0).opts
			if o.Timeout != tc.timeout || o.Idle != tc.idle {
				t.Errorf("timeout %v and idle %v, want %v and %v", o.Timeout, o.Idle, tc.timeout, tc.idle)
			}
			w.session(0).end("stop", nil, "/x")
			w.idle()
			if err := w.close(); err != nil {
				t.Error(err)
			}
			if got := w.lines("annotation ignored"); len(got) != tc.warnings {
				t.Errorf("warnings %q, want %d", got, tc.warnings)
			}
		})
	}
}

func TestOverridesRefused(t *testing.T) {
	for text, want := range map[string]string{
		"ready_log = \"(\"":                                      "line 1: key ready_log: error parsing regexp",
		"[[override]]\ntimeout = 5":                              "key override[0]: images: is missing",
		"[[override]]\nimages = [\"\"]":                          "key override[0]: images: holds an empty pattern",
		"[[override]]\nimages = [\"x\"]\nready_log = \"[\"":      "key override[0]: ready_log: ",
		"[[override]]\nimages = [\"x\"]\ntimeout = \"soon\"":     "key override[0].timeout: got \"soon\"",
		"[[override]]\nimages = [\"x\"]\nidle_timeout = \"-1s\"": "key override[0]: idle_timeout: got -1s",
		"[[override]]\nimages = [\"x\"]\nidle = \"1s\"":          "line 3: unknown key override.idle",
		"metrics_address = \"0.0.0.0:80\"":                       "line 1: key metrics_address: got \"0.0.0.0:80\", want a host of the loopback interface",
	} {
		if _, err := nriplugin.ParseConfig([]byte(text), nriplugin.DefaultConfig()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

func TestReadyLog(t *testing.T) {
	log := filepath.Join(t.TempDir(), "0.log")
	for name, tc := range map[string]struct {
		pod  map[string]string
		path func() (string, error)
		want string // the reason of the stop
		warn bool
	}{
		"found":   {nil, func() (string, error) { return log, nil }, "ready", false},
		"asked":   {map[string]string{"headstart.dev/ready-log": "^ready"}, func() (string, error) { return log, nil }, "ready", false},
		"no path": {nil, func() (string, error) { return "", errFake }, "stop", true},
		"nobody":  {nil, nil, "stop", true},
	} {
		t.Run(name, func(t *testing.T) {
			w := &world{t: t}
			w.open(func(c *nriplugin.Config, o *nriplugin.Options) {
				c.ReadyLog = "^ready"
				if tc.pod != nil {
					c.ReadyLog = "^never"
				}
				o.Open = func(nriplugin.Config) (*nriplugin.Backend, error) {
					b := w.backend()
					if tc.path != nil {
						b.LogPath = func(context.Context, string) (string, error) { return tc.path() }
					}
					return b, nil
				}
			})
			if err := os.WriteFile(log, []byte("t stdout F starting\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := w.plugin.StartContainer(t.Context(), pod("default", tc.pod), container("c", nil)); err != nil {
				t.Fatal(err)
			}
			s := w.session(0)
			s.onStop = func(reason string) { s.end(reason, nil, "/x") }
			if tc.warn {
				eventually(t, "a warning", func() bool { return len(w.lines("ready_log is not waited for")) == 1 })
				w.stopContainer("c")
			} else if err := os.WriteFile(log, []byte("t stdout F starting\nt stderr F ready\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			w.idle()
			if l := w.saved(); len(l) != 1 || l[0].End != tc.want || !l[0].Complete() {
				t.Errorf("lists %+v, want one that ended by %s", l, tc.want)
			}
			if err := w.close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// The watch of the log ends with the recording.
func TestReadyLogNeverComes(t *testing.T) {
	w := &world{t: t}
	w.open(func(c *nriplugin.Config, o *nriplugin.Options) {
		c.ReadyLog = "^ready"
		o.Open = func(nriplugin.Config) (*nriplugin.Backend, error) {
			b := w.backend()
			b.LogPath = func(context.Context, string) (string, error) { return "/nonexistent/log", nil }
			return b, nil
		}
	})
	w.startContainer("c")
	w.session(0).end("exit", nil, "/x")
	w.idle()
	if err := w.close(); err != nil {
		t.Error(err)
	}
	if got := w.lines("ready_log"); len(got) != 0 {
		t.Errorf("lines %q, want none", got)
	}
}

func TestWhatTheRuntimeRead(t *testing.T) {
	w := &world{t: t}
	var asked creation.Options
	w.open(func(_ *nriplugin.Config, o *nriplugin.Options) {
		o.Open = func(nriplugin.Config) (*nriplugin.Backend, error) {
			b := w.backend()
			b.Created = func(_ context.Context, o creation.Options) []trace.Access {
				asked = o
				return []trace.Access{{Path: "/etc/passwd", How: trace.Runtime, Size: 9}}
			}
			return b, nil
		}
	})
	for i, files := range [][]string{{"/bin/app"}, nil} {
		ctr := container(fmt.Sprint("c", i), nil)
		ctr.Mounts = []*api.Mount{
			{Source: "/var/lib/containerd/io.containerd.grpc.v1.cri/containers/" + ctr.Id + "/volumes/abc", Destination: "/data"},
			{Source: "/home", Destination: "/home"},
		}
		if err := w.plugin.StartContainer(t.Context(), pod("default", nil), ctr); err != nil {
			t.Fatal(err)
		}
		w.session(i).end("exit", nil, files...)
		w.idle()
		if asked.PID != 4242 || len(asked.Volumes) != 1 || asked.Volumes[0].Destination != "/data" || asked.Before.IsZero() {
			t.Errorf("asked for %+v", asked)
		}
		var got []string
		for _, a := range w.saved()[i].Accesses {
			got = append(got, a.Path)
		}
		if want := append([]string{"/etc/passwd"}, files...); !slices.Equal(got, want) {
			t.Errorf("listed %q, want %q", got, want)
		}
	}
	// A container that did nothing is nothing to build from.
	if got := w.queued(); len(got) != 1 {
		t.Errorf("%d rebuilds were asked for, want 1", len(got))
	}
	if err := w.close(); err != nil {
		t.Error(err)
	}
}

func TestMetricsOfRuns(t *testing.T) {
	m := metrics.New()
	w := &world{t: t}
	w.open(func(_ *nriplugin.Config, o *nriplugin.Options) { o.Metrics = m })
	for i, losses := range [][]trace.Loss{nil, {{Reason: "overflow", Count: 3}}, {{Reason: "never heard of", Count: -1}}} {
		w.startContainer(fmt.Sprint("c", i))
		w.session(i).end("exit", losses, "/a", "/b")
		w.idle()
	}
	w.save = func(*persist.List) error { return errFake }
	w.startContainer("c3")
	w.session(3).end("exit", nil, "/a")
	w.idle()
	if err := w.close(); err != nil {
		t.Error(err)
	}
	err := testutil.GatherAndCompare(m.Gatherer(), strings.NewReader(`
# HELP headstart_events_total Kernel events that recordings were made from.
# TYPE headstart_events_total counter
headstart_events_total 7
# HELP headstart_losses_total Losses that lists say of themselves, by reason; one loss may be of many events.
# TYPE headstart_losses_total counter
headstart_losses_total{reason="other"} 1
headstart_losses_total{reason="overflow"} 1
# HELP headstart_recordings Recordings that go on or are being saved.
# TYPE headstart_recordings gauge
headstart_recordings 0
# HELP headstart_runs_total Recorded container starts, by verdict: complete, incomplete, failed.
# TYPE headstart_runs_total counter
headstart_runs_total{verdict="complete"} 1
headstart_runs_total{verdict="failed"} 1
headstart_runs_total{verdict="incomplete"} 2
`), "headstart_events_total", "headstart_losses_total", "headstart_recordings", "headstart_runs_total")
	if err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(m.Gatherer(), "headstart_hook_duration_seconds"); err != nil || n == 0 {
		t.Errorf("%d hooks were timed, %v", n, err)
	}
	if problems, err := testutil.GatherAndLint(m.Gatherer()); err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
}

// A list that does not hold all of a run is incomplete for everybody: the file, the queue, the log and what is counted.
func TestListBeyondBounds(t *testing.T) {
	w := &world{t: t}
	w.open(nil)
	w.startContainer("a")
	long := strings.Repeat("\x01", 250) // of which each byte takes four in a list
	var files []string
	for i := 0; i*4*16*len(long) <= persist.MaxListSize; i++ {
		files = append(files, fmt.Sprintf("/%d", i)+strings.Repeat("/"+long, 16))
	}
	w.session(0).end("exit", nil, files...)
	w.idle()
	if err := w.close(); err != nil {
		t.Error(err)
	}
	lists := w.saved()
	if len(lists) != 1 {
		t.Fatalf("%d lists, want 1", len(lists))
	}
	l := lists[0]
	if l.Complete() || len(l.Accesses) == 0 || len(l.Accesses) >= len(files) || l.Losses[0].Reason != "limit" || l.Losses[0].Count != int64(len(files)-len(l.Accesses)) {
		t.Errorf("a list of %d of %d files, losses %v, want what is left out as a loss", len(l.Accesses), len(files), l.Losses)
	}
	if q := w.queued(); len(q) != 0 {
		t.Errorf("%d rebuilds were asked for, want none", len(q))
	}
	if got := w.lines("recorded "); len(got) != 1 || !strings.Contains(got[0], "rebuild not queued: the list is incomplete") {
		t.Errorf("log %q", got)
	}
}

// A name that is another image's by now is not asked for again, when the container may be gone and nobody could tell.
func TestOtherImage(t *testing.T) {
	asked := 0
	w := &world{t: t}
	w.image = func(_, name string) (nriplugin.Image, error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if asked++; asked == 1 {
			return nriplugin.Image{Reference: name}, fmt.Errorf("ask: %w", nriplugin.ErrOtherImage)
		}
		return nriplugin.Image{Reference: name, Digest: fakeDigest, Platform: "linux/amd64"}, nil
	}
	w.open(nil)
	w.startContainer("a")
	w.session(0).end("exit", nil, "/a")
	w.idle()
	if err := w.close(); err != nil {
		t.Error(err)
	}
	if l := w.saved(); len(l) != 1 || l[0].Digest != "" || len(w.queued()) != 0 || asked != 1 {
		t.Errorf("%d lists, %d rebuilds, asked %d times; want one list without a digest, asked once", len(l), len(w.queued()), asked)
	}
	if got := w.lines("recorded "); len(got) != 1 || !strings.Contains(got[0], "other layers today") {
		t.Errorf("log %q", got)
	}
}
