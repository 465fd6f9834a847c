package nriplugin

import (
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
)

// To compile a pattern may take longer than a hook may: limitsOf, which hooks call, must not.
func TestPatternsOfAnnotations(t *testing.T) {
	c := DefaultConfig()
	c.ReadyLog = "the configuration's"
	s := newSelector(&c)
	huge := strings.Repeat("(a?){1000}", 101) + "b"
	for name, tc := range map[string]struct {
		container, pod string
		want           string // the pattern, empty: none
		warns          int
	}{
		"container's":     {container: "one", pod: "two", want: "one"},
		"pod's":           {container: "(", pod: "two", want: "two", warns: 1},
		"configuration's": {container: "(", pod: huge, want: c.ReadyLog, warns: 2},
	} {
		pod := &api.PodSandbox{Annotations: map[string]string{AnnotationReadyLog: tc.pod}}
		ctr := &api.Container{Annotations: map[string]string{AnnotationReadyLog: tc.container}}
		l, warns := s.limitsOf(pod, ctr)
		if l.ready != s.limits.ready || len(warns) != 0 {
			t.Errorf("%s: limitsOf read the pattern: %v, %q", name, l.ready, warns)
		}
		re, warns := l.pattern()
		if re == nil || re.String() != tc.want || len(warns) != tc.warns {
			t.Errorf("%s: pattern = %v, %q, want %q and %d remarks", name, re, warns, tc.want, tc.warns)
		}
		ctr.Annotations[AnnotationReadyLog] = ""
		if l, _ := s.limitsOf(pod, ctr); l.asked == nil {
			t.Errorf("%s: an empty annotation is not seen", name)
		} else if re, warns := l.pattern(); re != nil || len(warns) != 0 {
			t.Errorf("%s: an empty annotation gives %v, %q", name, re, warns)
		}
	}
}
