package rebuild

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// DefaultReference is the template of a built image's name.
const DefaultReference = "{registry}/{repository}:{tag}-optimized"

// maxTag is the distribution specification's limit of a tag in bytes.
const maxTag = 128

var field = regexp.MustCompile(`\{[^{}]*\}`)

// sample is an image that every template is tried with.
var sample = Image{
	Reference: "registry.example/team/app:v1",
	Digest:    "sha256:" + strings.Repeat("0123456789abcdef", 4),
	Platform:  "linux/amd64",
}

// ErrReference is what errors about the name of a built image match.
var ErrReference = errors.New("bad reference")

// ExpandReference returns the canonical registry reference, with a tag, that template gives for the image:
//
//	{registry}    docker.io
//	{repository}  library/nginx
//	{tag}         latest; of a reference by digest "sha256-" and its first 12 hex digits
//	{digest}      the first 12 hex digits of the manifest's digest
//	{platform}    linux-amd64
//
// It returns [ErrReference] for an unknown field, a result that is no reference with a tag,
// and a result that is the image's own reference: the image would be overwritten.
func ExpandReference(template string, i Image) (string, error) {
	from, err := parseImage(i.Reference)
	if err != nil {
		return "", err
	}
	var short string
	if d, err := digest.Parse(i.Digest); err == nil {
		short = d.Encoded()[:12]
	}
	fields := map[string]string{
		"{registry}":   reference.Domain(from.named),
		"{repository}": reference.Path(from.named),
		"{tag}":        from.tag,
		"{digest}":     short,
		"{platform}":   strings.ReplaceAll(i.Platform, "/", "-"),
	}
	var unknown error
	s := field.ReplaceAllStringFunc(template, func(f string) string {
		v, ok := fields[f]
		if !ok && unknown == nil {
			unknown = fmt.Errorf("%w: unknown field %s, want {registry}, {repository}, {tag}, {digest} or {platform}", ErrReference, f)
		}
		return v
	})
	if unknown != nil {
		return "", unknown
	}
	to, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return "", fmt.Errorf("%w: %q gives %q: %w", ErrReference, template, s, err)
	}
	tagged, ok := to.(reference.NamedTagged)
	if _, byDigest := to.(reference.Digested); !ok || byDigest {
		return "", fmt.Errorf("%w: %q gives %q, want a name with a tag and without a digest", ErrReference, template, s)
	}
	if len(tagged.Tag()) > maxTag {
		return "", fmt.Errorf("%w: %q gives a tag of %d bytes, want at most %d", ErrReference, template, len(tagged.Tag()), maxTag)
	}
	if to.Name() == from.named.Name() && tagged.Tag() == from.tag {
		return "", fmt.Errorf("%w: %q gives %s, the image it is made from", ErrReference, template, s)
	}
	return tagged.String(), nil
}

// CheckReference returns what [ExpandReference] would say of template for any image.
func CheckReference(template string) error {
	_, err := ExpandReference(template, sample)
	return err
}

type imageName struct {
	named reference.Named
	tag   string
}

func parseImage(ref string) (imageName, error) {
	if _, err := digest.Parse(ref); err == nil {
		return imageName{}, fmt.Errorf("%w: image %s is known by its ID only, and has no name to derive one from", ErrReference, ref)
	}
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return imageName{}, fmt.Errorf("%w: image %q: %w", ErrReference, ref, err)
	}
	n := imageName{named: reference.TrimNamed(named)}
	switch t := reference.TagNameOnly(named).(type) {
	case reference.Tagged:
		n.tag = t.Tag()
	case reference.Digested:
		n.tag = t.Digest().Algorithm().String() + "-" + t.Digest().Encoded()[:12]
	}
	return n, nil
}

// TargetOf returns the target of an image's rebuild as package remote parses it:
// "oci:DIR:TAG", a registry reference, or "containerd:NAMESPACE/REF". The tag in a layout
// is the built image's familiar name with "_" for every "/" and ":" and "__" for "_"
// ("nginx_latest-optimized"), so that one layout holds all images.
func TargetOf(i Image, o *Options) (string, error) {
	name, err := ExpandReference(o.Reference, i)
	if err != nil {
		return "", err
	}
	switch o.Target {
	case TargetLayout:
		if o.LayoutDir == "" {
			return "", fmt.Errorf("%w: no layout directory", ErrReference)
		}
		named, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return "", fmt.Errorf("%w: %q: %w", ErrReference, name, err)
		}
		return "oci:" + o.LayoutDir + ":" + layoutTag(reference.FamiliarString(named)), nil
	case TargetRegistry:
		return name, nil
	case TargetContainerd:
		return "containerd:" + o.ContainerdNamespace + "/" + name, nil
	default:
		return "", fmt.Errorf("%w: target %q", ErrReference, o.Target)
	}
}

var notInTag = regexp.MustCompile(`[^A-Za-z0-9_.-]`)

func layoutTag(name string) string {
	tag := strings.NewReplacer("_", "__", "/", "_", ":", "_").Replace(name)
	tag = notInTag.ReplaceAllString(tag, "-") // the brackets of an IPv6 host
	if len(tag) > maxTag {
		hash := listKey(name)
		tag = tag[:maxTag-len(hash)-1] + "-" + hash
	}
	return tag
}
