package remote_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// dockerConfig writes a config.json and returns its directory.
func dockerConfig(t testing.TB, content string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func auths(host, user, pass string) string {
	return fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte(user+":"+pass)))
}

// basicRegistry is a real registry that wants user u and password p.
func basicRegistry(t *testing.T) *testcri.Registry {
	t.Helper()
	const hash = "$2b$04$abcdefghijklmnopqrstuudMegMbPN37MbpdEfAtP66w1z0RBCtLG" // bcrypt of "p", cost 4
	file := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(file, fmt.Appendf(nil, "u:%s\n", hash), 0o600); err != nil {
		t.Fatal(err)
	}
	return critest.StartRegistry(t, testcri.RegistryOptions{Auth: fmt.Sprintf("  htpasswd: {realm: test, path: %q}", file)})
}

// TestDockerCredentials finds the credentials of a registry in every place docker has.
func TestDockerCredentials(t *testing.T) {
	r := basicRegistry(t)
	img := newImage(t, 1, "amd64", 1000)
	bin := t.TempDir()
	helper := fmt.Sprintf("#!/bin/sh\nread host\n[ \"$host\" = %q ] && [ \"$1\" = get ] || { echo 'credentials not found in native keychain'; exit 1; }\n"+
		"echo '{\"ServerURL\":\"x\",\"Username\":\"u\",\"Secret\":\"p\"}'\n", r.Host)
	for name, script := range map[string]string{"good": helper, "broken": "#!/bin/sh\necho on strike\nexit 3\n"} {
		if err := os.WriteFile(filepath.Join(bin, "docker-credential-"+name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("DOCKER_CONFIG", dockerConfig(t, auths(r.Host, "u", "p")))
	empty := dockerConfig(t, `{}`)
	for name, c := range map[string]struct {
		o     remote.Options
		class error // nil: it works
		parts []string
	}{
		"DOCKER_CONFIG":     {},
		"named directory":   {o: remote.Options{DockerConfig: dockerConfig(t, auths(r.Host, "u", "p"))}},
		"named file":        {o: remote.Options{DockerConfig: filepath.Join(dockerConfig(t, auths(r.Host, "u", "p")), "config.json")}},
		"credHelpers":       {o: remote.Options{DockerConfig: dockerConfig(t, fmt.Sprintf(`{"credHelpers":{%q:"good"}}`, r.Host))}},
		"credsStore":        {o: remote.Options{DockerConfig: dockerConfig(t, `{"credsStore":"good"}`)}},
		"function":          {o: remote.Options{DockerConfig: empty, Credentials: func(string) (string, string, error) { return "u", "p", nil }}},
		"function has none": {o: remote.Options{Credentials: func(string) (string, string, error) { return "", "", nil }}},
		"none":              {o: remote.Options{DockerConfig: empty}, class: remote.ErrUnauthorized, parts: []string{"no basic auth credentials", "credentials are read from " + empty}},
		"wrong password":    {o: remote.Options{DockerConfig: dockerConfig(t, auths(r.Host, "u", "wrong"))}, class: remote.ErrUnauthorized, parts: []string{"401 Unauthorized"}},
		"of another host":   {o: remote.Options{DockerConfig: dockerConfig(t, auths("example.test", "u", "p"))}, class: remote.ErrUnauthorized},
		"missing file":      {o: remote.Options{DockerConfig: empty + "/missing"}, class: remote.ErrUnauthorized, parts: []string{"docker config", "missing"}},
		"broken file":       {o: remote.Options{DockerConfig: dockerConfig(t, `{`)}, class: remote.ErrUnauthorized, parts: []string{"docker config"}},
		"broken helper":     {o: remote.Options{DockerConfig: dockerConfig(t, `{"credsStore":"broken"}`)}, class: remote.ErrUnauthorized, parts: []string{"on strike"}},
		"missing helper":    {o: remote.Options{DockerConfig: dockerConfig(t, `{"credsStore":"nowhere"}`)}, class: remote.ErrUnauthorized, parts: []string{"docker-credential-nowhere"}},
	} {
		t.Run(name, func(t *testing.T) {
			dst := openTarget(t, r.Host+"/app:"+strings.ReplaceAll(name, " ", "_"), c.o)
			_, err := remote.Publish(t.Context(), dst, img.blobs, img.config, img.manifest, remote.PublishOptions{})
			if c.class != nil {
				wantError(t, "Publish", err, c.class, append(c.parts, r.Host, "repository app")...)
			} else if err != nil {
				t.Error(err)
			}
			if err != nil && strings.Contains(err.Error(), "wrong") {
				t.Errorf("the error tells the password: %v", err)
			}
		})
	}
}

// tokenServer issues the tokens of a real registry.
type tokenServer struct {
	*httptest.Server
	key   *ecdsa.PrivateKey
	chain []string

	mu     sync.Mutex // guards what follows
	spoil  int        // this many tokens have a bad signature
	fail   int        // this many requests are answered 503
	issued []string   // scopes
	grants []string   // grant_type of POSTs
}

func newTokenServer(t *testing.T) (*tokenServer, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "tokens"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "tokens.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := &tokenServer{key: key, chain: []string{base64.StdEncoding.EncodeToString(der)}}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s, file
}

// ServeHTTP grants u (password p, or the identity token "refresh") everything, and the
// anonymous to read what begins with "public".
func (s *tokenServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail > 0 {
		s.fail--
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	if err := r.ParseForm(); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	user, pass, given := r.BasicAuth()
	if r.Method == http.MethodPost {
		user, pass, given = r.Form.Get("username"), r.Form.Get("password"), true
		s.grants = append(s.grants, r.Form.Get("grant_type"))
		if r.Form.Get("refresh_token") == "refresh" {
			user, pass = "u", "p"
		}
	}
	if given && (user != "u" || pass != "p") {
		w.WriteHeader(http.StatusUnauthorized)
		if user != "silent" {
			fmt.Fprint(w, `{"errors":[{"code":"DENIED","message":"who are you?"}]}`)
		}
		return
	}
	scopes := strings.Fields(strings.Join(r.Form["scope"], " "))
	s.issued = append(s.issued, scopes...)
	token := s.token(scopes, given)
	if s.spoil > 0 {
		s.spoil--
		token = token[:len(token)-4] + "AAAA"
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token, "expires_in": 120})
}

func (s *tokenServer) token(scopes []string, full bool) string {
	access := []map[string]any{}
	for _, scope := range scopes {
		p := strings.SplitN(scope, ":", 3)
		actions := strings.Split(p[2], ",")
		if !full {
			actions = nil
			if strings.HasPrefix(p[1], "public") {
				actions = []string{"pull"}
			}
		}
		access = append(access, map[string]any{"type": p[0], "name": p[1], "actions": actions})
	}
	now := time.Now().Unix()
	part := func(v any) string {
		data, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		return base64.RawURLEncoding.EncodeToString(data)
	}
	text := part(map[string]any{"typ": "JWT", "alg": "ES256", "x5c": s.chain}) + "." + part(map[string]any{
		"iss": "test", "aud": "test", "sub": "u", "exp": now + 120, "nbf": now - 10, "iat": now, "jti": "1", "access": access,
	})
	hash := sha256.Sum256([]byte(text))
	x, y, err := ecdsa.Sign(rand.Reader, s.key, hash[:])
	if err != nil {
		panic(err)
	}
	sig := append(x.FillBytes(make([]byte, 32)), y.FillBytes(make([]byte, 32))...)
	return text + "." + base64.RawURLEncoding.EncodeToString(sig)
}

func (s *tokenServer) reset(spoil, fail int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spoil, s.fail, s.issued, s.grants = spoil, fail, nil, nil
}

// TestTokens logs in by tokens at a real registry.
func TestTokens(t *testing.T) {
	tokens, cert := newTokenServer(t)
	r := critest.StartRegistry(t, testcri.RegistryOptions{
		Auth: fmt.Sprintf("  token: {realm: %q, service: test, issuer: test, rootcertbundle: %q}", tokens.URL+"/token", cert),
	})
	good := remote.Options{DockerConfig: dockerConfig(t, auths(r.Host, "u", "p"))}
	good.Timeouts.Backoff = 10 * time.Millisecond
	img := newImage(t, 1, "amd64", 1_000_000, 1000)

	publish(t, r.Host+"/private/app:v", img, good)
	publish(t, r.Host+"/public/app:v", img, good)
	checkImage(t, openSource(t, r.Host+"/private/app:v", good), img)

	t.Run("mount", func(t *testing.T) {
		from := newImage(t, 1, "amd64", 1_000_000, 1000)
		for i := range from.blobs {
			from.blobs[i].MountFrom = "private/app"
		}
		tokens.reset(0, 0)
		if p := publish(t, r.Host+"/private/copy:v", from, good); p.Mounted != 2 || p.Uploaded != 1 {
			t.Errorf("Publish = %+v, want 2 mounted", p)
		}
		if !strings.Contains(strings.Join(tokens.issued, " "), "repository:private/app:pull") {
			t.Errorf("scopes %q lack the other repository", tokens.issued)
		}
	})
	t.Run("mount of what is not there", func(t *testing.T) {
		from := newImage(t, 9, "amd64", 1000)
		from.blobs[0].MountFrom = "private/nothing"
		if p := publish(t, r.Host+"/private/copy2:v", from, good); p.Mounted != 0 || p.Uploaded != 2 {
			t.Errorf("Publish = %+v, want 2 uploads", p)
		}
	})
	t.Run("anonymous", func(t *testing.T) {
		none := remote.Options{DockerConfig: dockerConfig(t, "{}")}
		checkImage(t, openSource(t, r.Host+"/public/app:v", none), img)
		_, err := openSource(t, r.Host+"/private/app:v", none).Resolve(t.Context())
		wantError(t, "Resolve", err, remote.ErrUnauthorized, "private/app", "401")
		_, err = openTarget(t, r.Host+"/public/app:v", none).Push(t.Context(), newImage(t, 5, "amd64", 10).blobs[0])
		wantError(t, "Push", err, remote.ErrUnauthorized, "public/app")
	})
	t.Run("wrong password", func(t *testing.T) {
		_, err := openSource(t, r.Host+"/private/app:v", remote.Options{DockerConfig: dockerConfig(t, auths(r.Host, "u", "x"))}).Resolve(t.Context())
		wantError(t, "Resolve", err, remote.ErrUnauthorized, "token server", "who are you?")
	})
	t.Run("wrong password, without a word", func(t *testing.T) {
		_, err := openSource(t, r.Host+"/private/app:v", remote.Options{DockerConfig: dockerConfig(t, auths(r.Host, "silent", "x"))}).Resolve(t.Context())
		wantError(t, "Resolve", err, remote.ErrUnauthorized, "401 Unauthorized: from its token server; credentials")
	})
	t.Run("identity token", func(t *testing.T) {
		tokens.reset(0, 0)
		o := remote.Options{DockerConfig: dockerConfig(t, fmt.Sprintf(`{"auths":{%q:{"identitytoken":"refresh"}}}`, r.Host))}
		checkImage(t, openSource(t, r.Host+"/private/app:v", o), img)
		if len(tokens.grants) == 0 || tokens.grants[0] != "refresh_token" {
			t.Errorf("grants %q", tokens.grants)
		}
	})
	t.Run("a token that is refused is replaced", func(t *testing.T) {
		tokens.reset(1, 0)
		checkImage(t, openSource(t, r.Host+"/private/app:v", good), img)
	})
	t.Run("the token server is away for a moment", func(t *testing.T) {
		tokens.reset(0, 2)
		checkImage(t, openSource(t, r.Host+"/private/app:v", good), img)
	})
	t.Run("the token server is away for longer", func(t *testing.T) {
		tokens.reset(0, 50)
		src := openSource(t, r.Host+"/private/app:v", good)
		_, err := src.Resolve(t.Context())
		wantError(t, "Resolve", err, remote.ErrUnavailable, "token server", "503")
		tokens.reset(0, 0)
		checkImage(t, src, img) // the same source works when the server is back
	})
}

// TestTokenExpires has a token run out between two requests.
func TestTokenExpires(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	current, issued := 0, 0
	f := newFaulty(t)
	f.set(func(*http.Request) bool { return true }, func(w http.ResponseWriter, r *http.Request, _ int) bool {
		mu.Lock()
		defer mu.Unlock()
		if r.URL.Path == "/token" {
			issued++
			current = issued
			fmt.Fprintf(w, `{"token":"t%d"}`, issued)
			return true
		}
		if r.Header.Get("Authorization") != fmt.Sprintf("Bearer t%d", current) {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="s",scope="repository:app:pull,push",error="invalid_token"`, f.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if r.Method == http.MethodPut || r.Method == http.MethodHead {
			current = -1 // whatever comes next needs a new one
		}
		return false
	})
	img := newImage(t, 1, "amd64", 1_000_000, 10)
	o := impatient()
	o.DockerConfig = dockerConfig(t, "{}")
	dst := openTarget(t, f.host+"/app:v", o)
	if _, err := remote.Publish(t.Context(), dst, img.blobs, img.config, img.manifest, remote.PublishOptions{Workers: 1}); err != nil {
		t.Fatal(err)
	}
	checkImage(t, openSource(t, f.host+"/app:v", o), img)
	mu.Lock()
	defer mu.Unlock()
	if issued < 5 {
		t.Errorf("%d tokens issued, want one for each expiry", issued)
	}
}

// TestErrorsTellNoSecrets looks for credentials in what a refused login says.
func TestErrorsTellNoSecrets(t *testing.T) {
	t.Parallel()
	f := newFaulty(t)
	f.set(func(*http.Request) bool { return true }, func(w http.ResponseWriter, r *http.Request, _ int) bool {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token?x=1",service="s"`, f.URL))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	o := impatient()
	o.Credentials = func(string) (string, string, error) { return "someone", "hunter2", nil }
	_, err := openSource(t, f.host+"/app:v", o).Resolve(t.Context())
	wantError(t, "Resolve", err, remote.ErrUnauthorized)
	for _, secret := range []string{"hunter2", base64.StdEncoding.EncodeToString([]byte("someone:hunter2"))} {
		if bytes.Contains([]byte(err.Error()), []byte(secret)) {
			t.Errorf("error %q has %q", err, secret)
		}
	}
}

// TestTokenOfWhoGaveUp cancels the request that fetches a token while another waits for it.
func TestTokenOfWhoGaveUp(t *testing.T) {
	t.Parallel()
	f := newFaulty(t)
	asked := make(chan struct{}, 1)
	var slow sync.Once
	f.set(func(*http.Request) bool { return true }, func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if r.URL.Path == "/token" {
			slow.Do(func() {
				asked <- struct{}{}
				f.wait(r)
			})
			fmt.Fprint(w, `{"token":"t"}`)
			return true
		}
		if r.Header.Get("Authorization") == "" {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="s"`, f.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		w.WriteHeader(http.StatusNotFound)
		return true
	})
	o := impatient()
	src := openSource(t, f.host+"/app:v", o)
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error)
	go func() {
		_, err := src.Resolve(ctx)
		first <- err
	}()
	<-asked
	second := make(chan error)
	go func() {
		_, err := src.Resolve(t.Context())
		second <- err
	}()
	time.Sleep(50 * time.Millisecond) // the second waits for the first's token
	cancel()
	wantError(t, "the one that gave up", <-first, context.Canceled)
	wantError(t, "the other", <-second, remote.ErrNotFound, "404")
}

// TestNobodyThere names the host when nothing listens.
func TestNobodyThere(t *testing.T) {
	t.Parallel()
	f := newFaulty(t)
	host := f.host
	f.Close()
	_, err := openSource(t, host+"/app:v", impatient()).Resolve(t.Context())
	wantError(t, "Resolve", err, remote.ErrUnavailable, host, "pull manifest v", "connection refused")
}
