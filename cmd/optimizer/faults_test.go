package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// invoke runs one command line in this process.
func invoke(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	code = exitCode(&errs, run(ctx, args, strings.NewReader(""), &out, &errs))
	return code, out.String(), errs.String()
}

// ourselves returns a command line for a process of its own: this program, called
// optimizer, which TestMain knows.
func ourselves(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Args[0] = "optimizer"
	return cmd
}

// fails runs a conversion that must fail with status 1, with all of want on standard
// error, nothing on standard output, nothing in the temporary directory, and no target.
func fails(t *testing.T, want []string, args ...string) {
	t.Helper()
	temp, target := t.TempDir(), filepath.Join(t.TempDir(), "out")
	full := append([]string{"convert", "--temp-dir", temp, "--quiet", "--retries", "0", "--docker-config", emptyConfig(t)}, args...)
	if !strings.Contains(strings.Join(args, " "), "--target") {
		full = append(full, "--target", "oci:"+target)
	}
	code, out, errs := invoke(t, full...)
	for _, w := range want {
		if code != exitFailed || out != "" || !strings.Contains(errs, w) {
			t.Errorf("%v = %d, stdout %q, stderr\n%s\nwant 1 and: %s", args, code, out, errs, w)
		}
	}
	if left := files(t, temp); len(left) > 0 {
		t.Errorf("%v left in the temporary directory", left)
	}
	if left := files(t, target); len(left) > 0 {
		t.Errorf("%v left in the target", left)
	}
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, p)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return out
}

func emptyConfig(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(name, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// layout is an OCI layout that is made for a test.
type layout struct {
	t   *testing.T
	dir string
}

func (l layout) put(mediaType string, data []byte) ocispec.Descriptor {
	l.t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := os.MkdirAll(filepath.Join(l.dir, "blobs", "sha256"), 0o755); err != nil {
		l.t.Fatal(err)
	}
	l.replace(d, data)
	return d
}

// replace puts data where the content of d is, whatever its digest.
func (l layout) replace(d ocispec.Descriptor, data []byte) {
	l.t.Helper()
	if err := os.WriteFile(filepath.Join(l.dir, "blobs", "sha256", d.Digest.Encoded()), data, 0o644); err != nil {
		l.t.Fatal(err)
	}
}

func (l layout) putJSON(mediaType string, v any) ocispec.Descriptor {
	l.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.put(mediaType, b)
}

// newImage makes a layout with one image of one tar layer.
func newImage(t *testing.T, layer []byte) (l layout, desc ocispec.Descriptor) {
	t.Helper()
	l = layout{t, filepath.Join(t.TempDir(), "image")}
	desc = l.put(ocispec.MediaTypeImageLayer, layer)
	config := l.putJSON(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{desc.Digest}},
	})
	manifest := l.putJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config, Layers: []ocispec.Descriptor{desc},
	})
	manifest.Annotations = map[string]string{ocispec.AnnotationRefName: "v1"}
	manifest.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	for name, v := range map[string]any{
		"index.json": ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{manifest}},
		"oci-layout": ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion},
	} {
		b, err := json.Marshal(v)
		if err == nil {
			err = os.WriteFile(filepath.Join(l.dir, name), b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return l, desc
}

func tarOf(t *testing.T, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		h.ModTime, h.Mode = time.Unix(1700000000, 0), 0o755
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(bytes.Repeat([]byte{'x'}, int(h.Size))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestBadLayers(t *testing.T) {
	t.Parallel()
	good := tarOf(t, tar.Header{Name: "bin/", Typeflag: tar.TypeDir}, tar.Header{Name: "bin/app", Typeflag: tar.TypeReg, Size: 5000})
	flipped := bytes.Clone(good)
	flipped[3000] ^= 1
	for name, stored := range map[string]struct {
		data []byte
		want string
	}{
		"truncated":    {good[:2000], "digest mismatch"},
		"oversized":    {append(bytes.Clone(good), 0), "digest mismatch"},
		"wrong digest": {flipped, "digest mismatch"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, desc := newImage(t, good)
			l.replace(desc, stored.data)
			fails(t, []string{stored.want, "layer 0 (" + desc.Digest.String() + ")"}, "--source", "oci:"+l.dir+":v1")
		})
	}
	for name, c := range map[string]struct {
		layer []byte
		want  string
	}{
		"cut tar":  {good[:1024+2048], "the archive is cut off"},
		"no tar":   {bytes.Repeat([]byte("nonsense"), 512), "tar"},
		"escaping": {tarOf(t, tar.Header{Name: "../../etc/passwd", Typeflag: tar.TypeReg, Size: 1}), "../../etc/passwd"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, _ := newImage(t, c.layer)
			fails(t, []string{"layer 0", c.want}, "--source", "oci:"+l.dir+":v1")
		})
	}
}

// badRegistry answers every request below /v2/ as answer does.
func badRegistry(t *testing.T, answer http.HandlerFunc) (host string, requests *atomic.Int64) {
	t.Helper()
	requests = new(atomic.Int64)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		answer(w, r)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://"), requests
}

func TestBadRegistries(t *testing.T) {
	t.Parallel()
	status := func(code int, header ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if len(header) == 2 {
				w.Header().Set(header[0], header[1])
			}
			w.WriteHeader(code)
		}
	}
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   []string
	}{
		"401": {status(401, "WWW-Authenticate", `Basic realm="x"`), []string{"pull manifest v1: 401 Unauthorized: authorization failed: no basic auth credentials", "log in with 'docker login'"}},
		"403": {status(403), []string{"pull manifest v1: 403 Forbidden", "log in with 'docker login'"}},
		"404": {status(404), []string{"pull manifest v1: 404 Not Found"}},
		"429": {status(429), []string{"pull manifest v1: 429 Too Many Requests"}},
		"500": {status(500), []string{"pull manifest v1: 500 Internal Server Error"}},
		"hang": {func(_ http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
		}, []string{"pull manifest v1: stalled: "}},
		"garbage": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			_, _ = w.Write([]byte("<html>"))
		}, []string{"invalid"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			host, requests := badRegistry(t, c.answer)
			fails(t, append(c.want, host+"/app:v1"), "--plain-http", "--stall-timeout", "300ms", "--source", host+"/app:v1")
			if requests.Load() == 0 {
				t.Error("the registry was not asked")
			}
		})
	}
}

