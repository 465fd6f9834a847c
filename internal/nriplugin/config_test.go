package nriplugin_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/nriplugin"
	"github.com/headstart-oci/headstart/internal/testenv"
)

// upstream has the keys and values of the sample that nydus-snapshotter ships.
const upstream = `
persist_dir = "/opt/nri/optimizer/results"
readable = false
server_path = "/usr/local/bin/optimizer-server"
timeout = 0
overwrite = false
events = [ "StartContainer", "StopContainer" ]`

func sample(t testing.TB) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(testenv.RepoRoot(t), "configs", "02-optimizer-nri-plugin.conf"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// uncommented is the sample with every commented key switched on.
func uncommented(t testing.TB) string {
	return regexp.MustCompile(`(?m)^#([a-z_]+ = )`).ReplaceAllString(sample(t), "$1")
}

func TestSamplesAreTheDefaults(t *testing.T) {
	want := nriplugin.DefaultConfig()
	want.Events = []string{"StartContainer", "StopContainer"}
	written := want
	written.Images, written.Namespaces = []string{}, []string{}
	for name, tc := range map[string]struct {
		text string
		want nriplugin.Config
	}{
		"ours":                  {sample(t), want},
		"ours, every key":       {uncommented(t), written},
		"upstream's":            {upstream, want},
		"upstream's, no events": {strings.Split(upstream, "events")[0], nriplugin.DefaultConfig()},
		"empty":                 {"", nriplugin.DefaultConfig()},
	} {
		got, err := nriplugin.ParseConfig([]byte(tc.text), nriplugin.DefaultConfig())
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// TestSampleHasEveryKey holds the sample against the keys that ParseConfig knows.
func TestSampleHasEveryKey(t *testing.T) {
	text := uncommented(t)
	for _, key := range []string{
		"persist_dir", "readable", "server_path", "timeout", "overwrite", "events",
		"start_deadline", "idle_timeout", "log_file", "log_level", "containerd_address", "containerd_namespace",
		"hosts_dir", "docker_config", "images", "namespaces", "ready_log", "metrics_address",
		"enabled", "target", "layout_dir", "reference", "compressor", "digester", "chunk_size", "workers", "mark_prefetch_blob",
	} {
		if n := len(regexp.MustCompile(`(?m)^`+key+` = `).FindAllString(text, -1)); n < 1 {
			t.Errorf("the sample does not have %s", key)
		}
	}
}

func TestParseConfig(t *testing.T) {
	got, err := nriplugin.ParseConfig([]byte(`
persist_dir = "/p"
readable = true
timeout = 90
overwrite = true
start_deadline = "150ms"
idle_timeout = "1m30s"
images = ["nginx*"]
[rebuild]
target = "registry"
reference = "registry.local:5000/{repository}:{tag}-{digest}"
chunk_size = 0x10000
timeout = 60
`), nriplugin.DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	want := nriplugin.DefaultConfig()
	want.PersistDir, want.Readable, want.Overwrite = "/p", true, true
	want.Timeout, want.StartDeadline, want.IdleTimeout = 90*time.Second, 150*time.Millisecond, 90*time.Second
	want.Images = []string{"nginx*"}
	want.Rebuild.Target, want.Rebuild.ChunkSize = "registry", 65536
	want.Rebuild.Reference = "registry.local:5000/{repository}:{tag}-{digest}"
	want.Rebuild.Timeout = time.Minute
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := got.Build().LayoutDir; got != "/p/optimized" {
		t.Errorf("LayoutDir = %q, want /p/optimized", got)
	}
}

func TestParseConfigRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		text string
		want string // part of the error
	}{
		"unknown key":            {"\n\npersist_dri = \"/x\"\n", "line 3: unknown key persist_dri"},
		"unknown key in table":   {"[rebuild]\n\nfoo = 1\n", "line 3: unknown key rebuild.foo"},
		"unknown table":          {"[log]\nlevel = 1\n", "unknown key log"},
		"two unknown keys":       {"a = 1\nb = 2\n", "line 2: unknown key b"},
		"string for bool":        {"\nreadable = \"yes\"", "line 2: key readable: got a TOML string, want true or false"},
		"integer for string":     {"persist_dir = 5", "line 1: key persist_dir: got a TOML integer, want a string"},
		"string for array":       {"events = \"x\"", "key events: got a TOML string, want an array of strings"},
		"value for table":        {"rebuild = true", "key rebuild: got a TOML boolean, want a table"},
		"timeout unit":           {"\ntimeout = \"5 minutes\"", "line 2: key timeout: got \"5 minutes\""},
		"timeout float":          {"timeout = 1.5", "key timeout: "},
		"timeout negative":       {"timeout = -1", "key timeout: got -1 seconds"},
		"timeout huge":           {"timeout = 9223372036854775807", "key timeout: "},
		"timeout too long":       {"timeout = 1000000000", "key timeout: got 277777h46m40s"},
		"timeout array":          {"timeout = [1]", "key timeout: got a TOML array"},
		"deadline zero":          {"start_deadline = \"0s\"", "line 1: key start_deadline: got 0s, want more than 0"},
		"deadline past watchdog": {"start_deadline = \"1s\"", "key start_deadline: got 1s"},
		"deadline integer":       {"\nstart_deadline = 200", "line 2: key start_deadline: got \"200\", want a duration"},
		"relative dir":           {"persist_dir = \"results\"", "line 1: key persist_dir: got \"results\", want an absolute path"},
		"empty dir":              {"persist_dir = \"\"", "key persist_dir"},
		"newline in dir":         {"persist_dir = \"/a\\nb\"", "key persist_dir"},
		"log level":              {"log_level = \"loud\"", "key log_level: got \"loud\""},
		"log file":               {"log_file = \"x.log\"", "key log_file"},
		"empty pattern":          {"images = [\"\"]", "key images: holds an empty pattern"},
		"target":                 {"[rebuild]\ntarget = \"floppy\"", "line 2: key rebuild.target: got \"floppy\""},
		"template field":         {"[rebuild]\nreference = \"{host}/x:y\"", "key rebuild.reference: bad reference: unknown field {host}"},
		"template overwrites":    {"[rebuild]\nreference = \"{registry}/{repository}:{tag}\"", "the image it is made from"},
		"template without tag":   {"[rebuild]\nreference = \"r.example/x\"", "want a name with a tag"},
		"template no reference":  {"[rebuild]\nreference = \"UPPER CASE\"", "key rebuild.reference"},
		"compressor":             {"[rebuild]\ncompressor = \"gzip\"", "key rebuild.compressor"},
		"digester":               {"[rebuild]\ndigester = \"md5\"", "key rebuild.digester"},
		"chunk size":             {"[rebuild]\nchunk_size = 5000", "key rebuild.chunk_size: got 5000, want a power of two"},
		"chunk size small":       {"[rebuild]\nchunk_size = 2048", "key rebuild.chunk_size"},
		"chunk size large":       {"[rebuild]\nchunk_size = 33554432", "key rebuild.chunk_size"},
		"workers":                {"[rebuild]\nworkers = -1", "key rebuild.workers"},
		"dotted":                 {"rebuild.timeout = \"0s\"", "line 1: key rebuild.timeout"},
		"no TOML":                {"persist_dir: /x\n", "line 1"},
		"twice":                  {"readable = true\nreadable = true\n", "line 2: key readable"},
		"not UTF-8":              {"persist_dir = \"/\xff\"", "line 1"},
		"large":                  {"#" + strings.Repeat("x", 1<<20), "want at most 1048576"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := nriplugin.ParseConfig([]byte(tc.text), nriplugin.DefaultConfig())
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("error %v, want one with %q", err, tc.want)
			}
			if !errors.Is(err, nriplugin.ErrConfig) {
				t.Errorf("%v is not ErrConfig", err)
			}
			if diff := cmp.Diff(nriplugin.Config{}, got); diff != "" {
				t.Errorf("not the zero value: %s", diff)
			}
		})
	}
}

