package metrics_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/headstart-oci/headstart/internal/metrics"
	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func filled() *metrics.Metrics {
	m := metrics.New()
	m.Began()
	m.Hook("StartContainer", 3*time.Millisecond)
	m.Run(metrics.Complete, 100)
	m.Run(metrics.Incomplete, 5)
	m.Loss("overflow", 7)
	m.Loss("late", -1)
	m.Loss("something a later tracer says", 1)
	m.Loss("something else", 1)
	m.Late()
	m.List(1234)
	m.Rebuild(metrics.Built)
	m.Ended()
	return m
}

// TestLint has Prometheus' own linter judge names, units and help.
func TestLint(t *testing.T) {
	m := filled()
	problems, err := testutil.GatherAndLint(m.Gatherer())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestCounts(t *testing.T) {
	want := `
# HELP headstart_armed_late_total Container starts that went on before their tracer was ready.
# TYPE headstart_armed_late_total counter
headstart_armed_late_total 1
# HELP headstart_events_total Kernel events that recordings were made from.
# TYPE headstart_events_total counter
headstart_events_total 105
# HELP headstart_list_bytes_total Bytes of access lists written.
# TYPE headstart_list_bytes_total counter
headstart_list_bytes_total 1234
# HELP headstart_losses_total Losses that lists say of themselves, by reason; one loss may be of many events.
# TYPE headstart_losses_total counter
headstart_losses_total{reason="late"} 1
headstart_losses_total{reason="other"} 2
headstart_losses_total{reason="overflow"} 1
# HELP headstart_lost_events_total Events known to be lost; losses of an unknown number are in headstart_losses_total only.
# TYPE headstart_lost_events_total counter
headstart_lost_events_total 9
# HELP headstart_rebuilds_total Rebuilds of images, by result: built, failed, unchanged, not_queued.
# TYPE headstart_rebuilds_total counter
headstart_rebuilds_total{result="built"} 1
headstart_rebuilds_total{result="failed"} 0
headstart_rebuilds_total{result="not_queued"} 0
headstart_rebuilds_total{result="unchanged"} 0
# HELP headstart_recordings Recordings that go on or are being saved.
# TYPE headstart_recordings gauge
headstart_recordings 0
# HELP headstart_runs_total Recorded container starts, by verdict: complete, incomplete, failed.
# TYPE headstart_runs_total counter
headstart_runs_total{verdict="complete"} 1
headstart_runs_total{verdict="failed"} 0
headstart_runs_total{verdict="incomplete"} 1
`
	err := testutil.GatherAndCompare(filled().Gatherer(), strings.NewReader(want), "headstart_armed_late_total", "headstart_events_total",
		"headstart_list_bytes_total", "headstart_losses_total", "headstart_lost_events_total", "headstart_rebuilds_total", "headstart_recordings", "headstart_runs_total")
	if err != nil {
		t.Error(err)
	}
	var none *metrics.Metrics
	none.Run(metrics.Failed, 1)
	none.Loss("late", 1)
	none.Late()
	none.List(1)
	none.Rebuild(metrics.Built)
	none.Hook("x", 1)
	none.Began()
	none.Ended()
}

// Each reason that trace.Loss documents is a series of its own.
func TestLossReasons(t *testing.T) {
	m := metrics.New()
	// Sorted, as a scrape is.
	want := "# HELP headstart_losses_total Losses that lists say of themselves, by reason; one loss may be of many events.\n# TYPE headstart_losses_total counter\n"
	for _, reason := range []string{"exec", "killed", "late", "limit", "overflow", "overrun", "pages", "unresolved"} {
		m.Loss(reason, -1)
		want += "headstart_losses_total{reason=\"" + reason + "\"} 1\n"
	}
	if err := testutil.GatherAndCompare(m.Gatherer(), strings.NewReader(want), "headstart_losses_total"); err != nil {
		t.Error(err)
	}
}

func TestCheckAddress(t *testing.T) {
	for address, ok := range map[string]bool{
		"": true, "127.0.0.1:9464": true, "127.0.0.2:0": true, "[::1]:9464": true, "localhost:9464": true, "unix:/run/x.sock": true,
		"0.0.0.0:9464": false, ":9464": false, "10.0.0.1:9464": false, "example.com:9464": false, "127.0.0.1": false, "127.0.0.1:": false,
		"127.0.0.1:99999": false, "unix:run/x.sock": false, "unix:": false, "9464": false, "unix:/" + strings.Repeat("x", 200): false,
	} {
		if err := metrics.CheckAddress(address); (err == nil) != ok {
			t.Errorf("CheckAddress(%q) = %v", address, err)
		}
	}
}

func scrape(t *testing.T, network, address string) string {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}}}
	r, err := c.Get("http://metrics" + metrics.Path)
	if err != nil {
		return err.Error()
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.Status + "\n" + string(text)
}