// A target that fails at any step fails the conversion and never gets a name.
func TestBadTargets(t *testing.T) {
	t.Parallel()
	l, _ := newImage(t, tarOf(t, tar.Header{Name: "app", Typeflag: tar.TypeReg, Size: 5000}))
	source := "oci:" + l.dir + ":v1"
	for _, method := range []string{http.MethodPost, http.MethodPatch + " " + http.MethodPut, "manifest"} {
		t.Run(method, func(t *testing.T) {
			t.Parallel()
			real := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
			var named atomic.Bool
			host, _ := badRegistry(t, func(w http.ResponseWriter, r *http.Request) {
				isManifest := strings.Contains(r.URL.Path, "/manifests/") && r.Method == http.MethodPut
				if method == "manifest" && isManifest || method != "manifest" && !isManifest && strings.Contains(method, r.Method) {
					w.WriteHeader(http.StatusInternalServerError)
					return
				}
				named.Store(named.Load() || isManifest)
				real.ServeHTTP(w, r)
			})
			fails(t, []string{"publish " + host + "/app:v2: "}, "--plain-http", "--source", source, "--target="+host+"/app:v2")
			if named.Load() {
				t.Error("a manifest was pushed")
			}
		})
	}
}

// Against a registry that works: convert, check, inspect, unpack.
func TestRegistryRoundTrip(t *testing.T) {
	t.Parallel()
	host, _ := badRegistry(t, registry.New(registry.Logger(log.New(io.Discard, "", 0))).ServeHTTP)
	l, _ := newImage(t, tarOf(t, tar.Header{Name: "app", Typeflag: tar.TypeReg, Size: 5000}))
	ref := host + "/team/app:v2"
	code, out, errs := invoke(t, "convert", "oci:"+l.dir+":v1", ref, "--plain-http")
	if code != 0 || !strings.HasPrefix(out, "sha256:") {
		t.Fatalf("convert = %d, %q, %s", code, out, errs)
	}
	if code, out, errs := invoke(t, "check", ref, "--plain-http"); code != 0 || !strings.Contains(out, ": ok: ") {
		t.Errorf("check = %d, %q, %s", code, out, errs)
	}
	if code, out, errs := invoke(t, "inspect", ref, "--plain-http", "-o", "json"); code != 0 || !strings.Contains(out, `"files": 1`) {
		t.Errorf("inspect = %d, %q, %s", code, out, errs)
	}
	code, out, errs = invoke(t, "unpack", ref, "--plain-http", "--output", "-", "--quiet")
	if code != 0 || !strings.Contains(out, strings.Repeat("x", 5000)) || errs != "" {
		t.Errorf("unpack = %d, %d bytes, %s", code, len(out), errs)
	}
}

// An interrupt, or the end of the terminal, ends a conversion that waits, with status 1 and nothing left.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			if sig == syscall.SIGHUP && signal.Ignored(sig) {
				t.Skip("SIGHUP is ignored, as under nohup: programs leave it so")
			}
			interrupt(t, sig)
		})
	}
}

// interrupt sends sig to a conversion that waits for its target.
func interrupt(t *testing.T, sig os.Signal) {
	t.Helper()
	asked := make(chan struct{}, 16)
	host, _ := badRegistry(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.WriteHeader(http.StatusNotFound) // whether it has the image or a blob
			return
		}
		asked <- struct{}{}
		<-r.Context().Done()
	})
	l, _ := newImage(t, tarOf(t, tar.Header{Name: "app", Typeflag: tar.TypeReg, Size: 5000}))
	temp := t.TempDir()
	var errs bytes.Buffer
	cmd := ourselves("convert", "oci:"+l.dir+":v1", host+"/app:v2", "--plain-http", "--temp-dir", temp)
	cmd.Stderr = &errs
	wait := testenv.Start(t, cmd)
	<-asked
	if len(files(t, temp)) == 0 {
		t.Error("no temporary files while it is published: the test looks at the wrong place")
	}
	if err := cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	if exit, ok := errors.AsType[*exec.ExitError](wait()); !ok || exit.ExitCode() != exitFailed || !strings.HasPrefix(lastLine(errs.String()), "optimizer: interrupted: ") {
		t.Errorf("status %v, stderr %s, want 1 and interrupted", exit, errs.String())
	}
	if left := files(t, temp); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// A full disk: as temporary directory, as target, under an archive.
