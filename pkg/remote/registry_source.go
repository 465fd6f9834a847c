package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/zap"
)

// acceptManifests lists what Resolve understands, or refuses by name.
const acceptManifests = ocispec.MediaTypeImageIndex + ", " + ocispec.MediaTypeImageManifest + ", " +
	images.MediaTypeDockerSchema2ManifestList + ", " + images.MediaTypeDockerSchema2Manifest + ", */*"

// progressStep is how much a download must advance for its failures to be forgotten.
const progressStep = 1 << 20

// registrySource reads from the endpoints of a repository: mirrors first.
type registrySource struct{ *repository }

func (s registrySource) Close() error {
	s.close()
	return nil
}

func isManifest(mediaType string) bool {
	return images.IsManifestType(mediaType) || images.IsIndexType(mediaType)
}

// anyHost calls f for each endpoint until one succeeds; the errors of all of them otherwise.
func anyHost[T any](ctx context.Context, r *repository, caps docker.HostCapabilities, f func(context.Context, docker.RegistryHost) (T, error)) (T, error) {
	var none T
	hosts, err := r.endpoints(ctx, caps)
	if err != nil {
		return none, err
	}
	if ctx.Value(avoidMirrorsKey{}) != nil {
		slices.Reverse(hosts) // a list of our own
	}
	var errs []error
	for i, h := range hosts {
		try := ctx
		if i < len(hosts)-1 {
			try = withRetries(ctx, 1) // there are others
		}
		v, err := f(try, h)
		if err == nil {
			return v, nil
		}
		if ctx.Err() != nil {
			return none, err
		}
		if errs = append(errs, err); i < len(hosts)-1 {
			r.o.Log.Info("registry endpoint failed, trying the next", zap.String("host", h.Host), zap.Error(err))
		}
	}
	if len(errs) == 1 {
		return none, errs[0]
	}
	return none, errors.Join(errs...)
}

// Resolve asks for the reference's digest, or that of its tag. A registry that does not say
// what it has is read from.
func (s registrySource) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	caps := docker.HostCapabilityPull
	if s.ref.Digest == "" {
		caps |= docker.HostCapabilityResolve
	}
	return anyHost(ctx, s.repository, caps, s.resolveAt)
}

func (s registrySource) resolveAt(ctx context.Context, h docker.RegistryHost) (ocispec.Descriptor, error) {
	object := s.ref.Tag
	if s.ref.Digest != "" {
		object = s.ref.Digest.String()
	}
	c := call{
		want: "pull manifest " + object, method: http.MethodHead, path: "manifests/" + object,
		header: http.Header{"Accept": {acceptManifests}},
	}
	resp, err := s.do(ctx, h, c)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if resp.StatusCode == http.StatusOK {
		drain(resp.Body)
		desc := described(resp, s.ref.Digest)
		if desc.MediaType == images.MediaTypeDockerSchema1Manifest {
			return ocispec.Descriptor{}, schema1(c.want)
		}
		if isManifest(desc.MediaType) && desc.Digest.Validate() == nil && desc.Size > 0 {
			return s.checkResolved(h, c, desc)
		}
	} else if code := resp.StatusCode; code < 400 || code >= 500 || code == 401 || code == 404 || retryableStatus(code) {
		return ocispec.Descriptor{}, s.answer(h, c, resp)
	} else {
		drain(resp.Body) // 405: no HEAD here; others: GET says why
	}
	desc, _, err := s.resolveByGet(ctx, h, c)
	return desc, err
}

// resolveDocument is Resolve for those who read the manifest anyhow: with its bytes, in one request.
func (s registrySource) resolveDocument(ctx context.Context) (ocispec.Descriptor, []byte, error) {
	caps, object := docker.HostCapabilityPull, s.ref.Digest.String()
	if s.ref.Digest == "" {
		caps, object = caps|docker.HostCapabilityResolve, s.ref.Tag
	}
	var data []byte
	desc, err := anyHost(ctx, s.repository, caps, func(ctx context.Context, h docker.RegistryHost) (desc ocispec.Descriptor, err error) {
		desc, data, err = s.resolveByGet(ctx, h, call{want: "pull manifest " + object, path: "manifests/" + object, header: http.Header{"Accept": {acceptManifests}}})
		return desc, err
	})
	return desc, data, err
}

// described returns what the header says about a manifest; fields may be missing.
func described(resp *http.Response, want digest.Digest) ocispec.Descriptor {
	mediaType, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	desc := ocispec.Descriptor{
		MediaType: strings.TrimSpace(mediaType),
		Digest:    digest.Digest(resp.Header.Get("Docker-Content-Digest")),
		Size:      resp.ContentLength,
	}
	if desc.Digest == "" {
		desc.Digest = want
	}
	return desc
}

