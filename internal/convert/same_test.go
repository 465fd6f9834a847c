package convert_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/testenv"
)

// A target that would replace the source is refused, however it is spelled, and the source
// stays as it is.
func TestTargetIsSource(t *testing.T) {
	dir := t.TempDir()
	layout, link, archive := filepath.Join(dir, "layout"), filepath.Join(dir, "link"), filepath.Join(dir, "a.tar")
	if err := os.CopyFS(layout, os.DirFS(filepath.Join(testenv.Fixtures(t), "oci", "source"))); err != nil {
		t.Fatal(err)
	}
	index := filepath.Join(layout, "index.json")
	before, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	// The fixture's entry has no name.
	const tag = "src"
	before = bytes.Replace(before, []byte(`"artifactType"`), []byte(`"annotations": {"org.opencontainers.image.ref.name": "src"}, "artifactType"`), 1)
	if err := os.WriteFile(index, before, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("layout", link); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("tar", "-cf", archive, "-C", layout, ".").CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	packed, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, source, target string }{
		{"same", "oci:" + layout + ":" + tag, "oci:" + layout + ":" + tag},
		{"other spelling", "oci:" + layout + ":" + tag, "oci:" + dir + "/./layout/../layout:" + tag},
		{"symlink", "oci:" + layout + ":" + tag, "oci:" + link + ":" + tag},
		{"source without tag", "oci:" + layout, "oci:" + layout + ":" + tag},
		{"archive, other tag", "oci-archive:" + archive + ":" + tag, "oci-archive:" + archive + ":other"},
		{"archive, other spelling", "oci-archive:" + archive, "oci-archive:" + dir + "/./a.tar"},
	} {
		o := options(t, c.target)
		o.Source = c.source
		if _, err := convert.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "it is the source, and would replace it") {
			t.Errorf("%s: Run(%s, %s) = %v, want a refusal", c.name, c.source, c.target, err)
		}
	}
	for file, want := range map[string][]byte{index: before, archive: packed} {
		if got, err := os.ReadFile(file); err != nil || string(got) != string(want) {
			t.Errorf("%s has changed (%v)", file, err)
		}
	}
	o := options(t, "oci:"+link+":other")
	o.Source = "oci:" + layout
	if _, err := convert.Run(t.Context(), o); err != nil {
		t.Errorf("another tag of the same layout: %v", err)
	}
}
