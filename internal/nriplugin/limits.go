package nriplugin

import (
	"fmt"
	"regexp"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/headstart-oci/headstart/internal/readylog"
)

// limits say when a recording ends, besides its container's end and stop.
type limits struct {
	timeout time.Duration  // 0: none
	idle    time.Duration  // 0: none
	ready   *regexp.Regexp // nil: none
	asked   []annotation   // for a pattern in place of ready, the one that wins first
}

// pattern returns what the container's log is watched for, nil for nothing, and remarks on annotations
// that mean nothing. It is not for hooks: to compile a pattern may take longer than a start may wait.
func (l *limits) pattern() (re *regexp.Regexp, warns []string) {
	for _, a := range l.asked {
		if a.value == "" {
			return nil, warns
		}
		re, err := readylog.Compile(a.value)
		if err == nil {
			return re, warns
		}
		warns = append(warns, fmt.Sprintf("annotation %s: %v", a.key, err))
	}
	return l.ready, warns
}

// override is an [Override] ready for use.
type override struct {
	images []*regexp.Regexp
	from   *Override
	ready  *regexp.Regexp
}

func newOverride(o *Override) override {
	res := override{images: globs(o.Images), from: o}
	if o.ReadyLog != nil {
		res.ready = readyPattern(*o.ReadyLog)
	}
	return res
}

func (o *override) apply(l *limits) {
	if o.from.ReadyLog != nil {
		l.ready = o.ready
	}
	if o.from.Timeout != nil {
		l.timeout = *o.from.Timeout
	}
	if o.from.IdleTimeout != nil {
		l.idle = *o.from.IdleTimeout
	}
}

// readyPattern compiles a pattern that was validated; an empty one is none.
func readyPattern(p string) *regexp.Regexp {
	if p == "" {
		return nil
	}
	re, err := readylog.Compile(p)
	if err != nil {
		return nil // Config.Validate refuses it
	}
	return re
}

// annotation is one that is there.
type annotation struct{ key, value string }

// annotated returns what is there of the annotations that speak of key for a container, the one
// that wins first.
func annotated(pod *api.PodSandbox, ctr *api.Container, key string) []annotation {
	var found []annotation
	for _, a := range []struct {
		from map[string]string
		key  string
	}{
		{ctr.GetAnnotations(), key},
		{pod.GetAnnotations(), key + "." + ctr.GetName()},
		{pod.GetAnnotations(), key},
	} {
		if v, ok := a.from[a.key]; ok {
			found = append(found, annotation{a.key, v})
		}
	}
	return found
}

// limitsOf returns the limits of a container's recording: the annotations', else those of the first
// override for its image, else the configuration's. warns are remarks on annotations that mean nothing.
func (s *selector) limitsOf(pod *api.PodSandbox, ctr *api.Container) (l limits, warns []string) {
	l = s.limits
	for i := range s.overrides {
		if o := &s.overrides[i]; matchAny(o.images, imageNames(ctr.GetAnnotations()[annotationImage])...) {
			o.apply(&l)
			break
		}
	}
	set := func(key string, parse func(string) error) {
		for _, a := range annotated(pod, ctr, key) {
			err := parse(a.value)
			if err == nil {
				return
			}
			warns = append(warns, fmt.Sprintf("annotation %s: %v", a.key, err))
		}
	}
	l.asked = annotated(pod, ctr, AnnotationReadyLog)
	set(AnnotationTimeout, func(v string) error { return setLimit(&l.timeout, v, ParseTimeout) })
	set(AnnotationIdleTimeout, func(v string) error { return setLimit(&l.idle, v, parseDuration) })
	return l, warns
}

func setLimit(to *time.Duration, v string, parse func(string) (time.Duration, error)) error {
	d, err := parse(clip(v))
	if err == nil {
		err = checkLimit(d)
	}
	if err != nil {
		return err
	}
	*to = d
	return nil
}

// maxShown bounds what is quoted of an annotation, in bytes: Kubernetes allows 256 KiB.
const maxShown = 64

func clip(s string) string {
	if len(s) <= maxShown {
		return s
	}
	return s[:maxShown] + "…"
}
