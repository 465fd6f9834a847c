package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
)

// RegistryError is a registry's refusal or silence.
type RegistryError struct {
	Host       string        // endpoint asked, a mirror perhaps
	Repository string        // repository on it
	Want       string        // what was wanted: "pull manifest latest"
	Status     int           // HTTP status; 0: there was no response
	Detail     string        // the registry's own words, shortened
	RetryAfter time.Duration // how long the registry asked to wait; 0: it did not say
	Err        error         // class ([ErrUnauthorized], …) or cause

	credentials string // the docker config that is read
}

// Error names the host, the repository and what was wanted.
func (e *RegistryError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "registry %s: repository %s: %s: ", e.Host, e.Repository, e.Want)
	if e.Status != 0 {
		fmt.Fprintf(&b, "%d %s", e.Status, http.StatusText(e.Status))
		if e.Detail != "" {
			b.WriteString(": " + e.Detail)
		}
		if e.RetryAfter > 0 {
			fmt.Fprintf(&b, " (asks to wait %s)", e.RetryAfter.Round(time.Second))
		}
	} else {
		b.WriteString(e.Err.Error())
	}
	if hint := e.hint(); hint != "" {
		b.WriteString("; " + hint)
	}
	return b.String()
}

// Unwrap returns Err.
func (e *RegistryError) Unwrap() error { return e.Err }

func (e *RegistryError) hint() string {
	text := e.Err.Error()
	switch {
	case strings.Contains(text, "x509:"):
		return "name its CA certificate in hosts.toml (ca = …)"
	case strings.Contains(text, "server gave HTTP response to HTTPS client"):
		return "it speaks plain http: configure it in hosts.toml or allow plain http"
	case errors.Is(e.Err, ErrUnauthorized) && e.credentials != "":
		return "credentials are read from " + e.credentials
	case e.Status == http.StatusRequestEntityTooLarge:
		return "a proxy limits the size of requests: set a smaller upload chunk"
	}
	return ""
}

// repository speaks the distribution protocol to the endpoints of one repository. It is safe
// for concurrent use.
type repository struct {
	ref Reference
	o   settings

	mu    sync.Mutex // guards what follows
	hosts []docker.RegistryHost
	moved map[movedKey]movedTo // where blobs were last found

	told atomic.Bool // a secret was handed out
}

func newRepository(ref Reference, o settings) *repository { return &repository{ref: ref, o: o} }

// endpoints returns the endpoints that can do caps, in order of preference; at least one.
func (r *repository) endpoints(ctx context.Context, caps docker.HostCapabilities) ([]docker.RegistryHost, error) {
	hosts, err := r.configured(ctx)
	if err != nil {
		return nil, err
	}
	var able []docker.RegistryHost
	for _, h := range hosts {
		if h.Capabilities.Has(caps) {
			able = append(able, h)
		}
	}
	if len(able) == 0 {
		return nil, fmt.Errorf("%w: registry %s: hosts.toml has no endpoint that can %s", ErrUnsupported, r.ref.Host, capsText(caps))
	}
	return able, nil
}

// configured reads the registry configuration once.
func (r *repository) configured(ctx context.Context) ([]docker.RegistryHost, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hosts != nil {
		return r.hosts, nil
	}
	// Not cancelled with the first caller: credentials are asked for later too.
	hosts, err := registryHosts(context.WithoutCancel(ctx), r.ref.Host, r.o, &r.told)
	if err != nil {
		return nil, err
	}
	for i := range hosts {
		if tells(&hosts[i], r.o) {
			r.told.Store(true)
		}
		r.settleScheme(ctx, &hosts[i])
	}
	r.hosts = hosts
	return hosts, nil
}

// forget makes the next request read the configuration again: the library keeps a token
// request's failure for good, so that one bad moment would last.
func (r *repository) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hosts = nil
}

func capsText(caps docker.HostCapabilities) string {
	switch {
	case caps.Has(docker.HostCapabilityPush):
		return "push"
	case caps.Has(docker.HostCapabilityResolve):
		return "resolve"
	}
	return "pull"
}

// settleScheme asks once whether h, which may be https or http (a loopback host), speaks
// https, so that URLs in answers compare well with ours. Failing is left to the request
// that follows.
func (r *repository) settleScheme(ctx context.Context, h *docker.RegistryHost) {
	if _, ours := h.Client.Transport.(*transport); ours || h.Scheme != "https" {
		return
	}
	req, err := http.NewRequestWithContext(withRetries(ctx, 0), http.MethodGet, h.Scheme+"://"+h.Host+h.Path+"/", nil)
	if err != nil {
		return
	}
	client := *h.Client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := client.Do(req)
	if err != nil {
		return
	}
	h.Scheme = resp.Request.URL.Scheme
	drain(resp.Body)
}

// close drops idle connections.
func (r *repository) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.hosts {
		h.Client.CloseIdleConnections()
	}
}

