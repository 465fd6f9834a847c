package rebuild_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/rebuild"
)

func TestTargetOf(t *testing.T) {
	const hex = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	layout := rebuild.Options{Target: rebuild.TargetLayout, LayoutDir: "/p/optimized", Reference: rebuild.DefaultReference}
	registry := rebuild.Options{Target: rebuild.TargetRegistry, Reference: rebuild.DefaultReference}
	ctr := rebuild.Options{Target: rebuild.TargetContainerd, ContainerdNamespace: "k8s.io", Reference: rebuild.DefaultReference}
	with := func(o rebuild.Options, reference string) rebuild.Options { o.Reference = reference; return o }
	for _, tc := range []struct {
		ref  string
		o    rebuild.Options
		want string // empty: an error
	}{
		{"docker.io/library/nginx:latest", layout, "oci:/p/optimized:nginx_latest-optimized"},
		{"nginx", layout, "oci:/p/optimized:nginx_latest-optimized"},
		{"ghcr.io/a_b/c:1", layout, "oci:/p/optimized:ghcr.io_a__b_c_1-optimized"},
		{"localhost:5000/a/b:1", layout, "oci:/p/optimized:localhost_5000_a_b_1-optimized"},
		{"nginx@sha256:" + hex, layout, "oci:/p/optimized:nginx_sha256-001122334455-optimized"},
		{"nginx:1.27@sha256:" + hex, layout, "oci:/p/optimized:nginx_1.27-optimized"},
		{"docker.io/library/nginx:latest", registry, "docker.io/library/nginx:latest-optimized"},
		{"localhost:5000/a/b:1", registry, "localhost:5000/a/b:1-optimized"},
		{"nginx@sha256:" + hex, registry, "docker.io/library/nginx:sha256-001122334455-optimized"},
		{"nginx", with(registry, "mirror.example/x/{repository}:{tag}-{digest}-{platform}"), "mirror.example/x/library/nginx:latest-001122334455-linux-amd64"},
		{"nginx", ctr, "containerd:k8s.io/docker.io/library/nginx:latest-optimized"},
		{"nginx", with(registry, "docker.io/library/nginx:latest"), ""},
		{"nginx", with(registry, "{registry}/{repository}"), ""},
		{"nginx", with(registry, "{registry}/{repository}@{digest}"), ""},
		{"nginx:" + strings.Repeat("x", 125), registry, ""},
		{"sha256:" + hex, layout, ""},
		{"", layout, ""},
		{"UPPER", layout, ""},
	} {
		got, err := rebuild.TargetOf(rebuild.Image{Reference: tc.ref, Digest: "sha256:" + hex, Platform: "linux/amd64"}, &tc.o)
		if got != tc.want || (err != nil) != (tc.want == "") {
			t.Errorf("TargetOf(%s, %s) = %q, %v, want %q", tc.ref, tc.o.Reference, got, err, tc.want)
		}
		if err != nil && !errors.Is(err, rebuild.ErrReference) {
			t.Errorf("%v is not ErrReference", err)
		}
	}
	long := "registry.example/" + strings.Repeat("very-long-name/", 12) + "x:1"
	got, err := rebuild.TargetOf(rebuild.Image{Reference: long, Digest: "sha256:" + hex}, &layout)
	if tag := got[strings.LastIndexByte(got, ':')+1:]; err != nil || len(tag) != 128 {
		t.Errorf("TargetOf(long) = %q (%d), %v", got, len(tag), err)
	}
}

func FuzzJob(f *testing.F) {
	f.Add([]byte(`{"version":1,"key":"0123456789abcdef01234567-0123456789ab","image":{"reference":"nginx","digest":"sha256:x","platform":"linux/amd64"},"list":"/l","target":"oci:/x:y","options":{"timeout":1}}`))
	f.Add([]byte(`{"version":1,"key":"../x"}`))
	f.Add([]byte(`{`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		name := filepath.Join(dir, "job.json")
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := rebuild.ReadJob(name)
		if err == nil && (len(j.Key) != 37 || strings.ContainsAny(j.Key, "./")) {
			t.Errorf("accepted key %q", j.Key)
		}
		if err != nil && j.Key != "" {
			t.Errorf("not the zero value: %+v", j)
		}
	})
}
