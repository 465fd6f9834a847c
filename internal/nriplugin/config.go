package nriplugin

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap/zapcore"

	"github.com/headstart-oci/headstart/internal/metrics"
	"github.com/headstart-oci/headstart/internal/readylog"
	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// ErrConfig is what every error about the text of a configuration matches with errors.Is.
var ErrConfig = errors.New("bad configuration")

// Bounds and defaults of [Config].
const (
	// DefaultPersistDir and DefaultServerPath are those of nydus-snapshotter's
	// cmd/optimizer-nri-plugin, so that its users find their files.
	DefaultPersistDir = "/opt/nri/optimizer/results"
	DefaultServerPath = "/usr/local/bin/optimizer-server"

	DefaultStartDeadline = 200 * time.Millisecond
	DefaultIdleTimeout   = 30 * time.Second

	// MaxStartDeadline keeps the hook clear of [DefaultHookLimit], after which the
	// watchdog ends the plugin.
	MaxStartDeadline = 900 * time.Millisecond

	maxTimeout = 30 * 24 * time.Hour
)

// Config is the plugin's configuration. [DefaultConfig] gives the defaults,
// [ParseConfig] reads a file's text over them, and [Config.Validate] is what both
// a file and a command line must pass.
type Config struct {
	// PersistDir is the directory of lists, queue and built images.
	PersistDir string `toml:"persist_dir"`
	// Readable makes sizes and times of the CSV file human readable.
	Readable bool `toml:"readable"`
	// ServerPath is the optimizer-server binary.
	ServerPath string `toml:"server_path"`
	// Timeout ends a recording; 0: none.
	Timeout time.Duration `toml:"-"`
	// Overwrite replaces the files that carry upstream's names, and rebuilds an image again for another list.
	Overwrite bool `toml:"overwrite"`
	// Events is accepted for upstream's files; the plugin subscribes to what it needs.
	Events []string `toml:"events"`

	// StartDeadline bounds how long a container's start waits for the tracer.
	StartDeadline time.Duration `toml:"-"`
	// IdleTimeout ends a recording when no file was touched for the first time for so long; 0: never.
	IdleTimeout time.Duration `toml:"-"`
	// ReadyLog is a regular expression: a recording ends with the first line of the container's
	// log that matches it. Empty: none.
	ReadyLog string `toml:"ready_log"`
	// Overrides change limits for some images; the first that names an image counts.
	Overrides []Override `toml:"-"`
	// MetricsAddress is where metrics are served, see [metrics.CheckAddress]; empty: nowhere.
	MetricsAddress string `toml:"metrics_address"`
	// LogFile receives the log besides stderr. Empty: a file under PersistDir when
	// containerd launched the plugin (which gives it no stderr), none otherwise; "none": no file.
	LogFile string `toml:"log_file"`
	// LogLevel is debug, info, warn or error.
	LogLevel string `toml:"log_level"`
	// ContainerdAddress is containerd's socket; ContainerdNamespace the namespace of CRI's images.
	ContainerdAddress   string `toml:"containerd_address"`
	ContainerdNamespace string `toml:"containerd_namespace"`
	// HostsDir is the directory of per-registry hosts.toml files.
	HostsDir string `toml:"hosts_dir"`
	// DockerConfig is the file (or its directory) with registry credentials.
	DockerConfig string `toml:"docker_config"`
	// Images and Namespaces are allow lists of glob patterns; empty allows all.
	Images     []string `toml:"images"`
	Namespaces []string `toml:"namespaces"`
	// Rebuild says what happens to a complete list.
	Rebuild RebuildConfig `toml:"rebuild"`
}

// Override is an [[override]] table: it replaces what it sets for images that match.
type Override struct {
	// Images are glob patterns as in [Config.Images]; at least one.
	Images []string
	// ReadyLog, Timeout and IdleTimeout are as in [Config]; nil: as there.
	ReadyLog             *string
	Timeout, IdleTimeout *time.Duration
}