// call is one request to one endpoint, which authorization may repeat.
type call struct {
	want   string // for errors
	method string
	path   string   // below the repository: "manifests/latest"; or
	url    *url.URL // absolute, from a Location header
	query  url.Values
	header http.Header
	body   func() (io.ReadCloser, error) // nil: none
	size   int64                         // of the body
	push   bool                          // needs push rights
	from   string                        // another repository that must be readable
	once   bool                          // never repeated by the transport
}

// do sends c to h and returns the response, whatever its status; the caller closes its body.
// Answers 401 are tried again with authorization, and once more with a new token when the
// token that was at hand is refused. Errors are *RegistryError.
func (r *repository) do(ctx context.Context, h docker.RegistryHost, c call) (*http.Response, error) {
	actions := "pull"
	if c.push {
		actions = "pull,push"
	}
	ctx = docker.WithScope(quiet(ctx), "repository:"+r.ref.Repository+":"+actions)
	if c.from != "" {
		ctx = docker.ContextWithAppendPullRepositoryScope(ctx, c.from)
	}
	for attempt := 0; ; attempt++ {
		req, resp, err := r.send(ctx, &h, c)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode != http.StatusUnauthorized || attempt >= 4 || h.Authorizer == nil ||
			!sameOrigin(resp.Request.URL, &url.URL{Scheme: h.Scheme, Host: h.Host}) {
			return resp, nil
		}
		switch sent := req.Header.Get("Authorization"); {
		case sent == "":
			if err := h.Authorizer.AddResponses(ctx, []*http.Response{resp}); err != nil {
				return nil, r.refused(h, c, resp, err)
			}
		case attempt < 2 && strings.HasPrefix(sent, "Bearer ") && !strings.Contains(resp.Header.Get("WWW-Authenticate"), "insufficient_scope"):
			r.forget()
			if h, err = r.again(ctx, h); err != nil {
				drain(resp.Body)
				return nil, err
			}
		default:
			return resp, nil
		}
		drain(resp.Body)
	}
}

// send makes one attempt of c. It may replace h by what it is configured anew.
func (r *repository) send(ctx context.Context, h *docker.RegistryHost, c call) (*http.Request, *http.Response, error) {
	req, err := r.request(ctx, *h, c)
	if err != nil {
		return nil, nil, r.fail(*h, c, err)
	}
	if h.Authorizer != nil && sameOrigin(req.URL, &url.URL{Scheme: h.Scheme, Host: h.Host}) {
		err := h.Authorizer.Authorize(ctx, req)
		if err != nil {
			r.forget()
		}
		if err != nil && ctx.Err() == nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
			// Whoever asked for the token gave up; we have not.
			if *h, err = r.again(ctx, *h); err == nil {
				err = h.Authorizer.Authorize(ctx, req)
			}
		}
		if err != nil {
			closeBody(req)
			return nil, nil, r.fail(*h, c, fmt.Errorf("get a token: %w", err))
		}
	}
	resp, err := redirecting(h.Client, req).Do(req)
	if err != nil {
		return nil, nil, r.fail(*h, c, err)
	}
	return req, resp, nil
}

// again returns the endpoint that h was, configured anew.
func (r *repository) again(ctx context.Context, h docker.RegistryHost) (docker.RegistryHost, error) {
	hosts, err := r.configured(ctx)
	if err != nil {
		return h, err
	}
	for _, n := range hosts {
		if n.Host == h.Host && n.Path == h.Path {
			return n, nil
		}
	}
	return h, nil // no longer configured
}

// refused makes an error of an answer 401 that there are no credentials for.
func (r *repository) refused(h docker.RegistryHost, c call, resp *http.Response, err error) *RegistryError {
	e := r.answer(h, c, resp)
	text := err.Error()
	if errdefs.IsNotImplemented(err) {
		text = fmt.Sprintf("no way to log in that we know (WWW-Authenticate: %.100q)", resp.Header.Get("WWW-Authenticate"))
	}
	e.Detail = strings.TrimPrefix(e.Detail+"; "+text, "; ")
	return e
}

func (r *repository) request(ctx context.Context, h docker.RegistryHost, c call) (*http.Request, error) {
	u := c.url
	if u == nil {
		p := path.Join("/", h.Path, r.ref.Repository, c.path)
		if strings.HasSuffix(c.path, "/") {
			p += "/"
		}
		u = &url.URL{Scheme: h.Scheme, Host: h.Host, Path: p}
		query := url.Values{}
		maps.Copy(query, c.query)
		if h.Host != r.ref.Host && (r.ref.Host != "docker.io" || h.Host != "registry-1.docker.io") {
			query.Set("ns", r.ref.Host) // containerd's parameter for mirrors: whom they stand for
		}
		u.RawQuery = query.Encode()
	}
	if c.once {
		ctx = withRetries(ctx, 0)
	}
	req, err := http.NewRequestWithContext(ctx, c.method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	if c.url == nil || sameOrigin(u, &url.URL{Scheme: h.Scheme, Host: h.Host}) {
		for k, v := range h.Header {
			req.Header[k] = slices.Clone(v)
		}
	}
	for k, v := range c.header {
		req.Header[k] = slices.Clone(v)
	}
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", r.o.UserAgent)
	}
	if c.body != nil {
		if req.Body, err = c.body(); err != nil {
			return nil, err
		}
		req.ContentLength = c.size
		req.GetBody = c.body
		if c.size == 0 {
			_ = req.Body.Close() // nothing to send
			req.Body, req.GetBody = http.NoBody, nil
		}
	}
	return req, nil
}

