package server

import (
	"os"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
)

// What the parent says of an arming is an error unless it is that it worked; one that says nothing any more is no reason to wait.
func TestArmedAhead(t *testing.T) {
	for said, want := range map[string]string{
		stream.Armed:         "",
		"no memory":          "no memory",
		"armed, but for one": "armed, but for one",
		"":                   "nobody says",
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteString(said); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		err = armedAhead(r)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("armedAhead() = %v of %q, want %q", err, said, want)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