func schema1(want string) error {
	return fmt.Errorf("%w: %s: a docker schema 1 manifest (it has no layer digests to verify); push the image again with a current tool", ErrUnsupported, want)
}

func (s registrySource) checkResolved(h docker.RegistryHost, c call, desc ocispec.Descriptor) (ocispec.Descriptor, error) {
	if s.ref.Digest != "" && desc.Digest != s.ref.Digest {
		return ocispec.Descriptor{}, s.fail(h, c, fmt.Errorf("%w: got %s", ErrDigest, desc.Digest))
	}
	if desc.Size > MaxManifestSize {
		return ocispec.Descriptor{}, s.fail(h, c, fmt.Errorf("%w: manifest of %d bytes, at most %d", ErrTooLarge, desc.Size, MaxManifestSize))
	}
	return desc, nil
}

// resolveByGet reads the manifest itself, to know its digest, size and media type.
func (s registrySource) resolveByGet(ctx context.Context, h docker.RegistryHost, c call) (ocispec.Descriptor, []byte, error) {
	c.method = http.MethodGet
	resp, err := s.do(ctx, h, c)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return ocispec.Descriptor{}, nil, s.answer(h, c, resp)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifestSize+1))
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return ocispec.Descriptor{}, nil, s.fail(h, c, err)
	}
	if len(data) > MaxManifestSize {
		return ocispec.Descriptor{}, nil, s.fail(h, c, fmt.Errorf("%w: manifest of more than %d bytes", ErrTooLarge, MaxManifestSize))
	}
	desc := described(resp, "")
	if says := desc.Digest; says.Validate() == nil && says.Algorithm().FromBytes(data) != says {
		return ocispec.Descriptor{}, nil, s.fail(h, c, fmt.Errorf("%w: the registry says %s and sends something else", ErrDigest, says))
	}
	desc.Size, desc.Digest = int64(len(data)), digest.FromBytes(data)
	if s.ref.Digest != "" {
		desc.Digest = s.ref.Digest.Algorithm().FromBytes(data)
	}
	if !isManifest(desc.MediaType) {
		if desc.MediaType, err = sniff(data); err != nil {
			return ocispec.Descriptor{}, nil, s.fail(h, c, err)
		}
	}
	desc, err = s.checkResolved(h, c, desc)
	return desc, data, err
}

// sniff returns the media type of a manifest or index by its content.
func sniff(data []byte) (string, error) {
	var doc struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return "", fmt.Errorf("%w: manifest: %w", ErrInvalid, err)
	}
	switch {
	case doc.SchemaVersion == 1:
		return "", schema1("manifest")
	case isManifest(doc.MediaType):
		return doc.MediaType, nil
	case doc.MediaType != "":
		return "", fmt.Errorf("%w: media type %q is no image manifest or index", ErrUnsupported, doc.MediaType)
	case doc.Manifests != nil:
		return ocispec.MediaTypeImageIndex, nil
	case doc.Config != nil:
		return ocispec.MediaTypeImageManifest, nil
	}
	return "", fmt.Errorf("%w: neither an image manifest nor an index", ErrInvalid)
}

// Fetch implements Source; a download that breaks goes on where it stopped.
func (s registrySource) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	rc, err := s.stream(ctx, desc, 0, desc.Size)
	if err != nil {
		return nil, err
	}
	return verify(rc, desc, s.pulls(desc)), nil
}

// FetchRange implements Source.
func (s registrySource) FetchRange(ctx context.Context, desc ocispec.Descriptor, off, n int64) (io.ReadCloser, error) {
	if err := checkRange(desc, off, n); err != nil {
		return nil, err
	}
	if n == 0 {
		return io.NopCloser(strings.NewReader("")), nil
	}
	rc, err := s.stream(ctx, desc, off, off+n)
	if err != nil {
		return nil, err
	}
	return &exactly{rc: rc, left: n}, nil
}

func (s registrySource) pulls(desc ocispec.Descriptor) string {
	return fmt.Sprintf("registry %s: repository %s: pull %s", s.ref.Host, s.ref.Repository, desc.Digest)
}

// stream opens the bytes [off, end) of desc's content and reopens them after a failure.
func (s registrySource) stream(ctx context.Context, desc ocispec.Descriptor, off, end int64) (io.ReadCloser, error) {
	open := func(off int64) (io.ReadCloser, error) {
		return anyHost(ctx, s.repository, docker.HostCapabilityPull, func(ctx context.Context, h docker.RegistryHost) (io.ReadCloser, error) {
			return s.openAt(ctx, h, desc, off, end)
		})
	}
	rc, err := open(off)
	if err != nil {
		return nil, err
	}
	return &resuming{
		rc: rc, open: open, off: off, mark: off, end: end, retries: s.o.Retries,
		wait: func(attempt int) error { return sleep(ctx, s.o.backoff(attempt)) },
		note: func(off int64, err error) {
			s.o.Log.Debug("resume download", zap.Stringer("digest", desc.Digest), zap.Int64("offset", off), zap.Error(err))
		},
		what: s.pulls(desc),
	}, nil
}

