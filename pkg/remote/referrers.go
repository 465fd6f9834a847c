package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/zap"
)

const (
	// maxReferrerPages bounds the answers to one question for referrers.
	maxReferrerPages = 64

	// A fallback index is written again when another writer has replaced it at the same time. It is
	// looked at again after waits of settleWait and more.
	fallbackTries = 12
	settleWait    = 30 * time.Millisecond
)

// Artifact is something that is kept beside an image: an OCI 1.1 manifest whose subject is
// the image's. Its config is the empty one.
type Artifact struct {
	Type        string // its artifactType
	Layers      []Document
	Annotations map[string]string
}

// manifest returns the artifact's manifest.
func (a Artifact) manifest(subject ocispec.Descriptor) (Document, error) {
	if a.Type == "" || len(a.Layers) == 0 {
		return Document{}, fmt.Errorf("%w: artifact of type %q with %d layers: want a type and a layer", ErrInvalid, a.Type, len(a.Layers))
	}
	if err := checkDescriptor(subject); err != nil {
		return Document{}, fmt.Errorf("subject: %w", err)
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: a.Type, Config: ocispec.DescriptorEmptyJSON, Annotations: a.Annotations,
		Subject: &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
	}
	for _, l := range a.Layers {
		m.Layers = append(m.Layers, l.Descriptor)
	}
	data, err := json.Marshal(m)
	if err != nil {
		return Document{}, err
	}
	doc := NewDocument(ocispec.MediaTypeImageManifest, data)
	// How an index of referrers describes it. Source: distribution-spec, "Listing Referrers".
	doc.Descriptor.ArtifactType, doc.Descriptor.Annotations = a.Type, a.Annotations
	return doc, nil
}

// PushReferrer pushes an artifact about the manifest subject into the place of ref: the same
// repository, layout directory or containerd. Where the registry does not keep track of referrers, and
// everywhere else, the index under the tag of the specification's referrers tag schema
// does. Writers of one process, and of one layout, take turns. Others that change it at the same time look at it again and do so
// again until it has both their entries; one that needs longer for a write than the others wait may still replace what they wrote.
// It returns the artifact's descriptor. [ErrUnsupported] for an archive, which is only written whole.
func PushReferrer(ctx context.Context, ref Reference, o Options, subject ocispec.Descriptor, a Artifact) (ocispec.Descriptor, error) {
	doc, err := a.manifest(subject)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if ref.Kind == KindArchive {
		return ocispec.Descriptor{}, fmt.Errorf("%w: %s: nothing can be added to an archive", ErrUnsupported, ref)
	}
	if _, err := fallbackReference(ref, subject.Digest); err != nil {
		return ocispec.Descriptor{}, err
	}
	target, err := OpenTarget(ctx, ref, o)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	known, err := pushArtifact(ctx, target, doc, a)
	if err == nil && !known {
		// While the target is open: containerd keeps what was pushed only as long, or when the index refers to it.
		err = addFallback(ctx, ref, o, subject.Digest, doc.Descriptor)
	}
	if cerr := target.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("push artifact about %s to %s: %w", subject.Digest, ref, err)
	}
	return doc.Descriptor, nil
}

// pushArtifact pushes layers, config and manifest; known says that the target has taken
// note of the subject.
func pushArtifact(ctx context.Context, t Target, doc Document, a Artifact) (known bool, err error) {
	empty := Document{Descriptor: ocispec.DescriptorEmptyJSON, Data: ocispec.DescriptorEmptyJSON.Data}
	empty.Descriptor.Data = nil
	for _, d := range append(slices.Clone(a.Layers), empty) {
		if _, err := t.Push(ctx, d.Blob()); err != nil {
			return false, err
		}
	}
	reg, ok := t.(registryTarget)
	if !ok {
		_, err := t.Push(ctx, doc.Blob())
		return false, err
	}
	return reg.pushReferrer(ctx, doc)
}

// pushReferrer puts the manifest and finds out whether the registry took note of its subject.
func (t registryTarget) pushReferrer(ctx context.Context, doc Document) (known bool, err error) {
	h, err := t.host(ctx)
	if err != nil {
		return false, err
	}
	c := call{
		want: "push artifact " + doc.Descriptor.Digest.String(), method: http.MethodPut, path: "manifests/" + doc.Descriptor.Digest.String(), push: true,
		header: http.Header{"Content-Type": {doc.Descriptor.MediaType}},
		body:   func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(doc.Data)), nil },
		size:   int64(len(doc.Data)),
	}
	resp, err := t.do(ctx, h, c)
	if err != nil {
		return false, err
	}
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusAccepted {
		return false, t.answer(h, c, resp)
	}
	drain(resp.Body)
	if resp.Header.Get("OCI-Subject") != "" {
		return true, nil
	}
	// Some keep track and do not say so.
	var m ocispec.Manifest
	if err := json.Unmarshal(doc.Data, &m); err != nil || m.Subject == nil {
		return false, err
	}
	list, ok, err := t.referrers(ctx, h, m.Subject.Digest)
	if err != nil {
		return false, err
	}
	return ok && hasDigest(list, doc.Descriptor.Digest), nil
}

