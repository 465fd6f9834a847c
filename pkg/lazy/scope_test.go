package lazy_test

import (
	"maps"
	"path/filepath"
	"testing"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

// What a mount could not have fetched itself does not reach it, with real registries and a real containerd: each image lies somewhere, and its
// chunks are lent, or not, to a second image that lies elsewhere.
func TestScopes(t *testing.T) {
	t.Parallel()
	r := newRegistries(t, lazy.DriverEROFS, "10s")
	e := critest.Start(t, testcri.Options{})
	contained := func(namespace string) func(name string, files content) lazy.Request {
		return func(name string, files content) lazy.Request {
			q := r.imageAt("containerd:"+namespace+"/registry.example/"+name+":v1", files, "--containerd-address", e.Address())
			q.Remote.ContainerdAddress = e.Address()
			return q
		}
	}
	public := func(name string, files content) lazy.Request {
		q := r.imageAt(r.open+"/"+name+":v1", files, "--plain-http")
		q.Remote = lazy.Remote{PlainHTTP: true, DockerConfig: r.login()}
		return q
	}
	// A registry that would answer everybody is told who asks: nobody knows what it would have said without.
	private := func(repository string) func(name string, files content) lazy.Request {
		return func(name string, files content) lazy.Request {
			ref := r.closed + "/" + repository + ":" + name
			q := r.imageAt(ref, files, "--plain-http", "--docker-config", r.config)
			q.Remote = lazy.Remote{PlainHTTP: true, DockerConfig: r.config}
			return q
		}
	}
	local := func(name string, files content) lazy.Request { return r.image(name, files) }
	for n, tt := range []struct {
		name         string
		first, other func(name string, files content) lazy.Request
		share        string // of the second
		lent         bool
		short        bool
	}{
		{name: "private to public", first: private("app"), other: public, short: true},
		{name: "private to another repository", first: private("app"), other: private("other"), short: true},
		{name: "private to its repository", first: private("app"), other: private("app"), lent: true, short: true},
		{name: "private to all", first: private("app"), other: public, share: lazy.ShareAll, lent: true},
		{name: "public to private", first: public, other: private("app"), lent: true},
		{name: "public to containerd", first: public, other: contained("k8s.io"), lent: true},
		{name: "containerd to public", first: contained("k8s.io"), other: public, short: true},
		{name: "containerd to its namespace", first: contained("k8s.io"), other: contained("k8s.io"), lent: true, short: true},
		{name: "containerd to another namespace", first: contained("k8s.io"), other: contained("tenant"), short: true},
		{name: "containerd to files", first: contained("k8s.io"), other: local},
		{name: "files to containerd", first: local, other: contained("k8s.io")},
		{name: "files to a registry", first: local, other: public},
	} {
		if testing.Short() && !tt.short {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			// Others' chunks are not in it.
			one, two := mixed(uint64(2*n+1), 6, 0), content{}
			maps.Copy(two, one)
			two["own"] = []byte("of the second image alone: " + tt.name)
			a := tt.first("first"+string(rune('a'+n)), one)
			b := tt.other("second"+string(rune('a'+n)), two)
			a.Background, b.Background, b.Share = "full", "none", tt.share
			m := r.mount(r.mountpoint(filepath.Join("first", tt.name)), a)
			if _, err := r.client.Wait(t.Context(), m.Device); err != nil {
				t.Fatal(err)
			}
			m = r.mount(r.mountpoint(filepath.Join("second", tt.name)), b)
			two.same(t, m.Dir)
			s := r.at(m.Dir).Stats
			if lent := s.ReusedChunks > 0; lent != tt.lent || lent != (fetched(s) < 10_000) {
				t.Errorf("reused %d chunks, fetched %d bytes; want chunks lent: %t", s.ReusedChunks, fetched(s), tt.lent)
			}
		})
	}
}
