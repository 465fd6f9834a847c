package remote_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ggcrregistry "github.com/google/go-containerregistry/pkg/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// TestMirrors reads by mirrors, which are asked for whom they stand, and pushes to the server.
func TestMirrors(t *testing.T) {
	t.Parallel()
	broken, empty, good, upstream := newFaulty(t), newFaulty(t), newFaulty(t), newFaulty(t)
	img := newImage(t, 1, "amd64", 200_000)
	publish(t, good.host+"/team/app:v", img, remote.Options{})
	broken.set(func(*http.Request) bool { return true }, status(500, 0))
	good.set(nil, nil)
	var toml strings.Builder
	fmt.Fprintf(&toml, "server = %q\n", upstream.URL)
	for _, m := range []*faulty{broken, empty, good} {
		fmt.Fprintf(&toml, "[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", m.URL)
	}
	o := impatient()
	o.HostsDir = hostsDir(t, "registry.test", toml.String())
	checkImage(t, openSource(t, "registry.test/team/app:v", o), img)
	if n := len(upstream.seen()); n != 0 {
		t.Errorf("the server got %d requests in spite of its mirrors", n)
	}
	for _, r := range append(empty.seen(), good.seen()...) {
		if r.URL.Path != "/v2/" && r.URL.Query().Get("ns") != "registry.test" {
			t.Errorf("mirror asked %s %s without ns", r.Method, r.URL)
		}
	}

	other := newImage(t, 2, "amd64", 1000)
	publish(t, "registry.test/team/new:v", other, o)
	for _, m := range []*faulty{broken, empty, good} {
		for _, r := range m.seen() {
			if r.Method != http.MethodGet && r.Method != http.MethodHead {
				t.Errorf("a mirror was asked to %s %s", r.Method, r.URL)
			}
		}
	}
	checkImage(t, openSource(t, "registry.test/team/new:v", o), other) // no mirror has it

	_, err := openSource(t, "registry.test/team/none:v", o).Resolve(t.Context())
	wantError(t, "Resolve", err, remote.ErrNotFound, broken.host, empty.host, good.host, upstream.host, "500", "404")

	o.HostsDir = hostsDir(t, "registry.test", fmt.Sprintf("server = %q\ncapabilities = [\"pull\"]\n", good.URL))
	_, err = openTarget(t, "registry.test/team/app:v", o).Push(t.Context(), img.blobs[0])
	wantError(t, "Push", err, remote.ErrUnsupported, "registry.test", "push")
	_, err = openSource(t, "registry.test/team/app:v", o).Resolve(t.Context())
	wantError(t, "Resolve of a tag at who may only pull", err, remote.ErrUnsupported, "resolve")
	pinned := "registry.test/team/app@" + img.manifest.Descriptor.Digest.String()
	checkImage(t, openSource(t, pinned, o), img)
}

// TestMirrorDiesMidBody goes on at the next endpoint where the first one stopped.
func TestMirrorDiesMidBody(t *testing.T) {
	t.Parallel()
	mirror, upstream := newFaulty(t), newFaulty(t)
	doc := remote.NewDocument(ocispec.MediaTypeImageLayer, make([]byte, 3_000_000))
	for _, f := range []*faulty{mirror, upstream} {
		if _, err := openTarget(t, f.host+"/app:v", remote.Options{}).Push(t.Context(), doc.Blob()); err != nil {
			t.Fatal(err)
		}
		f.set(nil, nil)
	}
	first := true
	mirror.set(method(http.MethodGet, "/blobs/"), func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n > 1 {
			return status(503, 0)(w, r, n)
		}
		first = false
		return serve{f: mirror, data: doc.Data, cut: 1_000_000}.fault(w, r, n)
	})
	o := impatient()
	o.HostsDir = hostsDir(t, "registry.test", fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", upstream.URL, mirror.URL))
	got, err := readAll(t.Context(), openSource(t, "registry.test/app:v", o), doc.Descriptor)
	if err != nil || len(got) != len(doc.Data) || first {
		t.Errorf("Fetch = %d bytes, %v", len(got), err)
	}
	for _, r := range upstream.seen() {
		if r.Header.Get("Range") == "" {
			t.Errorf("the server was asked for all again: %v", r.Header)
		}
	}
}

// tlsRegistry is an in-process registry over TLS; clients, when set, must have a certificate
// of it.
func tlsRegistry(t *testing.T, clients *x509.CertPool) (s *httptest.Server, host, ca string) {
	t.Helper()
	s = httptest.NewUnstartedServer(ggcrregistry.New(ggcrregistry.Logger(log.New(io.Discard, "", 0))))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	if clients != nil {
		s.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients}
	}
	s.StartTLS()
	t.Cleanup(s.Close)
	ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	return s, strings.TrimPrefix(s.URL, "https://"), ca
}

