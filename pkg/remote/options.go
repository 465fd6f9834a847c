package remote

import (
	"cmp"
	"time"

	"go.uber.org/zap"
)

// Limits of what is read into memory or followed.
const (
	MaxManifestSize = 4 << 20  // bytes of a manifest or index; distribution-spec recommends registries to take 4 MiB
	MaxConfigSize   = 16 << 20 // bytes of an image config
	MaxLayers       = 4096     // layers of a manifest
	MaxIndexEntries = 16384    // entries of an index
	MaxIndexDepth   = 4        // indexes inside indexes
	MaxBlobSize     = 1 << 40  // bytes of one blob: 1 TiB
)

// Options configures sources and targets; the zero value is the default.
type Options struct {
	// PlainHTTP speaks http to every registry that hosts.toml does not configure.
	// Without it loopback hosts are tried by https first and by http then, others by https.
	PlainHTTP bool

	// HostsDir is containerd's registry configuration directory (its subdirectories are
	// HOST/hosts.toml); empty: /etc/containerd/certs.d. A missing directory is no error.
	HostsDir string

	// DockerConfig is docker's config.json with credentials, or its directory; empty:
	// $DOCKER_CONFIG/config.json, else ~/.docker/config.json. A missing file is no error
	// unless it is named here.
	DockerConfig string

	// Credentials, when set, is asked before the docker config. Empty strings mean: none.
	// A secret without a user name is an identity token.
	Credentials func(host string) (user, secret string, err error)

	// ContainerdAddress is containerd's socket; empty: /run/containerd/containerd.sock.
	ContainerdAddress string

	// Namespace is containerd's namespace for references that name none; empty: k8s.io.
	Namespace string

	// RegistryFallback makes the source of a containerd reference ask the registry for
	// what containerd does not have: the image, or layers discarded after unpacking.
	RegistryFallback bool

	// Proxy is the URL of an HTTP proxy that all requests to registries go through, loopback ones too; empty: as the
	// environment says (HTTPS_PROXY, HTTP_PROXY, NO_PROXY).
	Proxy string

	// UserAgent is sent to registries; empty: "headstart".
	UserAgent string

	// Timeouts bounds waiting; zero fields have the documented defaults.
	Timeouts Timeouts

	// Retries is how many times a request is repeated after 408, 429, 5xx or a broken
	// connection; 0: 4, negative: none. A request that timed out is repeated once.
	Retries int

	// UploadChunk is how many bytes one request of an upload carries, for registries behind
	// a proxy that limits them; 0: a blob is one request.
	UploadChunk int64

	// Log gets retries, fallbacks and registry warnings; nil: nothing is logged.
	Log *zap.Logger
}

// Timeouts bounds how long a silent peer is waited for. None bounds a transfer that makes
// progress.
type Timeouts struct {
	Connect    time.Duration // TCP and TLS; default 15 s
	Header     time.Duration // from a request sent to its response's header; default 30 s
	Commit     time.Duration // the same for the request that ends an upload, while the registry verifies it; default 10 min
	Stall      time.Duration // no byte of a body sent or received; default 30 s
	Backoff    time.Duration // before the first repeat; doubled for each next one, at most 20 times it; default 250 ms
	RetryAfter time.Duration // the longest Retry-After that is waited for; default 60 s
}

// settings are Options with every default in place.
type settings Options

func (o Options) settle() settings {
	o.HostsDir = cmp.Or(o.HostsDir, defaultHostsDir)
	o.ContainerdAddress = cmp.Or(o.ContainerdAddress, defaultContainerd)
	o.Namespace = cmp.Or(o.Namespace, DefaultNamespace)
	o.UserAgent = cmp.Or(o.UserAgent, "headstart")
	o.Retries = max(0, cmp.Or(o.Retries, 4))
	t := &o.Timeouts
	t.Connect = cmp.Or(t.Connect, 15*time.Second)
	t.Header = cmp.Or(t.Header, 30*time.Second)
	t.Commit = cmp.Or(t.Commit, 10*time.Minute)
	t.Stall = cmp.Or(t.Stall, 30*time.Second)
	t.Backoff = cmp.Or(t.Backoff, 250*time.Millisecond)
	t.RetryAfter = cmp.Or(t.RetryAfter, time.Minute)
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	return settings(o)
}
