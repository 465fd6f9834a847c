package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxNamePages bounds the answers to one question for the tags of a repository.
const maxNamePages = 64

// ListNames returns the references of the tagged images that are kept where ref is: those of its repository, or of its layout
// directory, in the order in which they are kept (registries: that of the alphabet). Tags that stand for the referrers of an image are left out. None is no
// error; of an archive and of containerd there are none. It returns [ErrNotFound] where there is no such
// place, and [ErrTooLarge] for more than [MaxIndexEntries] names.
func ListNames(ctx context.Context, ref Reference, o Options) ([]Reference, error) {
	var tags []string
	var err error
	switch ref.Kind {
	case KindRegistry:
		r := newRepository(ref, o.settle())
		defer r.close()
		tags, err = anyHost(ctx, r, docker.HostCapabilityPull|docker.HostCapabilityResolve, r.tags)
	case KindLayout:
		tags, err = layoutTags(ref)
	}
	if err != nil {
		return nil, fmt.Errorf("names in %s: %w", ref, err)
	}
	var out []Reference
	for _, tag := range tags {
		next := ref
		next.Tag, next.Digest = tag, ""
		// What does not read back as itself is no name that can be asked for.
		if again, err := Parse(next.String()); err == nil && again == next && !isFallbackTag(tag) {
			out = append(out, next)
		}
	}
	return out, nil
}

// layoutTags returns the names of a layout's entries, each once.
func layoutTags(ref Reference) ([]string, error) {
	src, err := openFiles(ref, openDir)
	if err != nil {
		return nil, err
	}
	l, _ := src.(*layoutSource)
	index, err := readIndex(l.f, ref.Path)
	if err := errors.Join(err, src.Close()); err != nil {
		return nil, err
	}
	var out []string
	seen := map[string]bool{"": true}
	for _, d := range index.Manifests {
		if tag := d.Annotations[ocispec.AnnotationRefName]; !seen[tag] {
			seen[tag] = true
			out = append(out, tag)
		}
	}
	return out, nil
}

// tags asks h for the tags of the repository. Source: distribution-spec, "Listing Tags".
func (r *repository) tags(ctx context.Context, h docker.RegistryHost) ([]string, error) {
	c := call{want: "list tags", method: http.MethodGet, path: "tags/list"}
	var out []string
	for range maxNamePages {
		resp, err := r.do(ctx, h, c)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode != http.StatusOK {
			return nil, r.answer(h, c, resp)
		}
		data, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifestSize+1))
		if err = errors.Join(err, resp.Body.Close()); err != nil {
			return nil, r.fail(h, c, err)
		}
		var page struct {
			Tags []string `json:"tags"`
		}
		switch {
		case len(data) > MaxManifestSize:
			return nil, r.fail(h, c, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, MaxManifestSize))
		case json.Unmarshal(data, &page) != nil:
			return nil, r.fail(h, c, fmt.Errorf("%w: got %.80q, want a list of tags", ErrInvalid, data))
		}
		if out = append(out, page.Tags...); len(out) > MaxIndexEntries {
			return nil, r.fail(h, c, fmt.Errorf("%w: more than %d tags", ErrTooLarge, MaxIndexEntries))
		}
		next, err := nextPage(resp)
		if err != nil {
			return nil, r.fail(h, c, err)
		}
		if next == nil {
			return out, nil
		}
		c.url = next
	}
	return nil, r.fail(h, c, fmt.Errorf("%w: more than %d pages", ErrTooLarge, maxNamePages))
}