// RebuildConfig is the [rebuild] table.
type RebuildConfig struct {
	Enabled bool `toml:"enabled"`
	// Target is "layout", "registry" or "containerd".
	Target string `toml:"target"`
	// LayoutDir is the OCI layout of target "layout"; empty: "optimized" under PersistDir.
	LayoutDir string `toml:"layout_dir"`
	// Reference is the template of the built image's name, see [rebuild.ExpandReference].
	Reference string `toml:"reference"`
	// Compressor, Digester and ChunkSize (bytes) are those of [rafs].
	Compressor string `toml:"compressor"`
	Digester   string `toml:"digester"`
	ChunkSize  int64  `toml:"chunk_size"`
	// Workers is the number of compressing goroutines; 0: the builder decides.
	Workers int `toml:"workers"`
	// MarkPrefetchBlob sets the blob flag 0x400 that Nydus before 2.4 refuses.
	MarkPrefetchBlob bool `toml:"mark_prefetch_blob"`
	// Timeout ends a build that hangs.
	Timeout time.Duration `toml:"-"`
}

// DefaultConfig returns the configuration of an empty file.
func DefaultConfig() Config {
	return Config{
		PersistDir:          DefaultPersistDir,
		ServerPath:          DefaultServerPath,
		StartDeadline:       DefaultStartDeadline,
		IdleTimeout:         DefaultIdleTimeout,
		LogLevel:            "info",
		ContainerdAddress:   "/run/containerd/containerd.sock",
		ContainerdNamespace: "k8s.io",
		HostsDir:            "/etc/containerd/certs.d",
		Rebuild: RebuildConfig{
			Enabled:    true,
			Target:     rebuild.TargetLayout,
			Reference:  rebuild.DefaultReference,
			Compressor: "zstd",
			Digester:   "blake3",
			ChunkSize:  rafs.DefaultChunkSize,
			Timeout:    time.Hour,
		},
	}
}

// Validate returns an error that names every key with a value that cannot be used;
// it matches [ErrConfig]. It touches no file.
func (c *Config) Validate() error { return join(c.faults()) }

func (c *Config) faults() []*keyError {
	var faults []*keyError
	bad := func(key, format string, a ...any) {
		faults = append(faults, &keyError{key: key, text: fmt.Sprintf(format, a...)})
	}
	if c.ContainerdNamespace == "" {
		bad("containerd_namespace", "is empty")
	}
	if _, err := zapcore.ParseLevel(c.LogLevel); err != nil || c.LogLevel == "" {
		bad("log_level", "got %q, want debug, info, warn or error", c.LogLevel)
	}
	if c.StartDeadline <= 0 || c.StartDeadline > MaxStartDeadline {
		bad("start_deadline", "got %v, want more than 0 and at most %v", c.StartDeadline, MaxStartDeadline)
	}
	if err := checkLimit(c.Timeout); err != nil {
		bad("timeout", "%v", err)
	}
	if err := checkLimit(c.IdleTimeout); err != nil {
		bad("idle_timeout", "%v", err)
	}
	if _, err := readylog.Compile(c.ReadyLog); err != nil {
		bad("ready_log", "%v", err)
	}
	if err := metrics.CheckAddress(c.MetricsAddress); err != nil {
		bad("metrics_address", "%v", err)
	}
	for i := range c.Overrides {
		for _, text := range c.Overrides[i].faults() {
			bad(fmt.Sprintf("override[%d]", i), "%s", text)
		}
	}
	if slices.Contains(c.Images, "") {
		bad("images", "holds an empty pattern")
	}
	if slices.Contains(c.Namespaces, "") {
		bad("namespaces", "holds an empty pattern")
	}
	return slices.Concat(c.pathFaults(), faults, c.Rebuild.faults())
}

// pathFaults is faults of the keys that are paths.
func (c *Config) pathFaults() []*keyError {
	var faults []*keyError
	for _, k := range []struct{ key, path, fine string }{ // fine without a look: what stands for none, where there may be none
		{"persist_dir", c.PersistDir, "/"},
		{"server_path", c.ServerPath, "/"},
		{"containerd_address", c.ContainerdAddress, "/"},
		{"hosts_dir", c.HostsDir, ""},
		{"docker_config", c.DockerConfig, ""},
		{"log_file", cmp.Or(c.LogFile, LogFileNone), LogFileNone},
	} {
		switch {
		case k.path == k.fine:
		case !filepath.IsAbs(k.path):
			faults = append(faults, &keyError{key: k.key, text: fmt.Sprintf("got %q, want an absolute path", k.path)})
		case strings.ContainsAny(k.path, "\x00\n"):
			faults = append(faults, &keyError{key: k.key, text: fmt.Sprintf("got %q, which holds a control character", k.path)})
		}
	}
	return faults
}

// checkLimit returns nil for the length of a recording that may be asked for.
func checkLimit(d time.Duration) error {
	if d < 0 || d > maxTimeout {
		return fmt.Errorf("got %v, want 0 (none) to %v", d, maxTimeout)
	}
	return nil
}

