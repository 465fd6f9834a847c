package remote

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Kind is where a [Reference] points to.
type Kind uint8

// The kinds of places; the zero value is none of them.
const (
	KindRegistry   Kind = iota + 1 // HOST/REPOSITORY[:TAG][@DIGEST]
	KindLayout                     // oci:DIR[:TAG]
	KindArchive                    // oci-archive:FILE[:TAG]
	KindContainerd                 // containerd:[NAMESPACE/]REF
)

// The prefixes of references that are not registry references.
const (
	prefixLayout     = "oci:"
	prefixArchive    = "oci-archive:"
	prefixContainerd = "containerd:"
)

// DefaultNamespace is the containerd namespace of a reference that names none: that of
// Kubernetes (containerd's CRI plugin).
const DefaultNamespace = "k8s.io"

// maxReference bounds the text of a reference: twice a path of PATH_MAX (4096) bytes.
const maxReference = 8192

// maxHost bounds a host and its port in bytes. RFC 1035, 2.3.4: labels and their lengths take 255, which is 253 as text.
const maxHost = 253 + len(":65535")

// String returns the kind's name as it is used in messages.
func (k Kind) String() string {
	switch k {
	case KindRegistry:
		return "registry"
	case KindLayout:
		return "oci layout"
	case KindArchive:
		return "oci archive"
	case KindContainerd:
		return "containerd"
	default:
		return fmt.Sprintf("kind(%d)", uint8(k))
	}
}

// Reference names an image in one place. Make one with [Parse], [Layout], [Archive] or
// [Containerd]; it is a value and comparable.
type Reference struct {
	Kind Kind

	// Path is the directory (KindLayout) or the file (KindArchive), as written.
	Path string

	// Namespace is containerd's namespace (KindContainerd); empty: the one of [Options],
	// else [DefaultNamespace].
	Namespace string

	// Host and Repository are canonical (KindRegistry, KindContainerd): docker.io and
	// library/nginx for nginx. Host may carry a port. Both are empty for a containerd name
	// that is not a registry reference (an image ID, "sha256:…").
	Host       string
	Repository string

	// Tag is the tag; of a layout or archive any name of an entry. A registry reference
	// without tag and digest has tag "latest"; one with a digest only has none.
	Tag string

	// Digest pins the manifest or index; it wins over Tag when reading.
	Digest digest.Digest
}

// tagPattern is the tag grammar of the distribution specification. Like the other patterns it is compiled
// when it is first needed: commands that need none start faster.
var tagPattern = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`) })

// imageID is a containerd image name that is an image ID, as containerd's CRI plugin makes.
var imageID = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^sha256:[0-9a-f]{64}$`) })

