package workload

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// layoutVersion is part of every recipe's hash; it changes with the code that writes layers.
const layoutVersion = "headstart-workload-4"

// imageNameAnnotation is the full image name in an index, as containerd's importer reads it.
const imageNameAnnotation = "io.containerd.image.name"

// Image is an image of this package in an OCI layout. It is immutable.
type Image struct {
	Dir       string // the OCI layout
	Reference string // full image name, with tag
	Manifest  ocispec.Manifest
	Target    ocispec.Descriptor // of the manifest
	Config    ocispec.Image
}

// Open reads the image in the OCI layout at dir; the layout holds one manifest.
func Open(dir string) (*Image, error) {
	img := &Image{Dir: dir}
	var index ocispec.Index
	if err := readJSON(filepath.Join(dir, "index.json"), &index); err != nil {
		return nil, err
	}
	if len(index.Manifests) != 1 {
		return nil, fmt.Errorf("open %s: index has %d manifests, want 1", dir, len(index.Manifests))
	}
	img.Target = index.Manifests[0]
	img.Reference = img.Target.Annotations[imageNameAnnotation]
	if err := readJSON(img.blobPath(img.Target.Digest), &img.Manifest); err != nil {
		return nil, err
	}
	if err := readJSON(img.blobPath(img.Manifest.Config.Digest), &img.Config); err != nil {
		return nil, err
	}
	return img, nil
}

// Tag returns the tag of the image in its layout, as in "oci:DIR:TAG".
func (i *Image) Tag() string { return i.Target.Annotations[ocispec.AnnotationRefName] }

// Command returns the argument vector that the image's configuration says to run.
func (i *Image) Command() []string {
	argv := append([]string(nil), i.Config.Config.Entrypoint...)
	return append(argv, i.Config.Config.Cmd...)
}

// Size returns the bytes of the image as a registry stores it: manifest, config, layers.
func (i *Image) Size() int64 {
	n := i.Target.Size + i.Manifest.Config.Size
	for _, l := range i.Manifest.Layers {
		n += l.Size
	}
	return n
}

// Layer returns the stored (gzip) bytes of layer n, counted from the base. The caller
// closes it.
func (i *Image) Layer(n int) (io.ReadCloser, error) {
	if n < 0 || n >= len(i.Manifest.Layers) {
		return nil, fmt.Errorf("layer %d of %s: it has %d", n, i.Reference, len(i.Manifest.Layers))
	}
	return os.Open(i.blobPath(i.Manifest.Layers[n].Digest))
}

// WriteArchive writes the layout as one tar stream, the form that container runtimes
// import ("oci-archive").
func (i *Image) WriteArchive(w io.Writer) error {
	tw := tar.NewWriter(w)
	digests := []digest.Digest{i.Target.Digest, i.Manifest.Config.Digest}
	for _, l := range i.Manifest.Layers {
		digests = append(digests, l.Digest)
	}
	names := []string{"oci-layout", "index.json"}
	seen := map[digest.Digest]bool{}
	for _, d := range digests {
		if !seen[d] {
			seen[d] = true
			names = append(names, "blobs/"+d.Algorithm().String()+"/"+d.Encoded())
		}
	}
	for _, name := range names {
		if err := addFile(tw, filepath.Join(i.Dir, name), name); err != nil {
			return fmt.Errorf("archive %s: %w", i.Reference, err)
		}
	}
	return tw.Close()
}

func (i *Image) blobPath(d digest.Digest) string {
	return filepath.Join(i.Dir, "blobs", d.Algorithm().String(), d.Encoded())
}

func addFile(tw *tar.Writer, path, name string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: info.Size(), Mode: 0o644}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(tw, f)
	return err
}

func readJSON(path string, v any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// layoutWriter collects layers and a configuration and writes them as an OCI layout.
type layoutWriter struct {
	dir    string
	log    io.Writer
	layers []ocispec.Descriptor
	config ocispec.Image
}

func newLayoutWriter(dir string, log io.Writer) (*layoutWriter, error) {
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return nil, err
	}
	w := &layoutWriter{dir: dir, log: log}
	w.config.Architecture = runtime.GOARCH
	w.config.OS = runtime.GOOS
	w.config.RootFS.Type = "layers"
	w.config.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return w, nil
}