func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestServer(t *testing.T) {
	m := filled()
	var s metrics.Server
	first, second := free(t), filepath.Join(t.TempDir(), "m.sock")
	const line = "headstart_events_total 105\n"
	for range 2 { // the same again
		if err := s.Listen(first, m); err != nil {
			t.Fatal(err)
		}
	}
	if got := scrape(t, "tcp", first); !strings.HasPrefix(got, "200 OK") || !strings.Contains(got, line) {
		t.Errorf("scrape = %.300s", got)
	}
	// The socket of a plugin that was killed.
	left, err := net.Listen("unix", second)
	if err != nil {
		t.Fatal(err)
	}
	left.(*net.UnixListener).SetUnlinkOnClose(false)
	left.Close()
	if err := s.Listen("unix:"+second, m); err != nil {
		t.Fatal(err)
	}
	if got := scrape(t, "unix", second); !strings.Contains(got, line) {
		t.Errorf("scrape over a socket = %.300s", got)
	}
	if got := scrape(t, "tcp", first); !strings.Contains(got, "connection refused") {
		t.Errorf("the first address is still served: %.100s", got)
	}
	var other metrics.Server
	defer other.Close()
	if err := other.Listen("unix:"+second, m); err == nil {
		t.Error("a socket in use is taken over")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(second); err == nil {
		t.Error("the socket is left")
	}
	if err := s.Listen(first, m); err != nil || !strings.Contains(scrape(t, "tcp", first), "refused") {
		t.Errorf("Listen after Close = %v, or serves", err)
	}
}

// TestTaken has an address that somebody else serves: an error, and the next address works.
func TestTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var s metrics.Server
	defer s.Close()
	if err := s.Listen(l.Addr().String(), metrics.New()); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("Listen at a taken port = %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Listen("unix:"+file, metrics.New()); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("Listen at a file = %v", err)
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "kept" {
		t.Errorf("the file has %q, %v", text, err)
	}
	if err := s.Listen(free(t), metrics.New()); err != nil {
		t.Error(err)
	}
}

// TestTakenForAWhile has the plugin before this one end a little later: the address is served from then on, where nobody wants
// another one by then.
func TestTakenForAWhile(t *testing.T) {
	m := filled()
	const line = "headstart_events_total 105\n"
	for network, address := range map[string]string{"tcp": free(t), "unix": filepath.Join(t.TempDir(), "m.sock")} {
		t.Run(network, func(t *testing.T) {
			at := address
			if network == "unix" {
				at = "unix:" + address
			}
			var before, after, moved metrics.Server
			for _, s := range []*metrics.Server{&before, &after, &moved} {
				defer s.Close()
			}
			if err := before.Listen(at, metrics.New()); err != nil {
				t.Fatal(err)
			}
			for _, s := range []*metrics.Server{&moved, &after} {
				if err := s.Listen(at, m); err == nil || !strings.HasSuffix(err.Error(), "until it is free") {
					t.Fatalf("Listen at a taken address = %v", err)
				}
			}
			if err := moved.Listen(free(t), metrics.New()); err != nil {
				t.Fatal(err)
			}
			if err := before.Close(); err != nil {
				t.Fatal(err)
			}
			for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
				got := scrape(t, network, address)
				if strings.Contains(got, line) {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("scrape = %.300s", got)
				}
			}
			if err := after.Close(); err != nil {
				t.Error(err)
			}
			// The one that serves another address now does not come back.
			time.Sleep(3 * time.Second / 2)
			if got := scrape(t, network, address); strings.HasPrefix(got, "200") {
				t.Errorf("scrape after all = %.100s", got)
			}
		})
	}
}
