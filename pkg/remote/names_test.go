package remote_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/remote"
)

func namesOf(t *testing.T, ref string, o remote.Options) ([]string, error) {
	t.Helper()
	r, err := remote.Parse(ref)
	if err != nil {
		t.Fatal(err)
	}
	list, err := remote.ListNames(t.Context(), r, o)
	var out []string
	for _, r := range list {
		out = append(out, r.String())
	}
	return out, err
}

// TestListNames lists the tags of repositories whose registry answers in pages, refuses or makes no sense, and the names in layouts.
func TestListNames(t *testing.T) {
	t.Parallel()
	fallback := "sha256-" + strings.Repeat("a", 64)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path + "?" + r.URL.RawQuery {
		case "/v2/?":
		case "/v2/app/tags/list?":
			w.Header().Set("Link", `</v2/app/tags/list?last=b>; rel="next"`)
			fmt.Fprintf(w, `{"name":"app","tags":["a","b","not a tag",%q]}`, fallback)
		case "/v2/app/tags/list?last=b":
			fmt.Fprint(w, `{"name":"app","tags":["c"]}`)
		case "/v2/none/tags/list?":
			fmt.Fprint(w, `{"name":"none","tags":null}`)
		case "/v2/loop/tags/list?", "/v2/loop/tags/list?again":
			w.Header().Set("Link", `</v2/loop/tags/list?again>; rel="next"`)
			fmt.Fprint(w, `{"tags":["x"]}`)
		case "/v2/away/tags/list?":
			w.Header().Set("Link", `<http://elsewhere.example/v2/>; rel="next"`)
			fmt.Fprint(w, `{"tags":["x"]}`)
		case "/v2/odd/tags/list?":
			fmt.Fprint(w, `<html>`)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	t.Cleanup(srv.Close)
	host := strings.TrimPrefix(srv.URL, "http://")
	o := remote.Options{PlainHTTP: true}
	for repo, want := range map[string][]string{"app": {"a", "b", "c"}, "none": nil} {
		var full []string
		for _, tag := range want {
			full = append(full, host+"/"+repo+":"+tag)
		}
		got, err := namesOf(t, host+"/"+repo+":x", o)
		if diff := cmp.Diff(full, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", repo, err, diff)
		}
	}
	for repo, want := range map[string]error{"missing": remote.ErrNotFound, "loop": remote.ErrTooLarge, "away": remote.ErrInvalid, "odd": remote.ErrInvalid} {
		if got, err := namesOf(t, host+"/"+repo+":x", o); !errors.Is(err, want) || got != nil {
			t.Errorf("ListNames of %s = %v, %v, want %v", repo, got, err, want)
		}
	}
	dir := t.TempDir()
	name := func(s string) string {
		return fmt.Sprintf(`{"digest":"sha256:%s","size":2,"annotations":{"org.opencontainers.image.ref.name":%q}}`, strings.Repeat("0", 64), s)
	}
	index := `{"schemaVersion":2,"manifests":[` + strings.Join([]string{name("one"), name("two"), name(""), name("one"), name(fallback)}, ",") + `]}`
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "index.json"), []byte(index), 0o600),
		os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o600)); err != nil {
		t.Fatal(err)
	}
	got, err := namesOf(t, "oci:"+dir+":three", remote.Options{})
	if diff := cmp.Diff([]string{"oci:" + dir + ":one", "oci:" + dir + ":two"}, got); diff != "" || err != nil {
		t.Errorf("layout: %v (-want +got):\n%s", err, diff)
	}
	if got, err := namesOf(t, "oci:"+dir+"/missing", remote.Options{}); !errors.Is(err, remote.ErrNotFound) || got != nil {
		t.Errorf("ListNames of no layout = %v, %v", got, err)
	}
	if got, err := namesOf(t, "oci-archive:"+dir+"/x.tar", remote.Options{}); err != nil || got != nil {
		t.Errorf("ListNames of an archive = %v, %v", got, err)
	}
}
