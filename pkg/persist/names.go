package persist

import (
	"crypto/sha256"
	"encoding/hex"
	"path"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// nativeName returns where the native list of l is kept, relative to the store:
// lists/<hex of the manifest digest>/<os>-<arch>[-<variant>]/<container>.list,
// or <container>.part.list for a part of a run. What is no plain name of its kind is replaced by a hash of it.
func nativeName(l *List, part bool) string {
	ext := listExt
	if part {
		ext = ".part" + listExt
	}
	image := "unknown-" + short(l.Reference)
	if d, err := digest.Parse(l.Digest); err == nil {
		image = d.Encoded()
	}
	return path.Join(listsDir, image,
		plainName("platform-", strings.ReplaceAll(l.Platform, "/", "-")),
		plainName("id-", l.Container)+ext)
}

// plainName returns s when it is a file name of letters, digits, "_", "." and "-" that
// begins with a letter or digit and leaves room for an extension, else prefix and a hash of s.
func plainName(prefix, s string) string {
	const most = 200 // bytes, below NAME_MAX
	if s == "" || len(s) > most {
		return prefix + short(s)
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
		case i > 0 && (c == '_' || c == '.' || c == '-'):
		default:
			return prefix + short(s)
		}
	}
	return s
}

// short returns 16 hex digits that stand for s in a file name.
func short(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}

// upstreamNames returns where upstream's optimizer puts the list of an image, relative to
// the store: the repository without its host, a colon and the tag. It is
// "library/nginx:latest" for nginx, and alias is then "nginx:latest"; alias is empty for
// images outside docker.io/library. A reference by digest, for which upstream has no
// name, gives "<repository>@sha256-<hex>". ok is false when ref is no image reference, its
// name is longer than a file's can be, or its tag ends like the names that say that a list has losses.
func upstreamNames(ref string) (name, alias string, ok bool) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", "", false
	}
	suffix := ""
	switch r := named.(type) {
	case reference.Digested:
		suffix = "@" + strings.ReplaceAll(r.Digest().String(), ":", "-")
	case reference.Tagged:
		suffix = ":" + r.Tag()
	default:
		return "", "", false
	}
	repo := reference.Path(named)
	name = repo + suffix
	const most = 210 // bytes; the longest addition is ".timeout<19 digits>s.incomplete"
	if strings.HasSuffix(name, lossExt) || len(path.Base(name)) > most || len(name) > 4*most {
		return "", "", false
	}
	if rest, official := strings.CutPrefix(repo, "library/"); official && reference.Domain(named) == "docker.io" {
		alias = rest + suffix
	}
	return name, alias, true
}
