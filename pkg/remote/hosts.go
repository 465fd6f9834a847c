package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// defaultHostsDir is where containerd's documentation puts hosts.toml directories.
const defaultHostsDir = "/etc/containerd/certs.d"

// dockerHubAddress is the key of Docker Hub's credentials in docker's config.json.
const dockerHubAddress = "https://index.docker.io/v1/"

// helperTimeout bounds a docker-credential-… program.
const helperTimeout = 30 * time.Second

// quiet returns ctx with containerd's log turned off: it writes to stderr otherwise, and
// what it says is in our errors or in our own log.
func quiet(ctx context.Context) context.Context {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

// registryHosts returns the endpoints that serve host, mirrors first, as hosts.toml says. told becomes true when a secret is handed out.
func registryHosts(ctx context.Context, host string, o settings, told *atomic.Bool) ([]docker.RegistryHost, error) {
	find := config.HostDirFromRoot(o.HostsDir)
	dir, err := find(host)
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		return nil, fmt.Errorf("registry configuration of %s: %w", host, err)
	default:
		if err := checkHostsFile(filepath.Join(dir, "hosts.toml")); err != nil {
			return nil, err
		}
	}
	proxy, err := proxyURL(o.Proxy)
	if err != nil {
		return nil, err
	}
	clear := new(atomic.Bool)
	clear.Store(o.PlainHTTP)
	ho := config.HostOptions{
		HostDir:      find,
		Credentials:  telltale(told, credentialsFunc(ctx, o)),
		UpdateClient: clientUpdater(o, clear, proxy),
	}
	if o.PlainHTTP {
		ho.DefaultScheme = "http"
	}
	hosts, err := config.ConfigureHosts(quiet(ctx), ho)(host)
	if err != nil {
		return nil, fmt.Errorf("registry configuration of %s: %w", host, err)
	}
	turn := make(chan struct{}, 1)
	for i, h := range hosts {
		if h.Scheme == "http" {
			clear.Store(true)
		}
		if h.Authorizer != nil {
			hosts[i].Authorizer = oneByOne{h.Authorizer, turn}
		}
	}
	return hosts, nil
}

// proxyURL reads [Options].Proxy.
func proxyURL(s string) (*url.URL, error) {
	if s == "" {
		return nil, nil //nolint:nilnil // none is no error
	}
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" && u.Scheme != "socks5" {
		return nil, fmt.Errorf("%w: proxy %.200q: want http://HOST:PORT", ErrInvalid, s)
	}
	return u, nil
}

// oneByOne lets one goroutine at a time use the library's authorizer, which hosts share: it
// reads a token's expiry while it writes it.
type oneByOne struct {
	docker.Authorizer
	turn chan struct{} // holds one when somebody is at it
}

func (a oneByOne) in(ctx context.Context, f func() error) error {
	select {
	case a.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-a.turn }()
	return f()
}

// Authorize implements docker.Authorizer.
func (a oneByOne) Authorize(ctx context.Context, req *http.Request) error {
	return a.in(ctx, func() error { return a.Authorizer.Authorize(ctx, req) })
}

// AddResponses implements docker.Authorizer.
func (a oneByOne) AddResponses(ctx context.Context, answers []*http.Response) error {
	return a.in(ctx, func() error { return a.Authorizer.AddResponses(ctx, answers) })
}

// checkHostsFile refuses a hosts.toml that does not parse: the library would go on without
// it, and so without the mirror or certificate it asks for.
func checkHostsFile(file string) error {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("registry configuration: %w", err)
	}
	var v map[string]any
	if err := toml.Unmarshal(data, &v); err != nil {
		return fmt.Errorf("%w: registry configuration %s: %w", ErrInvalid, file, err)
	}
	return nil
}

// clientUpdater puts our round tripper around the library's transport, once for each client.
func clientUpdater(o settings, clear *atomic.Bool, proxy *url.URL) config.UpdateClientFunc {
	first := true
	return func(c *http.Client) error {
		tr, ok := c.Transport.(*http.Transport)
		if !ok {
			return nil // copied from a client that has it
		}
		if first { // clones of it follow, some with a dial timeout of their own
			first = false
			tr.DialContext = dialer(o.Timeouts.Connect)
			tr.TLSHandshakeTimeout = o.Timeouts.Connect
			tr.ResponseHeaderTimeout = 0 // the transport watches, by phase
			tr.DisableCompression = true // blobs are compressed, and digests are of stored bytes
			tr.MaxIdleConnsPerHost = 8
			if proxy != nil {
				tr.Proxy = http.ProxyURL(proxy)
			}
			tr.WriteBufferSize, tr.ReadBufferSize = 64<<10, 16<<10 // long reads go around the latter
		}
		c.Transport = &transport{base: tr, o: o, clear: clear}
		return nil
	}
}

// dockerConfigPath returns the file that o names, and whether it must exist; empty: none.
func dockerConfigPath(o settings) (path string, must bool) {
	const file = "config.json"
	if o.DockerConfig != "" {
		if info, err := os.Stat(o.DockerConfig); err == nil && info.IsDir() {
			return filepath.Join(o.DockerConfig, file), true
		}
		return o.DockerConfig, true
	}
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		return filepath.Join(dir, file), false
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", false // a service without a home has no docker config
	}
	return filepath.Join(home, ".docker", file), false
}

// credentialsFunc answers the library's question for the credentials of a host.
func credentialsFunc(ctx context.Context, o settings) func(string) (string, string, error) {
	return func(host string) (string, string, error) {
		if o.Credentials != nil {
			if user, secret, err := o.Credentials(host); err != nil || secret != "" {
				return user, secret, err
			}
		}
		path, must := dockerConfigPath(o)
		if path == "" {
			return "", "", nil
		}
		if _, err := os.Stat(path); err != nil {
			if errors.Is(err, fs.ErrNotExist) && !must {
				return "", "", nil
			}
			return "", "", fmt.Errorf("docker config: %w", err)
		}
		store, err := credentials.NewStore(path, credentials.StoreOptions{})
		if err != nil {
			return "", "", fmt.Errorf("docker config %s: %w", path, err)
		}
		return lookup(ctx, store, path, host)
	}
}

func lookup(ctx context.Context, store credentials.Store, path, host string) (user, secret string, err error) {
	key := host
	if host == "registry-1.docker.io" || host == "docker.io" {
		key = dockerHubAddress
	}
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	cred, err := store.Get(ctx, key)
	if err != nil {
		return "", "", fmt.Errorf("docker config %s: credentials of %s: %w", path, host, err)
	}
	if cred.RefreshToken != "" {
		return "", cred.RefreshToken, nil
	}
	return cred.Username, cred.Password, nil
}