func TestTLS(t *testing.T) {
	t.Parallel()
	img := newImage(t, 1, "amd64", 1000)
	s, host, ca := tlsRegistry(t, nil)

	t.Run("loopback is tried without verification, as docker does", func(t *testing.T) {
		publish(t, host+"/app:v", img, impatient())
		checkImage(t, openSource(t, host+"/app:v", impatient()), img)
	})
	for name, c := range map[string]struct {
		toml  string
		class error
		parts []string
	}{
		"its CA":         {toml: fmt.Sprintf("server = %q\nca = \"ca.crt\"\n", s.URL)},
		"skip_verify":    {toml: fmt.Sprintf("server = %q\nskip_verify = true\n", s.URL)},
		"unknown CA":     {toml: fmt.Sprintf("server = %q\n", s.URL), class: remote.ErrUnavailable, parts: []string{"x509", "hosts.toml (ca = …)"}},
		"no CA file":     {toml: fmt.Sprintf("server = %q\nca = \"missing.crt\"\n", s.URL), parts: []string{"missing.crt"}},
		"http to https":  {toml: fmt.Sprintf("server = %q\n", "http://"+host), parts: []string{"400", "HTTP request to an HTTPS server"}},
		"broken file":    {toml: "server = [", class: remote.ErrInvalid, parts: []string{"hosts.toml"}},
		"bad capability": {toml: "capabilities = [\"fly\"]\n[host.\"https://x\"]\n", parts: nil, class: remote.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			o := impatient()
			o.HostsDir = hostsDir(t, "registry.test", c.toml, "ca.crt", ca)
			err := tryResolve(t, "registry.test/app:v", o)
			if c.class == nil && c.parts == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, "Resolve", err, c.class, c.parts...)
		})
	}
	t.Run("https to http", func(t *testing.T) {
		f := newFaulty(t)
		o := impatient()
		o.HostsDir = hostsDir(t, "registry.test", fmt.Sprintf("server = %q\n", "https://"+f.host))
		wantError(t, "Resolve", tryResolve(t, "registry.test/app:v", o), remote.ErrUnavailable, "plain http", f.host)
	})
}

func tryResolve(t testing.TB, ref string, o remote.Options) error {
	_, err := openSource(t, ref, o).Resolve(t.Context())
	return err
}

func TestClientCertificate(t *testing.T) {
	t.Parallel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	keyPEM := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(certPEM))
	s, _, ca := tlsRegistry(t, pool)
	img := newImage(t, 1, "amd64", 1000)
	with := impatient()
	with.HostsDir = hostsDir(t, "registry.test", fmt.Sprintf("server = %q\nca = \"ca.crt\"\nclient = [[\"c.crt\", \"c.key\"]]\n", s.URL), "ca.crt", ca, "c.crt", certPEM, "c.key", keyPEM)
	publish(t, "registry.test/app:v", img, with)
	checkImage(t, openSource(t, "registry.test/app:v", with), img)
	without := impatient()
	without.HostsDir = hostsDir(t, "registry.test", fmt.Sprintf("server = %q\nca = \"ca.crt\"\n", s.URL), "ca.crt", ca)
	wantError(t, "without", tryResolve(t, "registry.test/app:v", without), remote.ErrUnavailable, "certificate")
}

// TestHostsSettings checks headers, override_path and the user agent at the server.
func TestHostsSettings(t *testing.T) {
	t.Parallel()
	f := newFaulty(t)
	f.set(func(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/odd/place/") }, func(w http.ResponseWriter, r *http.Request, _ int) bool {
		http.Redirect(w, r, "/v2/"+strings.TrimPrefix(r.URL.Path, "/odd/place/")+"?"+r.URL.RawQuery, http.StatusTemporaryRedirect)
		return true
	})
	o := impatient()
	o.UserAgent = "tester/1"
	o.HostsDir = hostsDir(t, "registry.test", fmt.Sprintf("server = %q\noverride_path = true\n[header]\nX-Team = \"core\"\n", f.URL+"/odd/place"))
	img := newImage(t, 1, "amd64", 1000)
	publish(t, "registry.test/app:v", img, o)
	checkImage(t, openSource(t, "registry.test/app:v", o), img)
	for _, r := range f.seen() {
		if r.Header.Get("X-Team") != "core" || r.Header.Get("User-Agent") != "tester/1" {
			t.Errorf("%s %s: headers %v", r.Method, r.URL.Path, r.Header)
		}
	}
}

// TestNoCleartext refuses to follow an https registry to plain http elsewhere.
func TestNoCleartext(t *testing.T) {
	t.Parallel()
	for name, h := range map[string]http.HandlerFunc{
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://storage.test/x", http.StatusTemporaryRedirect)
		},
		"token server": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://tokens.test/token",service="s"`)
			w.WriteHeader(http.StatusUnauthorized)
		},
	} {
		s := httptest.NewTLSServer(h)
		t.Cleanup(s.Close)
		ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
		o := impatient()
		o.HostsDir = hostsDir(t, "registry.test", fmt.Sprintf("server = %q\nca = \"ca.crt\"\n", s.URL), "ca.crt", ca)
		o.Credentials = func(string) (string, string, error) { return "u", "p", nil }
		wantError(t, name, tryResolve(t, "registry.test/app:v", o), remote.ErrInvalid, "refused", ".test")
	}
}

// TestNoHostsDir works without a configuration directory.
func TestNoHostsDir(t *testing.T) {
	t.Parallel()
	f := newFaulty(t)
	o := impatient()
	o.HostsDir = filepath.Join(t.TempDir(), "missing")
	publish(t, f.host+"/app:v", newImage(t, 1, "amd64", 10), o)
	o.PlainHTTP = true
	publish(t, f.host+"/app:w", newImage(t, 1, "amd64", 10), o)
	if _, err := os.Stat(o.HostsDir); err == nil {
		t.Error("it was made")
	}
}
