package share

import "testing"

func TestMay(t *testing.T) {
	const one, two = "registry.example/one", "registry.example/two"
	for name, tt := range map[string]struct {
		claims []Claim
		scopes []string
		want   bool
	}{
		"public":                       {[]Claim{{one, Allowed}}, []string{ScopePublic}, true},
		"public beside another":        {[]Claim{{one, Allowed}}, []string{two, ScopePublic}, true},
		"same repository":              {[]Claim{{one, Allowed}}, []string{one}, true},
		"another repository":           {[]Claim{{one, Allowed}}, []string{two}, false},
		"public asks a private one":    {[]Claim{{ScopePublic, Allowed}}, []string{one}, false},
		"local":                        {[]Claim{{"local", Allowed}}, []string{"local"}, true},
		"a registry asks a local one":  {[]Claim{{ScopePublic, Allowed}}, []string{"local"}, false},
		"all":                          {[]Claim{{one, All}}, []string{two}, true},
		"none":                         {[]Claim{{"", None}}, []string{ScopePublic}, false},
		"one of two mounts may not":    {[]Claim{{one, Allowed}, {two, Allowed}}, []string{one}, false},
		"one of two mounts wants none": {[]Claim{{one, Allowed}, {"", None}}, []string{ScopePublic}, false},
		"both may":                     {[]Claim{{one, Allowed}, {two, Allowed}}, []string{one, two}, true},
		"nobody knows where from":      {[]Claim{{one, All}}, nil, false},
		"a mount of no known scope":    {[]Claim{{"", Allowed}}, []string{""}, false},
		"no mounts":                    {nil, []string{ScopePublic}, false},
	} {
		if got := may(tt.claims, tt.scopes); got != tt.want {
			t.Errorf("%s: may(%v, %v) = %t, want %t", name, tt.claims, tt.scopes, got, tt.want)
		}
	}
}
