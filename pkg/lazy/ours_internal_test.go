package lazy

import (
	"slices"
	"testing"
)

// What the kernel shows of an overlay's layers is read as it was meant.
func TestLayersOf(t *testing.T) {
	t.Parallel()
	for options, want := range map[string][]string{
		"":             nil,
		"rw,index=off": nil,
		"rw,lowerdir=/a:/b/c,upperdir=/u,workdir=/w":             {"/a", "/b/c"},
		"ro,lowerdir=/a::/data":                                  {"/a", "/data"},
		"rw,lowerdir=one:two:/three":                             {"/three"},
		`rw,lowerdir=/with\040space:/with\134:colon:/x`:          {"/with space", "/with:colon", "/x"},
		`rw,lowerdir+=/with:colon,lowerdir+=/a\054b,datadir+=/d`: {"/with:colon", "/a,b", "/d"},
		`rw,lowerdir=/end\`:                                      {`/end\`},
		`rw,lowerdir=/octal\9`:                                   {"/octal9"},
	} {
		if got := layersOf(options); !slices.Equal(got, want) {
			t.Errorf("layersOf(%q) = %q, want %q", options, got, want)
		}
	}
}