// redirecting returns a copy of c that follows redirects and forgets, when one leaves the
// origin (scheme, host, port) of req, every header that may be a secret: net/http keeps
// Authorization for another port of the same host.
func redirecting(c *http.Client, req *http.Request) *http.Client {
	client := *c
	origin := *req.URL
	client.CheckRedirect = func(next *http.Request, via []*http.Request) error {
		if len(via) >= 10 {
			return errors.New("stopped after 10 redirects")
		}
		left := !sameOrigin(&origin, next.URL)
		for _, v := range via { // headers are those of the first request, at every hop
			left = left || !sameOrigin(&origin, v.URL)
		}
		if !left {
			return nil
		}
		for k := range next.Header {
			switch k {
			case "Accept", "Range", "User-Agent", "Content-Type":
			default:
				next.Header.Del(k)
			}
		}
		return nil
	}
	return &client
}

func sameOrigin(a, b *url.URL) bool {
	return strings.EqualFold(a.Scheme, b.Scheme) && strings.EqualFold(a.Hostname(), b.Hostname()) && port(a) == port(b)
}

func port(u *url.URL) string {
	if p := u.Port(); p != "" {
		return p
	}
	if strings.EqualFold(u.Scheme, "http") {
		return "80"
	}
	return "443"
}

func (r *repository) error(h docker.RegistryHost, c call) *RegistryError {
	e := &RegistryError{Host: h.Host, Repository: r.ref.Repository, Want: c.want}
	e.credentials, _ = dockerConfigPath(r.o)
	return e
}

// fail makes an error of a request that got no answer.
func (r *repository) fail(h docker.RegistryHost, c call, err error) *RegistryError {
	if outer, ok := errors.AsType[*url.Error](err); ok {
		err = outer.Err // its text repeats method and URL, with what the query holds
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "readfrom" {
		err = op.Err // the body's error, not the connection's
	}
	e := r.error(h, c)
	e.Err = err
	var token remoteerrors.ErrUnexpectedStatus
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
	case errors.As(err, &token):
		e.Status, e.Detail = token.StatusCode, strings.TrimSuffix("from its token server: "+detail(token.Body), ": ")
		e.Err = class(token.StatusCode)
	case errors.Is(err, docker.ErrInvalidAuthorization):
		e.Err = fmt.Errorf("%w: %w", ErrUnauthorized, err)
	case errors.Is(err, ErrStalled), errors.Is(err, ErrInvalid), errors.Is(err, ErrDigest), errors.Is(err, ErrTooLarge), errors.Is(err, ErrUnsupported),
		errors.Is(err, errSource):
	default:
		e.Err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return e
}

// answer makes an error of an answer that is none of what c wants, and closes its body.
func (r *repository) answer(h docker.RegistryHost, c call, resp *http.Response) *RegistryError {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 8<<10)) // best effort: it only adds to the text
	drain(resp.Body)
	e := r.error(h, c)
	e.Status, e.Detail = resp.StatusCode, detail(body)
	if at := resp.Request.URL; at.Host != h.Host {
		e.Detail = strings.TrimSuffix("from "+at.Host+": "+e.Detail, ": ")
	}
	e.RetryAfter, _ = retryAfter(resp.Header)
	e.Err = class(resp.StatusCode)
	return e
}

// errStatus is the class of an answer that fits no other.
var errStatus = errors.New("unexpected status")

func class(code int) error {
	switch {
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return ErrUnauthorized
	case code == http.StatusNotFound:
		return ErrNotFound
	case retryableStatus(code), code >= 500:
		return ErrUnavailable
	}
	return errStatus
}

// detail shortens what a registry says: its error codes and messages when the body has the
// specification's form, else its beginning.
func detail(body []byte) string {
	var doc struct {
		Errors []struct{ Code, Message string } `json:"errors"`
	}
	var text string
	if json.Unmarshal(body, &doc) == nil && len(doc.Errors) > 0 {
		var parts []string
		for _, e := range doc.Errors[:min(len(doc.Errors), 4)] {
			parts = append(parts, strings.Trim(e.Code+": "+e.Message, ": "))
		}
		text = strings.Join(parts, "; ")
	} else {
		text = string(body)
	}
	text = strings.Join(strings.FieldsFunc(strings.ToValidUTF8(text, "?"), func(r rune) bool { return r <= ' ' || r == 0x7f }), " ")
	if len(text) > 200 {
		text = strings.ToValidUTF8(text[:200], "") + "…"
	}
	return text
}
