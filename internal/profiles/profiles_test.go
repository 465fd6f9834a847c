package profiles_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/profiles"
	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/remote"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const platform = "linux/amd64"

// zoo copies the fixture's plain image into a layout and returns its reference and digest.
func zoo(t *testing.T) (string, digest.Digest) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "zoo")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(testenv.Fixtures(t), "oci", "source"))); err != nil {
		t.Fatal(err)
	}
	return "oci:" + dir, find(t, "oci:"+dir).Descriptor.Digest
}

func source(t *testing.T, ref string) (remote.Reference, remote.Source) {
	t.Helper()
	r, err := remote.Parse(ref)
	if err != nil {
		t.Fatal(err)
	}
	src, err := remote.OpenSource(t.Context(), r, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := src.Close(); err != nil {
			t.Error(err)
		}
	})
	return r, src
}

func find(t *testing.T, ref string) remote.Image {
	t.Helper()
	_, src := source(t, ref)
	img, err := remote.SelectNydus(t.Context(), src, platform)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// run is the profile of one run that read paths.
func run(t *testing.T, image digest.Digest, n int, paths ...string) *persist.Profile {
	t.Helper()
	l := &persist.List{
		Digest: image.String(), Platform: platform, Container: "c", Engine: "fanotify", Grade: "file",
		Started: time.Unix(1_700_000_000+int64(n), 0).UTC(), Duration: time.Second, End: "exit",
	}
	for _, p := range paths {
		l.Accesses = append(l.Accesses, trace.Access{Path: p, How: trace.Opened})
	}
	p, err := persist.NewProfile(l)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

var options = profiles.Options{Platform: platform}

func paths(p *persist.Profile) []string {
	var out []string
	for _, a := range p.List(persist.Union).Accesses {
		out = append(out, a.Path)
	}
	slices.Sort(out)
	return out
}

// Profiles that were pushed to an image are found from it, from the Nydus image that convert made of
// it, and from what optimize made of that, in a layout and in the real registry.
func TestPushPull(t *testing.T) {
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	for name, place := range map[string]func(ref string) string{
		"layout":   func(ref string) string { return ref },
		"registry": func(string) string { return r.Host + "/app" },
	} {
		t.Run(name, func(t *testing.T) {
			from, image := zoo(t)
			base := place(from)
			plain := base + ":plain"
			move(t, from, plain)
			for n, p := range []*persist.Profile{run(t, image, 1, "/app/main"), run(t, image, 2, "/bin/tool"), run(t, image, 1, "/app/main")} {
				pushed, err := profiles.Push(t.Context(), plain, p, options)
				if err != nil || pushed.Subject != image || pushed.Runs != 1 || pushed.Platform != platform {
					t.Fatalf("push %d: %+v, %v", n, pushed, err)
				}
			}
			build := builder.DefaultOptions()
			build.TempDir = t.TempDir()
			nydus, fast := base+":nydus", base+":fast"
			if _, err := convert.Run(t.Context(), convert.Options{Source: plain, Target: nydus, Platform: platform, Build: build}); err != nil {
				t.Fatal(err)
			}
			found, err := profiles.Pull(t.Context(), nydus, options)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := convert.Optimize(t.Context(), convert.OptimizeOptions{
				Source: nydus, Target: fast, Platform: platform,
				Build: builder.OptimizeOptions{List: found.Profile.List(persist.Union), TempDir: t.TempDir()},
			}); err != nil {
				t.Fatal(err)
			}
			// One more, of the Nydus image itself.
			own := run(t, find(t, nydus).Descriptor.Digest, 3, "/app/dup-in-other-layer")
			if _, err := profiles.Push(t.Context(), nydus, own, options); err != nil {
				t.Fatal(err)
			}
			for ref, want := range map[string][]string{
				plain: {"/app/main", "/bin/tool"},
				nydus: {"/app/dup-in-other-layer", "/app/main", "/bin/tool"},
				fast:  {"/app/dup-in-other-layer", "/app/main", "/bin/tool"},
			} {
				f, err := profiles.Pull(t.Context(), ref, options)
				if err != nil || len(f.Skipped) > 0 || f.Artifacts != len(want) || !slices.Equal(paths(f.Profile), want) {
					t.Errorf("pull %s: %+v, %v; want %q", ref, f, err, want)
				}
			}
		})
	}
}

// move publishes the image at from under the name to.
func move(t *testing.T, from, to string) {
	t.Helper()
	_, src := source(t, from)
	img, err := remote.Select(t.Context(), src, platform)
	if err != nil {
		t.Fatal(err)
	}
	r, err := remote.Parse(to)
	if err != nil {
		t.Fatal(err)
	}
	target, err := remote.OpenTarget(t.Context(), r, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var blobs []remote.Blob
	for _, l := range img.Layers {
		data, err := remote.ReadAll(t.Context(), src, l.Descriptor, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, remote.Document{Descriptor: l.Descriptor, Data: data}.Blob())
	}
	_, err = remote.Publish(t.Context(), target, blobs, remote.Document{Descriptor: img.Manifest.Config, Data: img.ConfigBytes},
		remote.Document{Descriptor: img.Descriptor, Data: img.ManifestBytes}, remote.PublishOptions{})
	if err := errors.Join(err, target.Close()); err != nil {
		t.Fatal(err)
	}
}

// A profile of another image or platform is refused, unless it is pushed all the same; then
// it is skipped, and named, when it is pulled. So is what is damaged.
func TestForeign(t *testing.T) {
	t.Parallel()
	ref, image := zoo(t)
	other := run(t, digest.FromString("other"), 1, "/x")
	if _, err := profiles.Push(t.Context(), ref, other, options); !errors.Is(err, profiles.ErrForeign) {
		t.Errorf("other image: %v", err)
	}
	arm := run(t, image, 1, "/x")
	arm.Runs[0].List.Platform = "linux/arm64"
	if _, err := profiles.Push(t.Context(), ref, arm, options); !errors.Is(err, profiles.ErrForeign) {
		t.Errorf("other platform: %v", err)
	}
	if _, err := profiles.Push(t.Context(), ref, &persist.Profile{}, options); !errors.Is(err, persist.ErrInvalid) {
		t.Errorf("no runs: %v", err)
	}
	if _, err := profiles.Pull(t.Context(), ref, options); !errors.Is(err, profiles.ErrNone) {
		t.Errorf("pull of nothing: %v", err)
	}
	anyway := options
	anyway.Foreign = true
	if _, err := profiles.Push(t.Context(), ref, other, anyway); err != nil {
		t.Fatal(err)
	}
	if _, err := profiles.Pull(t.Context(), ref, options); !errors.Is(err, profiles.ErrNone) || !strings.Contains(err.Error(), "a run is of image") {
		t.Errorf("pull of a foreign profile: %v", err)
	}
	r, err := remote.Parse(ref)
	if err != nil {
		t.Fatal(err)
	}
	subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: image, Size: find(t, ref).Descriptor.Size}
	for _, a := range []remote.Artifact{
		{Type: profiles.ArtifactType, Layers: []remote.Document{remote.NewDocument(profiles.MediaType, []byte("headstart-profile v1\nbroken\n"))}},
		{Type: profiles.ArtifactType, Layers: []remote.Document{remote.NewDocument("text/plain", []byte("/app/main\n"))}},
		{Type: "application/vnd.example.sbom", Layers: []remote.Document{remote.NewDocument("text/plain", []byte("x"))}},
	} {
		if _, err := remote.PushReferrer(t.Context(), r, remote.Options{}, subject, a); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := profiles.Push(t.Context(), ref, run(t, image, 2, "/app/main"), options); err != nil {
		t.Fatal(err)
	}
	f, err := profiles.Pull(t.Context(), ref, options)
	if err != nil || f.Artifacts != 1 || len(f.Skipped) != 3 || !slices.Equal(paths(f.Profile), []string{"/app/main"}) {
		t.Errorf("pull: %+v, %v", f, err)
	}
}

// A profile may be larger than a list: what Push takes, Pull reads.
func TestLarge(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("writes 140 MB")
	}
	ref, image := zoo(t)
	const runs, files, escaped = 3, 3000, 4000 // a byte takes four when it is escaped
	var all []*persist.Profile
	for n := range runs {
		var paths []string
		for i := range files {
			paths = append(paths, fmt.Sprintf("/%d%s", i, strings.Repeat("\x01", escaped)))
		}
		all = append(all, run(t, image, n, paths...))
	}
	p, err := persist.Merge(persist.MergeOptions{}, all...)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := p.WriteTo(io.Discard); err != nil || n <= persist.MaxListSize {
		t.Fatalf("profile of %d bytes, %v, want more than a list has", n, err)
	}
	if _, err := profiles.Push(t.Context(), ref, p, options); err != nil {
		t.Fatal(err)
	}
	f, err := profiles.Pull(t.Context(), ref, options)
	if err != nil || len(f.Skipped) > 0 || len(f.Profile.Runs) != runs {
		t.Errorf("pull: %d artifacts, skipped %q, %v", f.Artifacts, f.Skipped, err)
	}
}