func FuzzConfig(f *testing.F) {
	f.Add(sample(f))
	f.Add(uncommented(f))
	f.Add(upstream)
	f.Add("timeout = 0x10\n[rebuild]\ntimeout = \"1h\"\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := nriplugin.ParseConfig([]byte(text), nriplugin.DefaultConfig())
		if err != nil {
			if !errors.Is(err, nriplugin.ErrConfig) {
				t.Errorf("%v is not ErrConfig", err)
			}
			if diff := cmp.Diff(nriplugin.Config{}, c); diff != "" {
				t.Errorf("not the zero value: %s", diff)
			}
			return
		}
		if err := c.Validate(); err != nil {
			t.Errorf("accepted what Validate refuses: %v", err)
		}
	})
}

func TestConfigure(t *testing.T) {
	ctx := context.Background()
	opened := 0
	w := &world{t: t}
	p, err := nriplugin.New(nriplugin.Options{Base: nriplugin.DefaultConfig(), Open: func(c nriplugin.Config) (*nriplugin.Backend, error) {
		opened++
		if c.PersistDir == "/broken" {
			return nil, errFake
		}
		return w.backend(), nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	w.plugin = p
	// Before it is configured, nothing happens.
	w.startContainer("c0")
	if p.Runs() != 0 {
		t.Error("records without a configuration")
	}
	if _, err := p.Configure(ctx, "nonsense = 1", "containerd", "v2"); err == nil || !strings.Contains(err.Error(), "unknown key nonsense") {
		t.Errorf("Configure(unknown key) = %v", err)
	}
	if _, err := p.Configure(ctx, "persist_dir = \"/broken\"", "containerd", "v2"); err == nil {
		t.Error("Configure with a broken persist_dir succeeds")
	}
	mask, err := p.Configure(ctx, upstream+"\n", "containerd", "v2")
	if err != nil || mask.PrettyString() != "CreateContainer,StartContainer,StopContainer" {
		t.Errorf("Configure() = %s, %v", mask.PrettyString(), err)
	}
	n := opened
	if _, err := p.Configure(ctx, upstream+"\n", "containerd", "v2"); err != nil || opened != n {
		t.Errorf("the same configuration was opened again: %v", err)
	}
	w.startContainer("c1")
	s := w.session(0)
	// A new configuration while a recording goes on; events are what the plugin needs in any case.
	mask, err = p.Configure(ctx, "events = [\"CreateContainer\"]", "containerd", "v2")
	if err != nil || mask.PrettyString() != "CreateContainer,StartContainer,StopContainer" || opened != n+1 {
		t.Errorf("Configure() = %s, %v", mask.PrettyString(), err)
	}
	s.end("exit", nil, "/a")
	if err := w.close(); err != nil {
		t.Error(err)
	}
	if len(w.saved()) != 1 {
		t.Errorf("%d lists, want 1", len(w.saved()))
	}
}