// openAt asks h for the bytes [off, end) of desc's content.
func (s registrySource) openAt(ctx context.Context, h docker.RegistryHost, desc ocispec.Descriptor, off, end int64) (io.ReadCloser, error) {
	c := call{method: http.MethodGet, header: http.Header{"Accept": {"*/*"}}}
	if isManifest(desc.MediaType) {
		c.want, c.path = "pull manifest "+desc.Digest.String(), "manifests/"+desc.Digest.String()
		c.header.Set("Accept", desc.MediaType+", */*")
	} else {
		c.want, c.path = "pull blob "+desc.Digest.String(), "blobs/"+desc.Digest.String()
	}
	ranged := off > 0 || end < desc.Size
	if ranged {
		c.header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, end-1))
	}
	resp, err := s.doRedirected(ctx, h, c, desc.Digest)
	if err != nil {
		return nil, err
	}
	switch {
	case resp.StatusCode == http.StatusOK:
		if resp.ContentLength >= 0 && resp.ContentLength != desc.Size {
			_ = resp.Body.Close() // only read
			return nil, s.fail(h, c, fmt.Errorf("%w: the registry has %d bytes, its descriptor says %d", ErrDigest, resp.ContentLength, desc.Size))
		}
		if _, err := io.CopyN(io.Discard, resp.Body, off); err != nil { // a server without ranges
			_ = resp.Body.Close() // only read
			return nil, s.fail(h, c, err)
		}
		return resp.Body, nil
	case resp.StatusCode == http.StatusPartialContent && ranged:
		if got := rangeStart(resp.Header.Get("Content-Range")); got != off {
			_ = resp.Body.Close() // only read
			return nil, s.fail(h, c, fmt.Errorf("%w: asked for bytes from %d, got Content-Range %q", ErrInvalid, off, resp.Header.Get("Content-Range")))
		}
		return resp.Body, nil
	}
	return nil, s.answer(h, c, resp)
}

// rangeStart returns A of "bytes A-B/C"; -1 when it is not that.
func rangeStart(v string) int64 {
	v, ok := strings.CutPrefix(v, "bytes ")
	first, _, dash := strings.Cut(v, "-")
	n, err := strconv.ParseInt(first, 10, 64)
	if !ok || !dash || err != nil {
		return -1
	}
	return n
}

// resuming reads [off, end) and opens what is missing again when a connection breaks.
type resuming struct {
	rc       io.ReadCloser
	open     func(off int64) (io.ReadCloser, error)
	wait     func(attempt int) error
	note     func(off int64, err error)
	what     string
	off, end int64
	mark     int64 // where failures were last counted from
	failures int
	stalls   int
	retries  int
	err      error
}

func (r *resuming) Read(p []byte) (int, error) {
	for {
		if r.err != nil {
			return 0, r.err
		}
		n, err := r.rc.Read(p)
		r.off += int64(n)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, io.EOF) && r.off >= r.end:
			r.err = io.EOF
			return n, io.EOF
		case errors.Is(err, io.EOF):
			err = io.ErrUnexpectedEOF
		}
		r.err = r.reopen(err)
		if n > 0 {
			return n, nil // r.err follows
		}
	}
}

// reopen replaces the broken connection; it returns why that is given up.
func (r *resuming) reopen(err error) error {
	if r.off > r.end {
		return io.EOF // more than was asked for: whoever verifies says so
	}
	if r.off-r.mark >= progressStep {
		r.failures, r.stalls, r.mark = 0, 0, r.off
	}
	if errors.Is(err, ErrStalled) {
		r.stalls++
	}
	if r.failures++; r.failures > r.retries || r.stalls > 1 || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		if !errors.Is(err, ErrStalled) && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		return fmt.Errorf("%s: at byte %d of %d: %w", r.what, r.off, r.end, err)
	}
	r.note(r.off, err)
	_ = r.rc.Close() // broken
	if err := r.wait(r.failures - 1); err != nil {
		return err
	}
	if r.off == r.end {
		r.rc = io.NopCloser(strings.NewReader("")) // all bytes came before it broke
		return nil
	}
	rc, err := r.open(r.off)
	if err != nil {
		return err
	}
	r.rc = rc
	return nil
}

func (r *resuming) Close() error { return r.rc.Close() }
