package nriplugin

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/distribution/reference"
)

// Annotations of a pod or a container. The container's own wins over its pod's, and the pod's for
// one container, which has a dot and the container's name behind the key, over the pod's for all.
const (
	// AnnotationTrace decides whether a container is recorded, whatever the allow lists say. The
	// value is a boolean as strconv.ParseBool reads it.
	AnnotationTrace = "headstart.dev/trace"
	// AnnotationReadyLog, AnnotationTimeout and AnnotationIdleTimeout win over the configuration's
	// keys and have their values; an empty pattern is none.
	AnnotationReadyLog    = "headstart.dev/ready-log"
	AnnotationTimeout     = "headstart.dev/timeout"
	AnnotationIdleTimeout = "headstart.dev/idle-timeout"
)

// Annotations of containerd's CRI plugin. Source: containerd pkg/cri/annotations.
const (
	annotationImage = "io.kubernetes.cri.image-name"
	annotationType  = "io.kubernetes.cri.container-type"
	typeSandbox     = "sandbox"
)

// selector decides which containers are recorded, and until when. It is immutable.
type selector struct {
	images     []*regexp.Regexp
	namespaces []*regexp.Regexp
	limits     limits
	overrides  []override
}

func newSelector(c *Config) *selector {
	s := &selector{images: globs(c.Images), namespaces: globs(c.Namespaces)}
	s.limits = limits{timeout: c.Timeout, idle: c.IdleTimeout, ready: readyPattern(c.ReadyLog)}
	for i := range c.Overrides {
		s.overrides = append(s.overrides, newOverride(&c.Overrides[i]))
	}
	return s
}

// globs compiles patterns in which * is any run of characters, slashes too, and ? any one.
func globs(patterns []string) []*regexp.Regexp {
	var res []*regexp.Regexp
	for _, p := range patterns {
		s := regexp.QuoteMeta(p)
		s = strings.NewReplacer(`\*`, ".*", `\?`, ".").Replace(s)
		res = append(res, regexp.MustCompile("(?s)^"+s+"$"))
	}
	return res
}

// choose returns an empty string when the container is to be recorded, else the reason
// why not. warn is a remark on an annotation that means nothing.
func (s *selector) choose(pod *api.PodSandbox, ctr *api.Container) (reason, warn string) {
	if ctr.GetAnnotations()[annotationType] == typeSandbox {
		return "it is a pod's sandbox", ""
	}
	for _, a := range annotated(pod, ctr, AnnotationTrace) {
		on, err := strconv.ParseBool(a.value)
		if err != nil {
			warn = fmt.Sprintf("annotation %s: got %q, want true or false", a.key, clip(a.value))
			continue
		}
		if !on {
			return "annotation " + a.key + " says so", warn
		}
		return "", warn
	}
	if len(s.namespaces) > 0 && !matchAny(s.namespaces, pod.GetNamespace()) {
		return fmt.Sprintf("namespace %q is not in the list", pod.GetNamespace()), warn
	}
	if image := ctr.GetAnnotations()[annotationImage]; len(s.images) > 0 && !matchAny(s.images, imageNames(image)...) {
		return fmt.Sprintf("image %q is not in the list", image), warn
	}
	return "", warn
}

func matchAny(globs []*regexp.Regexp, names ...string) bool {
	for _, g := range globs {
		if slices.ContainsFunc(names, g.MatchString) {
			return true
		}
	}
	return false
}

// imageNames returns the names by which a pattern may mean an image: as given, canonical
// and familiar, each with and without tag and digest.
func imageNames(image string) []string {
	names := []string{image}
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return names
	}
	bare := reference.TrimNamed(named)
	return append(names, reference.TagNameOnly(named).String(), bare.String(),
		reference.FamiliarString(reference.TagNameOnly(named)), reference.FamiliarString(named), reference.FamiliarName(bare))
}
