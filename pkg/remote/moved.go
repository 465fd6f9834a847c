package remote

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
)

const (
	// movedFor is how long a redirect is believed. Registries sign such URLs for 20 minutes and more.
	// Source: distribution registry/storage/driver/s3-aws/s3.go RedirectURL.
	movedFor = 5 * time.Minute
	maxMoved = 1024 // blobs whose redirect is remembered
)

// movedKey is a blob at an endpoint.
type movedKey struct {
	host   string
	digest digest.Digest
}

// movedTo is where an endpoint has sent us.
type movedTo struct {
	url   *url.URL
	until time.Time
}

// avoidMirrorsKey is the context key of [AvoidMirrors].
type avoidMirrorsKey struct{}

// AvoidMirrors returns ctx in which registries are asked before their mirrors: for what a mirror gave wrongly.
func AvoidMirrors(ctx context.Context) context.Context {
	return context.WithValue(ctx, avoidMirrorsKey{}, true)
}

// doRedirected is do for content that many ranges are read of. Where the endpoint answers with a redirect to another
// host, which costs a round trip each time, the next requests go there at once; when that fails, to the endpoint again.
func (r *repository) doRedirected(ctx context.Context, h docker.RegistryHost, c call, d digest.Digest) (*http.Response, error) {
	key := movedKey{h.Host, d}
	if u := r.movedURL(key); u != nil {
		there := c
		there.url = u
		resp, err := r.do(ctx, h, there)
		if err == nil && (resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent) {
			return resp, nil
		}
		if err == nil {
			drain(resp.Body)
		}
		r.setMoved(key, nil)
		if ctx.Err() != nil {
			return nil, r.fail(h, c, context.Cause(ctx))
		}
	}
	resp, err := r.do(ctx, h, c)
	if err == nil && resp.StatusCode < 300 && !sameOrigin(resp.Request.URL, &url.URL{Scheme: h.Scheme, Host: h.Host}) {
		r.setMoved(key, resp.Request.URL)
	}
	return resp, err
}

func (r *repository) movedURL(key movedKey) *url.URL {
	r.mu.Lock()
	defer r.mu.Unlock()
	to, ok := r.moved[key]
	if !ok || time.Now().After(to.until) {
		return nil
	}
	return to.url
}

func (r *repository) setMoved(key movedKey, u *url.URL) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if u == nil || r.moved == nil || len(r.moved) >= maxMoved {
		delete(r.moved, key)
		if u == nil {
			return
		}
		if r.moved == nil || len(r.moved) >= maxMoved {
			r.moved = map[movedKey]movedTo{}
		}
	}
	r.moved[key] = movedTo{u, time.Now().Add(movedFor)}
}
