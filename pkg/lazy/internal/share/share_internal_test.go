package share

import "testing"

func TestMay(t *testing.T) {
	const one, two = "registry.example/one", "registry.example/two"
	for name, tt := range map[string]struct {
		claims []Claim
		scopes []string
		want   bool
	}{
		"public":                       {[]Claim{{Scope: one, Policy: Allowed}}, []string{ScopePublic}, true},
		"public beside another":        {[]Claim{{Scope: one, Policy: Allowed}}, []string{two, ScopePublic}, true},
		"same repository":              {[]Claim{{Scope: one, Policy: Allowed}}, []string{one}, true},
		"another repository":           {[]Claim{{Scope: one, Policy: Allowed}}, []string{two}, false},
		"public asks a private one":    {[]Claim{{Scope: ScopePublic, Policy: Allowed}}, []string{one}, false},
		"local":                        {[]Claim{{Scope: "local", Policy: Allowed}}, []string{"local"}, true},
		"a registry asks a local one":  {[]Claim{{Scope: ScopePublic, Policy: Allowed}}, []string{"local"}, false},
		"all":                          {[]Claim{{Scope: one, Policy: All}}, []string{two}, true},
		"none":                         {[]Claim{{Scope: "", Policy: None}}, []string{ScopePublic}, false},
		"one of two mounts may not":    {[]Claim{{Scope: one, Policy: Allowed}, {Scope: two, Policy: Allowed}}, []string{one}, false},
		"one of two mounts wants none": {[]Claim{{Scope: one, Policy: Allowed}, {Scope: "", Policy: None}}, []string{ScopePublic}, false},
		"both may":                     {[]Claim{{Scope: one, Policy: Allowed}, {Scope: two, Policy: Allowed}}, []string{one, two}, true},
		"nobody knows where from":      {[]Claim{{Scope: one, Policy: All}}, nil, false},
		"a mount of no known scope":    {[]Claim{{Scope: "", Policy: Allowed}}, []string{""}, false},
		"no mounts":                    {nil, []string{ScopePublic}, false},
	} {
		if got := may(tt.claims, tt.scopes); got != tt.want {
			t.Errorf("%s: may(%v, %v) = %t, want %t", name, tt.claims, tt.scopes, got, tt.want)
		}
	}
}
