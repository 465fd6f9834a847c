package lazy_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

// registries are ways to real registries: one that answers everybody, and one that wants to know who asks.
type registries struct {
	*box
	open, closed string // hosts
	config       string // docker's, with what the closed one wants
}

func newRegistries(t *testing.T, driver lazy.Driver, limit string) *registries {
	t.Helper()
	r := &registries{box: newBoxOf(t, driver), open: critest.StartRegistry(t, testcri.RegistryOptions{}).Host}
	const hash = "$2b$04$abcdefghijklmnopqrstuudMegMbPN37MbpdEfAtP66w1z0RBCtLG" // bcrypt of "p", cost 4
	file := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(file, fmt.Appendf(nil, "u:%s\n", hash), 0o600); err != nil {
		t.Fatal(err)
	}
	r.closed = critest.StartRegistry(t, testcri.RegistryOptions{Auth: fmt.Sprintf("  htpasswd: {realm: test, path: %q}", file)}).Host
	r.config = r.login(r.closed)
	c, err := lazy.NewClient(lazy.ClientOptions{StateDir: r.state, RunDir: r.run, Command: []string{
		r.binary, "lazyd", "--state-dir", r.state, "--run-dir", r.run, "--idle", "100ms", "--limit", limit,
	}})
	if err != nil {
		t.Fatal(err)
	}
	r.client = c
	return r
}

// login writes docker's configuration with credentials for hosts.
func (r *registries) login(hosts ...string) string {
	r.t.Helper()
	var auths []string
	for _, host := range hosts {
		auths = append(auths, fmt.Sprintf(`%q:{"auth":%q}`, host, base64.StdEncoding.EncodeToString([]byte("u:p"))))
	}
	dir := r.t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"auths":{`+strings.Join(auths, ",")+`}}`), 0o600); err != nil {
		r.t.Fatal(err)
	}
	return dir
}

// put converts a tree to an image in a registry, and returns the request that mounts it by way of a gate of its own.
func (r *registries) put(host, repository string, files content, share string) (lazy.Request, *gate) {
	r.t.Helper()
	t, ok := r.t.(*testing.T)
	if !ok {
		r.t.Fatal("want a test")
	}
	r.imageAt(host+"/"+repository+":v1", files, "--plain-http", "--docker-config", r.config)
	g := newGate(t, host)
	way := strings.TrimPrefix(g.URL, "http://")
	return lazy.Request{
		Reference: way + "/" + repository + ":v1", Platform: "linux/amd64", Background: "none", NoPrefetch: true, Share: share,
		Remote: lazy.Remote{PlainHTTP: true, Retries: -1, DockerConfig: r.login(way)},
	}, g
}

// When an image's own backend is gone, that of another image which has the same chunks serves them, where the policy lets it.
func TestElsewhere(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		driver       lazy.Driver
		lender       bool   // its registry wants to know who asks
		share        string // of the mount whose backend goes
		lenderShares string
		works        bool
	}{
		"public":              {works: true},
		"fuse":                {driver: lazy.DriverFUSE, works: true},
		"private":             {lender: true},
		"private, all":        {lender: true, share: lazy.ShareAll, works: true},
		"shares nothing":      {share: lazy.ShareNone},
		"lender lends nobody": {lenderShares: lazy.ShareNone},
	} {
		if testing.Short() && (name == "private, all" || name == "shares nothing") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			driver := tt.driver
			if driver == "" {
				driver = lazy.DriverEROFS
			}
			limit := "500ms" // what fails waits for it
			if tt.works {
				limit = "30s"
			}
			r := newRegistries(t, driver, limit)
			one, two := mixed(1, 12, 6), mixed(2, 12, 6)
			host := r.open
			if tt.lender {
				host = r.closed
			}
			first, way := r.put(host, "one", one, tt.lenderShares)
			second, own := r.put(r.open, "two", two, tt.share)
			if !tt.lender {
				first.Remote.DockerConfig = r.login()
			}
			second.Remote.DockerConfig = r.login()
			r.mount(r.mountpoint("one"), first)
			m := r.mount(r.mountpoint("two"), second)
			own.closed.Store(true)
			asked := way.requests.Load()
			shared, mine := split(one, two)
			if tt.works {
				shared = append(shared, shared...) // also when it is there
			} else {
				shared = shared[:1] // each waits for the limit
			}
			if !tt.works {
				shared = append(shared, mine[0])
			}
			for i, path := range shared {
				got, err := os.ReadFile(filepath.Join(m.Dir, path))
				if err == nil && !bytes.Equal(got, two[path]) {
					t.Errorf("%s has wrong bytes", path)
				}
				if works := tt.works; works && err != nil || !works && !errors.Is(err, unix.EIO) {
					t.Errorf("%s, %d of %d: %v, want it to work: %t", path, i, len(shared), err, works)
				}
			}
			if n := way.requests.Load() - asked; (n > 0) != tt.works {
				t.Errorf("%d requests of the other image's registry, want some: %t", n, tt.works)
			}
			own.closed.Store(false)
			eventually(t, func() string {
				for path, want := range two {
					if got, err := os.ReadFile(filepath.Join(m.Dir, path)); err != nil || !bytes.Equal(got, want) {
						return fmt.Sprintf("%s: %v when the registry is back", path, err)
					}
				}
				return ""
			})
		})
	}
}

// split says which files of two one has too, in order.
func split(one, two content) (shared, own []string) {
	for path, p := range two {
		if bytes.Equal(one[path], p) {
			shared = append(shared, path)
		} else {
			own = append(own, path)
		}
	}
	slices.Sort(shared)
	slices.Sort(own)
	return shared, own
}

// Both backends are gone: whoever reads waits for no longer than the limit, and nobody asks in a circle.
func TestElsewhereGoneToo(t *testing.T) {
	t.Parallel()
	r := newRegistries(t, lazy.DriverEROFS, "500ms")
	files := mixed(1, 3, 3)
	first, one := r.put(r.open, "one", files, "")
	files["own"] = []byte("of the second image")
	second, two := r.put(r.open, "two", files, "")
	a, b := r.mount(r.mountpoint("one"), first), r.mount(r.mountpoint("two"), second)
	one.closed.Store(true)
	two.closed.Store(true)
	began := time.Now()
	for _, dir := range []string{a.Dir, b.Dir} {
		for path := range files {
			if path == "own" {
				continue
			}
			if _, err := os.ReadFile(filepath.Join(dir, path)); !errors.Is(err, unix.EIO) {
				t.Errorf("%s: %v, want EIO", path, err)
			}
			break
		}
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("two reads took %v, with a limit of half a second", took)
	}
	one.closed.Store(false)
	two.closed.Store(false)
	eventually(t, func() string {
		for path, want := range files {
			if got, err := os.ReadFile(filepath.Join(b.Dir, path)); err != nil || !bytes.Equal(got, want) {
				return fmt.Sprintf("%s: %v when the registries are back", path, err)
			}
		}
		return ""
	})
}