func TestFullDisk(t *testing.T) {
	testenv.Root(t)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: "big", Typeflag: tar.TypeReg, Size: 4 << 20, Mode: 0o644})
	if err == nil {
		_, err = w.Write(noise(4 << 20))
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	l, _ := newImage(t, b.Bytes())
	source := "oci:" + l.dir + ":v1"
	good := filepath.Join(t.TempDir(), "good")
	if code, _, errs := invoke(t, "convert", "-q", source, "oci:"+good+":v2"); code != 0 {
		t.Fatal(errs)
	}
	full := t.TempDir()
	target := filepath.Join(t.TempDir(), "out")
	testenv.MountNamespace(t, func() error {
		if err := unix.Mount("tmpfs", full, "tmpfs", 0, "size=1m"); err != nil {
			return err
		}
		for i, args := range [][]string{
			{"convert", "-q", source, "oci:" + target + ":v2", "--temp-dir", full},
			{"convert", "-q", source, "oci:" + full + "/out:v2"},
			{"convert", "-q", source, "oci-archive:" + full + "/out.tar"},
			{"unpack", "-q", "oci:" + good + ":v2", full + "/root"},
			{"unpack", "-q", "oci:" + good + ":v2", "-o", full + "/root.tar"},
		} {
			hint := "make room where the result goes"
			if i == 0 {
				hint = "make room, or choose another place for temporary files"
			}
			var errs bytes.Buffer
			cmd := ourselves(args...)
			cmd.Stderr = &errs
			err := cmd.Run()
			if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != exitFailed ||
				!strings.Contains(errs.String(), "no space left on device") || !strings.Contains(errs.String(), hint) {
				return fmt.Errorf("%v = %w, stderr %s", args, err, errs.String())
			}
			t.Logf("%s: %s", args[0], strings.SplitN(errs.String(), "\n", 2)[0])
			for _, f := range files(t, full) {
				// Blobs that no index names are no image; the next conversion finds them there.
				if rel := f[len(full):]; !strings.HasPrefix(rel, "/out/blobs/sha256/") && rel != "/out/oci-layout" {
					return fmt.Errorf("%v left %s", args, rel)
				}
			}
			if err := os.RemoveAll(full + "/out"); err != nil {
				return err
			}
		}
		return nil
	})
	if left := files(t, target); len(left) > 0 {
		t.Errorf("left in the target: %v", left)
	}
}

// noise returns n bytes that do not compress, always the same.
func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b) // never fails
	return b
}

// One flipped bit, anywhere in an image, is found by check.
func TestCheckFindsFlippedBits(t *testing.T) {
	t.Parallel()
	l, _ := newImage(t, tarOf(t, tar.Header{Name: "app", Typeflag: tar.TypeReg, Size: 9000}, tar.Header{Name: "d/", Typeflag: tar.TypeDir}))
	out := filepath.Join(t.TempDir(), "out")
	list := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(list, []byte("/app\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := invoke(t, "convert", "-q", "oci:"+l.dir+":v1", "oci:"+out+":v2", "--chunk-size", "4KiB", "--profile", list); code != 0 {
		t.Fatal(errs)
	}
	check := func() (int, string) {
		code, _, errs := invoke(t, "check", "-q", "oci:"+out+":v2")
		return code, errs
	}
	if code, errs := check(); code != 0 {
		t.Fatal(errs)
	}
	flips := 0
	for _, name := range files(t, filepath.Join(out, "blobs")) {
		good, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 150 {
			bad := bytes.Clone(good)
			at := i * len(bad) / 150
			bad[at] ^= 1 << (i % 8)
			if err := os.WriteFile(name, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			if code, errs := check(); code != exitFailed {
				t.Errorf("bit %d of byte %d of %s flipped: status %d, %s", i%8, at, filepath.Base(name), code, errs)
			}
			flips++
		}
		for _, bad := range [][]byte{good[:len(good)-1], append(bytes.Clone(good), 0), nil} {
			if err := os.WriteFile(name, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			if code, errs := check(); code != exitFailed {
				t.Errorf("%s of %d bytes instead of %d: status %d, %s", filepath.Base(name), len(bad), len(good), code, errs)
			}
		}
		if err := os.WriteFile(name, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if code, errs := check(); code != 0 || flips < 4*150 {
		t.Errorf("%d flips; whole again: %d, %s", flips, code, errs)
	}
}
