package remote_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/headstart-oci/headstart/pkg/remote"
)

const hex64 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

var someDigest = digest.Digest("sha256:" + hex64)

func TestParse(t *testing.T) {
	t.Parallel()
	const reg, lay, arc, ctd = remote.KindRegistry, remote.KindLayout, remote.KindArchive, remote.KindContainerd
	for in, want := range map[string]remote.Reference{
		"nginx":                     {Kind: reg, Host: "docker.io", Repository: "library/nginx", Tag: "latest"},
		"nginx:1.25":                {Kind: reg, Host: "docker.io", Repository: "library/nginx", Tag: "1.25"},
		"a/b":                       {Kind: reg, Host: "docker.io", Repository: "a/b", Tag: "latest"},
		"index.docker.io/a/b":       {Kind: reg, Host: "docker.io", Repository: "a/b", Tag: "latest"},
		"ghcr.io/a/b/c/d:t":         {Kind: reg, Host: "ghcr.io", Repository: "a/b/c/d", Tag: "t"},
		"localhost/x":               {Kind: reg, Host: "localhost", Repository: "x", Tag: "latest"},
		"localhost:5000/x":          {Kind: reg, Host: "localhost:5000", Repository: "x", Tag: "latest"},
		"127.0.0.1:5000/x:t":        {Kind: reg, Host: "127.0.0.1:5000", Repository: "x", Tag: "t"},
		"[::1]:5000/x":              {Kind: reg, Host: "[::1]:5000", Repository: "x", Tag: "latest"},
		"[2001:db8::1]/x":           {Kind: reg, Host: "[2001:db8::1]", Repository: "x", Tag: "latest"},
		"nginx@sha256:" + hex64:     {Kind: reg, Host: "docker.io", Repository: "library/nginx", Digest: someDigest},
		"nginx:1@sha256:" + hex64:   {Kind: reg, Host: "docker.io", Repository: "library/nginx", Tag: "1", Digest: someDigest},
		"oci:dir":                   {Kind: lay, Path: "dir"},
		"oci:/a/b:v1":               {Kind: lay, Path: "/a/b", Tag: "v1"},
		"oci:/a:b/c":                {Kind: lay, Path: "/a:b/c"},
		"oci:/a:b/c:d":              {Kind: lay, Path: "/a:b/c", Tag: "d"},
		"oci:/a:b/":                 {Kind: lay, Path: "/a:b/"},
		"oci:d@sha256:" + hex64:     {Kind: lay, Path: "d", Digest: someDigest},
		"oci:d:t@sha256:" + hex64:   {Kind: lay, Path: "d", Tag: "t", Digest: someDigest},
		"oci:with space":            {Kind: lay, Path: "with space"},
		"oci-archive:f.tar":         {Kind: arc, Path: "f.tar"},
		"oci-archive:./f.tar:x":     {Kind: arc, Path: "./f.tar", Tag: "x"},
		"containerd:nginx":          {Kind: ctd, Host: "docker.io", Repository: "library/nginx", Tag: "latest"},
		"containerd:a/b:t":          {Kind: ctd, Host: "docker.io", Repository: "a/b", Tag: "t"},
		"containerd:ghcr.io/a/b":    {Kind: ctd, Host: "ghcr.io", Repository: "a/b", Tag: "latest"},
		"containerd:default/nginx":  {Kind: ctd, Host: "docker.io", Repository: "default/nginx", Tag: "latest"},
		"containerd:localhost:1/ab": {Kind: ctd, Host: "localhost:1", Repository: "ab", Tag: "latest"},
		"containerd:k8s.io/docker.io/library/nginx:latest": {Kind: ctd, Namespace: "k8s.io", Host: "docker.io", Repository: "library/nginx", Tag: "latest"},
		"containerd:default/localhost/x":                   {Kind: ctd, Namespace: "default", Host: "localhost", Repository: "x", Tag: "latest"},
		"containerd:default/127.0.0.1:5/x@sha256:" + hex64: {Kind: ctd, Namespace: "default", Host: "127.0.0.1:5", Repository: "x", Digest: someDigest},
		"containerd:k8s.io/sha256:" + hex64:                {Kind: ctd, Namespace: "k8s.io", Tag: "sha256:" + hex64},
		"containerd:sha256:" + hex64:                       {Kind: ctd, Tag: "sha256:" + hex64},
	} {
		got, err := remote.Parse(in)
		if err != nil {
			t.Errorf("Parse(%q): %v", in, err)
			continue
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("Parse(%q): (-want +got)\n%s", in, diff)
		}
		checkRoundTrip(t, got)
	}
}