func (o *Override) faults() []string {
	var faults []string
	if len(o.Images) == 0 {
		faults = append(faults, "images: is missing, want at least one pattern")
	}
	if slices.Contains(o.Images, "") {
		faults = append(faults, "images: holds an empty pattern")
	}
	if o.ReadyLog != nil {
		if _, err := readylog.Compile(*o.ReadyLog); err != nil {
			faults = append(faults, fmt.Sprintf("ready_log: %v", err))
		}
	}
	for _, d := range []struct {
		key   string
		value *time.Duration
	}{{"timeout", o.Timeout}, {"idle_timeout", o.IdleTimeout}} {
		if d.value == nil {
			continue
		}
		if err := checkLimit(*d.value); err != nil {
			faults = append(faults, fmt.Sprintf("%s: %v", d.key, err))
		}
	}
	return faults
}

func (r *RebuildConfig) faults() []*keyError {
	var faults []*keyError
	bad := func(key, format string, a ...any) {
		faults = append(faults, &keyError{key: "rebuild." + key, text: fmt.Sprintf(format, a...)})
	}
	switch r.Target {
	case rebuild.TargetLayout, rebuild.TargetRegistry, rebuild.TargetContainerd:
	default:
		bad("target", "got %q, want %q, %q or %q", r.Target, rebuild.TargetLayout, rebuild.TargetRegistry, rebuild.TargetContainerd)
	}
	if r.LayoutDir != "" && !filepath.IsAbs(r.LayoutDir) {
		bad("layout_dir", "got %q, want an absolute path", r.LayoutDir)
	}
	if err := rebuild.CheckReference(r.Reference); err != nil {
		bad("reference", "%v", err)
	}
	if _, err := rafs.ParseCompressor(r.Compressor); err != nil {
		bad("compressor", "got %q, want zstd, lz4 or none", r.Compressor)
	} else if r.Compressor == "gzip" {
		bad("compressor", "gzip is for reading only, want zstd, lz4 or none")
	}
	if _, err := rafs.ParseDigester(r.Digester); err != nil {
		bad("digester", "got %q, want blake3 or sha256", r.Digester)
	}
	if r.ChunkSize < rafs.MinChunkSize || r.ChunkSize > rafs.MaxChunkSize || r.ChunkSize&(r.ChunkSize-1) != 0 {
		bad("chunk_size", "got %d, want a power of two from %d to %d bytes", r.ChunkSize, rafs.MinChunkSize, rafs.MaxChunkSize)
	}
	if r.Workers < 0 || r.Workers > 1024 {
		bad("workers", "got %d, want 0 (the builder decides) to 1024", r.Workers)
	}
	if r.Timeout <= 0 || r.Timeout > maxTimeout {
		bad("timeout", "got %v, want more than 0 and at most %v", r.Timeout, maxTimeout)
	}
	return faults
}

// Build returns the part of the configuration that a rebuild job carries.
func (c *Config) Build() rebuild.Options {
	dir := c.Rebuild.LayoutDir
	if dir == "" {
		dir = filepath.Join(c.PersistDir, "optimized")
	}
	return rebuild.Options{
		Target:              c.Rebuild.Target,
		LayoutDir:           dir,
		Reference:           c.Rebuild.Reference,
		Compressor:          c.Rebuild.Compressor,
		Digester:            c.Rebuild.Digester,
		ChunkSize:           c.Rebuild.ChunkSize,
		Workers:             c.Rebuild.Workers,
		MarkPrefetchBlob:    c.Rebuild.MarkPrefetchBlob,
		Timeout:             c.Rebuild.Timeout,
		ContainerdAddress:   c.ContainerdAddress,
		ContainerdNamespace: c.ContainerdNamespace,
		HostsDir:            c.HostsDir,
		DockerConfig:        c.DockerConfig,
	}
}

// ParseTimeout parses the value of timeout: whole seconds as upstream writes it, or a
// duration such as "90s"; the result is 0 to 30 days.
func ParseTimeout(s string) (time.Duration, error) {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		if n < 0 || n > math.MaxInt64/int64(time.Second) {
			return 0, fmt.Errorf("got %d seconds, want 0 (none) to %v", n, maxTimeout)
		}
		return time.Duration(n) * time.Second, nil
	}
	return parseDuration(s)
}

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("got %q, want a duration such as \"200ms\" or \"30s\"", s)
	}
	return d, nil
}