func hasDigest(list []ocispec.Descriptor, d digest.Digest) bool {
	return slices.ContainsFunc(list, func(e ocispec.Descriptor) bool { return e.Digest == d })
}

// ListReferrers returns the artifacts in the place of ref that are about the manifest subject,
// of one type unless artifactType is empty, in the order in which they are kept. None is no error.
// What the descriptors say is not verified: a reader looks at the manifests.
func ListReferrers(ctx context.Context, ref Reference, o Options, subject digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	if err := subject.Validate(); err != nil {
		return nil, fmt.Errorf("%w: subject %q: %w", ErrInvalid, short(subject), err)
	}
	list, err := listReferrers(ctx, ref, o, subject)
	if err != nil {
		return nil, fmt.Errorf("artifacts about %s in %s: %w", subject, ref, err)
	}
	return distinct(filter(list, func(d ocispec.Descriptor) bool {
		// Some registries leave the type out, or give the config's: what such entries are, their manifests say.
		unknown := d.ArtifactType == "" || d.ArtifactType == ocispec.MediaTypeEmptyJSON
		return (artifactType == "" || d.ArtifactType == artifactType || unknown) && checkDescriptor(d) == nil && d.Size <= MaxManifestSize
	})), nil
}

func listReferrers(ctx context.Context, ref Reference, o Options, subject digest.Digest) ([]ocispec.Descriptor, error) {
	if ref.Kind == KindRegistry {
		r := newRepository(ref, o.settle())
		defer r.close()
		type answer struct {
			list []ocispec.Descriptor
			ok   bool
		}
		a, err := anyHost(ctx, r, docker.HostCapabilityPull, func(ctx context.Context, h docker.RegistryHost) (answer, error) {
			list, ok, err := r.referrers(ctx, h, subject)
			return answer{list, ok}, err
		})
		if err != nil || a.ok {
			return a.list, err
		}
	}
	fallback, err := fallbackReference(ref, subject)
	if err != nil {
		return nil, err
	}
	index, err := readFallback(ctx, fallback, o)
	return index.Manifests, err
}

// referrers asks h for all referrers of subject; ok is false when it has no such interface.
func (r *repository) referrers(ctx context.Context, h docker.RegistryHost, subject digest.Digest) (list []ocispec.Descriptor, ok bool, err error) {
	c := call{
		want: "list referrers of " + subject.String(), method: http.MethodGet, path: "referrers/" + subject.String(),
		header: http.Header{"Accept": {ocispec.MediaTypeImageIndex}},
	}
	for range maxReferrerPages {
		resp, err := r.do(ctx, h, c)
		if err != nil {
			return nil, false, err
		}
		switch resp.StatusCode {
		case http.StatusOK:
		case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented:
			drain(resp.Body)
			return nil, false, nil
		default:
			return nil, false, r.answer(h, c, resp)
		}
		page, err := referrersPage(resp)
		if err != nil {
			return nil, false, r.fail(h, c, err)
		}
		if list = append(list, page...); len(list) > MaxIndexEntries {
			return nil, false, r.fail(h, c, fmt.Errorf("%w: more than %d artifacts", ErrTooLarge, MaxIndexEntries))
		}
		next, err := nextPage(resp)
		if err != nil {
			return nil, false, r.fail(h, c, err)
		}
		if next == nil {
			return list, true, nil
		}
		c.url = next
	}
	return nil, false, r.fail(h, c, fmt.Errorf("%w: more than %d pages", ErrTooLarge, maxReferrerPages))
}

// referrersPage reads one answer. A registry that knows no such path may answer anything
// with status 200: what is no index is none.
func referrersPage(resp *http.Response) ([]ocispec.Descriptor, error) {
	data, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifestSize+1))
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return nil, err
	}
	if len(data) > MaxManifestSize {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, MaxManifestSize)
	}
	index, err := parseIndex(data)
	return index.Manifests, err
}