// checkRoundTrip holds String against Parse. A containerd reference without a namespace
// comes back with the default one.
func checkRoundTrip(t *testing.T, ref remote.Reference) {
	t.Helper()
	again, err := remote.Parse(ref.String())
	if ref.Kind == remote.KindContainerd && ref.Namespace == "" {
		ref.Namespace = remote.DefaultNamespace
	}
	if ref.Path != "" {
		again.Path, ref.Path = strings.TrimSuffix(again.Path, "/"), strings.TrimSuffix(ref.Path, "/")
	}
	if err != nil || again != ref {
		t.Errorf("Parse(%q) = %+v, %v, want %+v", ref.String(), again, err, ref)
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	for in, part := range map[string]string{
		"":                                       "empty reference",
		"https://nginx":                          "no scheme",
		"docker://nginx":                         "no scheme",
		"Nginx":                                  "lowercase",
		"a b":                                    "invalid reference format",
		"nginx:":                                 "invalid reference format",
		"nginx:ta:g":                             "invalid reference format",
		"nginx@sha256:12":                        "invalid",
		"nginx@md5:" + hex64:                     "",
		hex64:                                    "64-byte hex",
		"[::zz]/x":                               "",
		"[12345::]/x":                            "not an IPv6 address",
		"a/../b":                                 "invalid reference format",
		"oci:":                                   "no path",
		"oci::tag":                               "no path",
		"oci:dir:":                               `tag ""`,
		"oci:dir:-x":                             `tag "-x"`,
		"oci:dir:" + hex64 + hex64 + "a":         "at most 127",
		"oci-archive:":                           "no path",
		"containerd:":                            "empty reference",
		"containerd:-bad-/docker.io/x":           "containerd namespace",
		"containerd:k8s.io/":                     "invalid reference format",
		"containerd:../docker.io/x":              "namespace",
		"dock_r.io/x":                            "not a host",
		"containerd:s.io/dock_r.io/x":            "not a host",
		"dock.r:65536/x":                         "below 65536",
		"[::1]:65536/x":                          "below 65536",
		"a:" + strings.Repeat("0", 8000) + "1/x": "at most 259",
		strings.Repeat("a.", 4090) + "io/x":      "at most 259",
		"containerd:" + strings.Repeat("A", 8160) + "/x": "at most 259",
		"nginx\x00":                 "control character at byte 5",
		"oci:a\nb":                  "control character",
		strings.Repeat("a", 10_000): "10000 bytes",
	} {
		ref, err := remote.Parse(in)
		if !errors.Is(err, remote.ErrInvalid) || !strings.Contains(err.Error(), part) || ref != (remote.Reference{}) {
			t.Errorf("Parse(%.80q) = %+v, %v, want %v with %q", in, ref, err, remote.ErrInvalid, part)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"nginx", "a/b:c@sha256:" + hex64, "oci:a:b/c:d", "oci-archive:x", "containerd:k8s.io/docker.io/x", "[::1]:5/x", "oci:x@sha256:" + hex64, "containerd:0A0/0", "containerd:s.io/dock_r.io/x"} {
		f.Add(s) // the last two failed once
	}
	f.Add(strings.Repeat("a.", 4091) + "io/x") // its canonical form would be too long
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := remote.Parse(s)
		if err != nil {
			if !errors.Is(err, remote.ErrInvalid) || ref != (remote.Reference{}) {
				t.Fatalf("Parse(%q) = %+v, %v", s, ref, err)
			}
			return
		}
		checkRoundTrip(t, ref)
	})
}

func TestReferenceForms(t *testing.T) {
	t.Parallel()
	c := parse(t, "containerd:default/docker.io/library/nginx:1")
	if r, ok := c.Registry(); !ok || r.String() != "docker.io/library/nginx:1" {
		t.Errorf("Registry() = %v, %v", r, ok)
	}
	if _, ok := parse(t, "containerd:sha256:"+hex64).Registry(); ok {
		t.Error("Registry() of an image ID, want none")
	}
	if _, ok := parse(t, "oci:x").Registry(); ok {
		t.Error("Registry() of a layout, want none")
	}
	if got := c.WithTag("2").String(); got != "containerd:default/docker.io/library/nginx:2" {
		t.Errorf("WithTag = %s", got)
	}
	if _, err := remote.Containerd("a/b", "nginx"); !errors.Is(err, remote.ErrInvalid) {
		t.Errorf("Containerd(a/b): %v", err)
	}
}