// layer adds a gzip layer with the entries that fill writes.
func (w *layoutWriter) layer(what string, fill func(tw *tar.Writer) error) error {
	start := time.Now()
	f, err := os.CreateTemp(w.dir, "layer-")
	if err != nil {
		return err
	}
	stored, raw := digest.SHA256.Digester(), digest.SHA256.Digester()
	size := &counter{}
	zw := gzip.NewWriter(io.MultiWriter(f, stored.Hash(), size))
	tw := tar.NewWriter(io.MultiWriter(zw, raw.Hash()))
	err = fill(tw)
	if err == nil {
		err = tw.Close()
	}
	if err == nil {
		err = zw.Close()
	}
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return fmt.Errorf("layer %s: %w", what, err)
	}
	d := stored.Digest()
	if err := os.Rename(f.Name(), filepath.Join(w.dir, "blobs", "sha256", d.Encoded())); err != nil {
		return err
	}
	w.add(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: d, Size: size.n}, raw.Digest())
	fmt.Fprintf(w.log, "workload: layer %s: %.1f MB in %.1f s\n", what, float64(size.n)/1e6, time.Since(start).Seconds())
	return nil
}

// copyLayers adds the layers of img, as a base.
func (w *layoutWriter) copyLayers(img *Image) error {
	for n, l := range img.Manifest.Layers {
		to := filepath.Join(w.dir, "blobs", "sha256", l.Digest.Encoded())
		if err := os.Link(img.blobPath(l.Digest), to); err != nil {
			return fmt.Errorf("share base layer: %w", err)
		}
		w.add(l, img.Config.RootFS.DiffIDs[n])
	}
	return nil
}

func (w *layoutWriter) add(d ocispec.Descriptor, diffID digest.Digest) {
	w.layers = append(w.layers, d)
	w.config.RootFS.DiffIDs = append(w.config.RootFS.DiffIDs, diffID)
}

// finish writes configuration, manifest, index and layout file; reference is
// "repository:tag".
func (w *layoutWriter) finish(reference string) error {
	config, err := w.blob(ocispec.MediaTypeImageConfig, w.config)
	if err != nil {
		return err
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config, Layers: w.layers,
	}
	target, err := w.blob(ocispec.MediaTypeImageManifest, m)
	if err != nil {
		return err
	}
	target.Platform = &ocispec.Platform{OS: w.config.OS, Architecture: w.config.Architecture}
	target.Annotations = map[string]string{
		imageNameAnnotation:       reference,
		ocispec.AnnotationRefName: tagOf(reference),
	}
	index := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{target},
	}
	data, err := json.Marshal(index)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(w.dir, "index.json"), data, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(w.dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

func (w *layoutWriter) blob(mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := digest.FromBytes(data)
	err = os.WriteFile(filepath.Join(w.dir, "blobs", "sha256", d.Encoded()), data, 0o644)
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}, err
}

func tagOf(reference string) string {
	for i := len(reference) - 1; i >= 0 && reference[i] != '/'; i-- {
		if reference[i] == ':' {
			return reference[i+1:]
		}
	}
	return "latest"
}

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

// entry is one file of a layer that is made up rather than copied from a directory.
type entry struct {
	name   string // without the leading slash
	mode   int64
	data   []byte
	header tar.Header // Typeflag and what else the type needs; the rest is filled in
}

// writeEntries writes entries and the directories above them, owned by root and with one
// fixed time, in the given order.
func writeEntries(tw *tar.Writer, entries []entry) error {
	made := map[string]bool{".": true}
	for _, e := range entries {
		if e.header.Typeflag == tar.TypeDir {
			made[filepath.Clean(e.name)] = true
		}
	}
	for _, e := range entries {
		for _, dir := range parents(e.name) {
			if made[dir] {
				continue
			}
			made[dir] = true
			h := &tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: fixedTime()}
			if err := tw.WriteHeader(h); err != nil {
				return err
			}
		}
		h := e.header
		h.Name, h.Mode, h.Size, h.Format = e.name, e.mode, int64(len(e.data)), tar.FormatPAX
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.ModTime.IsZero() {
			h.ModTime = fixedTime()
		}
		if err := tw.WriteHeader(&h); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
		if _, err := tw.Write(e.data); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
	}
	return nil
}

// parents returns the directories above name, outermost first.
func parents(name string) []string {
	var dirs []string
	for dir := filepath.Dir(filepath.Clean(name)); dir != "." && dir != "/"; dir = filepath.Dir(dir) {
		dirs = append(dirs, dir)
	}
	sort.Strings(dirs)
	return dirs
}

func fixedTime() time.Time { return time.Unix(1700000000, 0) }
