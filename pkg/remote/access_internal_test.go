package remote

import (
	"net/http"
	"net/url"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// What containerd has may have taken a secret when it was pulled: an image that is read from it and from its registry is nobody's but its repository's.
func TestFallbackAccess(t *testing.T) {
	ref := Reference{Kind: KindRegistry, Host: "registry.example", Repository: "app", Tag: "v1"}
	second := registrySource{newRepository(ref, Options{}.settle())}
	if got := second.Access(); !got.Anonymous {
		t.Fatalf("Access() of a registry that was told nothing = %+v", got)
	}
	got := Fallback(containerdSource{}, second, Options{}).(Accessor).Access()
	if want := (Access{Repository: "registry.example/app"}); got != want {
		t.Errorf("Access() = %+v, want %+v", got, want)
	}
	if got := Fallback(second, unknownSource{}, Options{}).(Accessor).Access(); got != (Access{}) {
		t.Errorf("Access() of who knows what = %+v, want nothing", got)
	}
}

// unknownSource does not say what it takes.
type unknownSource struct{ Source }

// A proxy that is told a user's name may give what nobody else gets.
func TestTellsProxy(t *testing.T) {
	for proxy, want := range map[string]bool{"": false, "http://proxy.example:3128": false, "http://user:secret@proxy.example:3128": true, "http://user@proxy.example": true} {
		base := &http.Transport{Proxy: func(req *http.Request) (*url.URL, error) {
			if req.URL.Host != "registry.example" || req.URL.Scheme != "https" {
				t.Errorf("asked for the proxy of %s", req.URL)
			}
			if proxy == "" {
				return nil, nil
			}
			return url.Parse(proxy)
		}}
		h := &docker.RegistryHost{Scheme: "https", Host: "registry.example", Client: &http.Client{Transport: &transport{base: base}}}
		if got := tells(h, settings{}); got != want {
			t.Errorf("tells() through %q = %t, want %t", proxy, got, want)
		}
	}
}