// namespacePattern is containerd's grammar of a namespace.
// Source: containerd pkg/identifiers identifierRegexp; 76 bytes at most.
var namespacePattern = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$`) })

// Parse reads a reference as a user types it:
//
//	oci:DIR[:TAG]               a layout; TAG is what follows the last colon that no slash follows
//	oci-archive:FILE[:TAG]      an archive; the same
//	containerd:[NAMESPACE/]REF  NAMESPACE is there when what follows the first slash begins
//	                            with a registry host (a dot, a colon, a capital or "localhost") or is an image ID
//	anything else               a registry reference, normalised as docker does
//
// Every form may end in @DIGEST, as in oci:DIR@sha256:….
// It returns [ErrInvalid] for anything else.
func Parse(s string) (Reference, error) {
	if len(s) > maxReference {
		return Reference{}, fmt.Errorf("%w: reference of %d bytes, at most %d", ErrInvalid, len(s), maxReference)
	}
	if i := strings.IndexFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f }); i >= 0 {
		return Reference{}, fmt.Errorf("%w: reference %q: control character at byte %d", ErrInvalid, s, i)
	}
	switch {
	case strings.HasPrefix(s, prefixLayout):
		return parsePath(KindLayout, s, s[len(prefixLayout):])
	case strings.HasPrefix(s, prefixArchive):
		return parsePath(KindArchive, s, s[len(prefixArchive):])
	case strings.HasPrefix(s, prefixContainerd):
		return parseContainerd(s, s[len(prefixContainerd):])
	default:
		return parseRegistry(s, s)
	}
}

// Layout returns the reference of the entry tag of the OCI layout at dir; an empty tag means
// its only entry when reading and an entry without a name when writing.
func Layout(dir, tag string) Reference { return Reference{Kind: KindLayout, Path: dir, Tag: tag} }

// Archive returns the reference of the entry tag of the OCI archive file, as [Layout] does.
func Archive(file, tag string) Reference { return Reference{Kind: KindArchive, Path: file, Tag: tag} }

// Containerd returns the reference of the image named name in a namespace of containerd; an
// empty namespace means the one of [Options]. It returns [ErrInvalid] when either is malformed.
func Containerd(namespace, name string) (Reference, error) {
	if namespace != "" && !validNamespace(namespace) {
		return Reference{}, fmt.Errorf("%w: containerd namespace %q", ErrInvalid, namespace)
	}
	var ref Reference
	if imageID().MatchString(name) {
		ref.Tag = name
	} else {
		var err error
		if ref, err = parseRegistry(name, name); err != nil {
			return Reference{}, err
		}
	}
	ref.Kind, ref.Namespace = KindContainerd, namespace
	return ref, nil
}

func validNamespace(ns string) bool { return len(ns) <= 76 && namespacePattern().MatchString(ns) }

// parsePath splits rest into a path and a tag or digest.
func parsePath(kind Kind, s, rest string) (Reference, error) {
	ref := Reference{Kind: kind, Path: rest}
	if at := strings.LastIndex(rest, "@"); at >= 0 {
		if d, err := digest.Parse(rest[at+1:]); err == nil {
			ref.Path, ref.Digest = rest[:at], d
		}
	}
	if colon := trailingColon(ref.Path); colon >= 0 {
		ref.Path, ref.Tag = ref.Path[:colon], ref.Path[colon+1:]
		if !tagPattern().MatchString(ref.Tag) {
			return Reference{}, fmt.Errorf("%w: reference %q: tag %q: want a letter, digit or _, then at most 127 of these and . -",
				ErrInvalid, s, ref.Tag)
		}
	}
	if ref.Path == "" {
		return Reference{}, fmt.Errorf("%w: reference %q: no path", ErrInvalid, s)
	}
	return ref, nil
}

// trailingColon returns the index of the last colon of path when no slash follows it, else -1.
func trailingColon(path string) int {
	colon := strings.LastIndex(path, ":")
	if colon >= 0 && strings.Contains(path[colon:], "/") {
		return -1
	}
	return colon
}

// parseContainerd splits rest into a namespace, which may be missing, and a name.
func parseContainerd(s, rest string) (Reference, error) {
	namespace, name := "", rest
	if first, tail, ok := strings.Cut(rest, "/"); ok && beginsFull(tail) {
		namespace, name = first, tail
		if !validNamespace(namespace) {
			return Reference{}, fmt.Errorf("%w: reference %q: containerd namespace %q", ErrInvalid, s, namespace)
		}
	}
	ref, err := Containerd(namespace, name)
	if err != nil {
		return Reference{}, fmt.Errorf("reference %q: %w", s, err)
	}
	return ref, nil
}

// beginsFull reports whether s is an image ID or begins with a registry host.
// Source: splitDockerDomain in github.com/distribution/reference.
func beginsFull(s string) bool {
	if imageID().MatchString(s) {
		return true
	}
	host, _, ok := strings.Cut(s, "/")
	return ok && (strings.ContainsAny(host, ".:") || host == "localhost" || strings.ToLower(host) != host)
}

// parseRegistry normalises a registry reference as docker does. whole is for messages.
func parseRegistry(whole, s string) (Reference, error) {
	switch {
	case s == "":
		return Reference{}, fmt.Errorf("%w: empty reference", ErrInvalid)
	case strings.Contains(s, "://"):
		return Reference{}, fmt.Errorf("%w: reference %q: a reference has no scheme, remove %q", ErrInvalid, whole, s[:strings.Index(s, "://")+3])
	}
	full, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return Reference{}, fmt.Errorf("%w: reference %q: %w", ErrInvalid, whole, err)
	}
	ref := Reference{Kind: KindRegistry, Host: reference.Domain(full), Repository: reference.Path(full)}
	if d, ok := full.(reference.Digested); ok {
		ref.Digest = d.Digest()
	}
	if t, ok := full.(reference.Tagged); ok {
		ref.Tag = t.Tag()
	}
	if ref.Tag == "" && ref.Digest == "" {
		ref.Tag = "latest"
	}
	if err := checkHost(ref.Host); err != nil {
		return Reference{}, fmt.Errorf("%w: reference %q: %w", ErrInvalid, whole, err)
	}
	return ref, nil
}

// checkHost refuses what the reference grammar lets through and no URL can carry, and the
// empty host that it gives for one it cannot read (an underscore in it).
func checkHost(host string) error {
	if host == "" {
		return errors.New("what precedes the first slash is not a host: want letters, digits, - and dots, then at most a port")
	}
	name, port := host, ""
	if colon := strings.LastIndexByte(host, ':'); colon > strings.LastIndexByte(host, ']') {
		name, port = host[:colon], host[colon+1:]
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return fmt.Errorf("port %.20q of host %.100q: want a number below 65536", port, name)
		}
	}
	if inner, ok := strings.CutPrefix(name, "["); ok {
		if _, err := netip.ParseAddr(strings.TrimSuffix(inner, "]")); err != nil {
			return fmt.Errorf("host %q: not an IPv6 address", host)
		}
	}
	if len(host) > maxHost {
		return fmt.Errorf("host of %d bytes, at most %d", len(host), maxHost)
	}
	return nil
}

// Name returns the canonical name without prefix and namespace: HOST/REPOSITORY[:TAG][@DIGEST]
// of a registry or containerd reference (the image ID of one that has no host), the path of
// others.
func (r Reference) Name() string {
	switch {
	case r.Kind == KindLayout || r.Kind == KindArchive:
		return r.Path
	case r.Host == "":
		return r.Tag
	}
	var b strings.Builder
	b.WriteString(r.Host + "/" + r.Repository)
	if r.Tag != "" {
		b.WriteString(":" + r.Tag)
	}
	if r.Digest != "" {
		b.WriteString("@" + r.Digest.String())
	}
	return b.String()
}

// String returns the canonical form; Parse of it gives r again when r came from [Parse].
func (r Reference) String() string {
	switch r.Kind {
	case KindRegistry:
		return r.Name()
	case KindContainerd:
		ns := r.Namespace
		if ns == "" {
			ns = DefaultNamespace
		}
		return prefixContainerd + ns + "/" + r.Name()
	case KindLayout, KindArchive:
		prefix := prefixLayout
		if r.Kind == KindArchive {
			prefix = prefixArchive
		}
		s := prefix + r.Path
		switch {
		case r.Tag != "":
			s += ":" + r.Tag
		case trailingColon(r.Path) >= 0:
			s += "/" // keeps the colon out of the tag
		}
		if r.Digest != "" {
			s += "@" + r.Digest.String()
		}
		return s
	default:
		return ""
	}
}

// Registry returns the registry reference of the same image name, and whether there is one:
// a registry reference itself, or the name of a containerd image.
func (r Reference) Registry() (Reference, bool) {
	if (r.Kind != KindRegistry && r.Kind != KindContainerd) || r.Host == "" {
		return Reference{}, false
	}
	r.Kind, r.Namespace = KindRegistry, ""
	return r, true
}

// WithTag returns r naming tag instead of its tag and digest.
func (r Reference) WithTag(tag string) Reference {
	r.Tag, r.Digest = tag, ""
	return r
}

// WithDigest returns r pinned to d, without a tag.
func (r Reference) WithDigest(d digest.Digest) Reference {
	r.Tag, r.Digest = "", d
	return r
}
