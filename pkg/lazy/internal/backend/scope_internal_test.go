package backend

import (
	"testing"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// asked is a source that took what it says.
type asked struct {
	remote.Source
	access remote.Access
}

func (a asked) Access() remote.Access { return a.access }

// A mount may use what another one fetched from a place that it has read from itself, not from one that something else stood in for.
func TestOwn(t *testing.T) {
	const app = "registry.example/app"
	for name, tt := range map[string]struct {
		b    *Blobs
		want string
	}{
		"private":           {&Blobs{src: asked{access: remote.Access{Repository: app, Shown: true}}}, app},
		"public":            {&Blobs{src: asked{access: remote.Access{Repository: app, Anonymous: true, Shown: true}}}, ScopePublic},
		"containerd before": {&Blobs{src: asked{access: remote.Access{Repository: app}}}, ""},
		"files":             {&Blobs{}, ScopeLocal},
		"does not say":      {&Blobs{src: struct{ remote.Source }{}}, ""},
	} {
		if got := tt.b.Own(); got != tt.want {
			t.Errorf("%s: Own() = %q, want %q", name, got, tt.want)
		}
	}
}

// A scope is narrowed by a secret that was handed out since, also after a new start of the daemon, and never widened.
func TestNarrow(t *testing.T) {
	const app = "registry.example/app"
	for name, tt := range map[string]struct {
		b                 *Blobs
		was, scope, again string
	}{
		"still public":         {&Blobs{src: asked{access: remote.Access{Repository: app, Anonymous: true}}}, ScopePublic, ScopePublic, ScopePublic},
		"a secret since":       {&Blobs{src: asked{access: remote.Access{Repository: app}}}, ScopePublic, app, app},
		"reopened":             {&Blobs{reopened: true, src: asked{access: remote.Access{Repository: app, Anonymous: true}}}, ScopePublic, "", ScopePublic},
		"reopened, a secret":   {&Blobs{reopened: true, src: asked{access: remote.Access{Repository: app}}}, ScopePublic, "", app},
		"private":              {&Blobs{reopened: true, src: asked{access: remote.Access{Repository: app, Anonymous: true}}}, app, "", app},
		"local":                {&Blobs{src: asked{access: remote.Access{Anonymous: true}}}, ScopeLocal, ScopeLocal, ScopeLocal},
		"containerd":           {&Blobs{src: asked{access: remote.Access{Anonymous: true, Store: "containerd:s/n"}}}, "containerd:s/n", "containerd:s/n", "containerd:s/n"},
		"loose":                {&Blobs{}, ScopeLocal, ScopeLocal, ScopeLocal},
		"nobody knows":         {&Blobs{src: asked{}}, ScopePublic, "", ""},
		"does not say":         {&Blobs{src: struct{ remote.Source }{}}, ScopePublic, "", ""},
		"nobody knew":          {&Blobs{src: asked{access: remote.Access{Repository: app, Anonymous: true}}}, "", ScopePublic, ""},
		"what is not in UTF-8": {&Blobs{src: asked{access: remote.Access{Repository: "\xff"}}}, ScopePublic, "?", "?"},
	} {
		if got := tt.b.Scope(); got != tt.scope {
			t.Errorf("%s: Scope() = %q, want %q", name, got, tt.scope)
		}
		if got := tt.b.Narrow(tt.was); got != tt.again {
			t.Errorf("%s: Narrow(%q) = %q, want %q", name, tt.was, got, tt.again)
		}
	}
}