// nextPage returns where a list goes on; nil at its end. Source: distribution-spec, "Listing Referrers".
func nextPage(resp *http.Response) (*url.URL, error) {
	for _, v := range resp.Header.Values("Link") {
		target, params, ok := strings.Cut(v, ">")
		target, found := strings.CutPrefix(strings.TrimSpace(target), "<")
		if !ok || !found || !strings.Contains(strings.ReplaceAll(params, " ", ""), `rel="next"`) {
			continue
		}
		u, err := resp.Request.URL.Parse(target)
		if err != nil || !sameOrigin(u, resp.Request.URL) {
			return nil, fmt.Errorf("%w: Link %.200q", ErrInvalid, v)
		}
		return u, nil
	}
	return nil, nil
}

// fallbackReference is where the index of subject's referrers is kept: the tag
// "sha256-…". Source: distribution-spec, "Referrers Tag Schema".
func fallbackReference(ref Reference, subject digest.Digest) (Reference, error) {
	if ref.Kind == KindContainerd && ref.Host == "" {
		return Reference{}, fmt.Errorf("%w: %s: an image ID has no place for artifacts", ErrUnsupported, ref)
	}
	tag := subject.Algorithm().String() + "-" + subject.Encoded()
	return ref.WithTag(tag[:min(len(tag), 128)]), nil
}

// isFallbackTag tells the tags of [fallbackReference] from names of images.
func isFallbackTag(tag string) bool {
	algorithm, encoded, ok := strings.Cut(tag, "-")
	return ok && digest.NewDigestFromEncoded(digest.Algorithm(algorithm), encoded).Validate() == nil
}

// readFallback reads the index of referrers; an empty one when there is none.
func readFallback(ctx context.Context, ref Reference, o Options) (ocispec.Index, error) {
	src, err := OpenSource(ctx, ref, o)
	if err != nil {
		return ocispec.Index{}, err
	}
	index, err := func() (ocispec.Index, error) {
		desc, err := src.Resolve(ctx)
		if errors.Is(err, ErrNotFound) {
			return emptyIndex(), nil
		}
		if err != nil {
			return ocispec.Index{}, err
		}
		data, err := ReadAll(ctx, src, desc, MaxManifestSize)
		if err != nil {
			return ocispec.Index{}, err
		}
		return parseIndex(data)
	}()
	if cerr := src.Close(); err == nil {
		err = cerr
	}
	return index, err
}

// addFallback adds desc to the index of subject's referrers. Writers of this process, and all writers of
// a layout, take turns. Nothing else makes reading and writing one step, so what was written is read again,
// after waits of different length: an entry that another writer has lost is added again.
func addFallback(ctx context.Context, ref Reference, o Options, subject digest.Digest, desc ocispec.Descriptor) (err error) {
	fallback, err := fallbackReference(ref, subject)
	if err != nil {
		return err
	}
	done, err := takeTurn(ctx, fallback)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	seen := 0 // how often in a row it was there
	for try := range fallbackTries {
		index, err := readFallback(ctx, fallback, o)
		if err != nil {
			return err
		}
		if hasDigest(index.Manifests, desc.Digest) {
			if seen++; seen >= 2 || try == 0 {
				return nil
			}
		} else {
			seen = 0
			if try > 0 {
				o.settle().Log.Info("referrers index was replaced by another writer, adding again", zap.Stringer("subject", subject), zap.Int("try", try))
			}
			if err := writeFallback(ctx, fallback, o, index, desc); err != nil {
				return err
			}
		}
		if err := sleep(ctx, settleWait+rand.N(settleWait*time.Duration(try+1))); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: %s: others replace the index of referrers all the time", ErrUnavailable, fallback)
}

func writeFallback(ctx context.Context, ref Reference, o Options, index ocispec.Index, desc ocispec.Descriptor) error {
	index.Manifests = append(slices.Clone(index.Manifests), desc)
	data, err := encodeIndex(index)
	if err != nil {
		return err
	}
	t, err := OpenTarget(ctx, ref, o)
	if err != nil {
		return err
	}
	err = t.Tag(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(data), Size: int64(len(data))}, data)
	if cerr := t.Close(); err == nil {
		err = cerr
	}
	return err
}

// ReadArtifact reads the manifest that desc describes and checks that it is about subject. The caller
// fetches its layers.
func ReadArtifact(ctx context.Context, src Source, desc ocispec.Descriptor, subject digest.Digest) (ocispec.Manifest, error) {
	data, err := ReadAll(ctx, src, desc, MaxManifestSize)
	if err != nil {
		return ocispec.Manifest{}, err
	}
	m, err := ParseManifest(data)
	if err != nil {
		return ocispec.Manifest{}, fmt.Errorf("%s: %w", desc.Digest, err)
	}
	if m.Subject == nil || m.Subject.Digest != subject {
		return ocispec.Manifest{}, fmt.Errorf("%w: %s: it is not about %s", ErrInvalid, desc.Digest, subject)
	}
	return m, nil
}
