package remote

import (
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// Access says what it took to read from a source.
type Access struct {
	// Repository is the registry's host and the repository, "registry.example/app"; empty: the content is on this machine.
	Repository string
	// Store is which store of this machine holds it: containerd's socket and namespace, "containerd:/run/containerd/containerd.sock/k8s.io"; empty: files.
	Store string
	// Anonymous: no secret of ours was handed out for it so far, whether the registry asked for one or not.
	Anonymous bool
	// Shown: all of it came from Repository, or Store, which gave it to us: we may read there.
	Shown bool
}

// Accessor is a [Source] that knows what it took. Those of [OpenSource] do.
type Accessor interface {
	// Access says what it took so far: to be asked after a fetch that succeeded.
	Access() Access
}

// Access implements [Accessor].
func (s registrySource) Access() Access {
	return Access{Repository: s.ref.Host + "/" + s.ref.Repository, Anonymous: !s.told.Load(), Shown: true}
}

// Access implements [Accessor].
func (s *layoutSource) Access() Access { return Access{Anonymous: true, Shown: true} }

// Access implements [Accessor].
func (s containerdSource) Access() Access {
	return Access{Anonymous: true, Shown: true, Store: "containerd:" + s.o.ContainerdAddress + "/" + s.namespace}
}

// Access implements [Accessor]: what came from where is not known, so it is the registry's. It is not anonymous, even if the registry was
// never told a secret: what first has may have taken one when somebody pulled it. Nor has it shown that the registry gives us anything.
func (s *fallbackSource) Access() Access {
	a, ok := s.second.(Accessor)
	if !ok {
		return Access{}
	}
	return Access{Repository: a.Access().Repository}
}

// telltale notes in told when a secret is handed out.
func telltale(told *atomic.Bool, credentials func(string) (string, string, error)) func(string) (string, string, error) {
	return func(host string) (string, string, error) {
		user, secret, err := credentials(host)
		if user != "" || secret != "" {
			told.Store(true)
		}
		return user, secret, err
	}
}

// tells reports whether requests to h say who we are, in whatever way: a header of the registry configuration, a client's certificate, a proxy
// that may have credentials of its own.
func tells(h *docker.RegistryHost, o settings) bool {
	for name := range h.Header {
		if !strings.EqualFold(name, "User-Agent") && !strings.EqualFold(name, "Accept") {
			return true
		}
	}
	if o.Proxy != "" {
		return true
	}
	t, ok := h.Client.Transport.(*transport)
	if !ok {
		return false
	}
	base, ok := t.base.(*http.Transport)
	if !ok {
		return false
	}
	if base.TLSClientConfig != nil && (len(base.TLSClientConfig.Certificates) > 0 || base.TLSClientConfig.GetClientCertificate != nil) {
		return true
	}
	return proxied(base, h)
}

// proxied reports whether the proxy of the environment, if requests to h go through one, is told a user's name.
func proxied(base *http.Transport, h *docker.RegistryHost) bool {
	if base.Proxy == nil {
		return false
	}
	proxy, err := base.Proxy(&http.Request{URL: &url.URL{Scheme: h.Scheme, Host: h.Host}})
	return err != nil || proxy != nil && proxy.User != nil
}
