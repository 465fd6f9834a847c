package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/workload"
)

// image is one workload in the registry, as every mode wants it. All are made of the same layers.
type image struct {
	name   string
	config ocispec.ImageConfig
	source *workload.Image
	// plain, lazy and fast are tags of the repository name: the plain image, the Nydus image, and that with our
	// prefetch blob.
	plain, lazy, fast string
	peer              peerImage

	prefetch  convert.Prefetch // of fast
	bootstrap int64            // bytes of its bootstrap layer, as stored
}

// recordLimit is how long a start is recorded, in seconds; servers are stopped then.
const recordLimit = "6"

// prepare records a start of the workload and puts its images into the registry.
func (b *bench) prepare(ctx context.Context, name workload.Name) (*image, error) {
	source, err := workload.Build(ctx, name, workload.Options{Log: b.log})
	if err != nil {
		return nil, err
	}
	img := &image{name: string(name), config: source.Config.Config, source: source, plain: "plain", lazy: "lazy", fast: "fast"}
	if err := b.pushPlain(ctx, img); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(b.dir, "images-")
	if err != nil {
		return nil, err
	}
	list, err := b.record(ctx, dir, "oci:"+source.Dir)
	if err != nil {
		return nil, err
	}
	convertTo := func(tag string, more ...string) (sum convert.Summary, err error) {
		args := append([]string{"convert", "--quiet", "--plain-http", "--temp-dir", dir, "-o", "json"}, more...)
		out, err := b.command(ctx, nil, b.optimizer, append(args, "oci:"+source.Dir, b.registry.Host+"/"+img.name+":"+tag)...)
		if err == nil {
			err = json.Unmarshal(out, &sum)
		}
		return sum, err
	}
	if _, err := convertTo(img.lazy); err != nil {
		return nil, err
	}
	sum, err := convertTo(img.fast, "--chunk-size", "64KiB", "--profile", list)
	if err != nil {
		return nil, err
	}
	img.prefetch = sum.Prefetch
	if img.bootstrap, err = b.bootstrapLayer(ctx, img, img.fast); err != nil {
		return nil, err
	}
	if strings.Contains(strings.Join(b.modes, ","), "nydusd") {
		if img.peer, err = b.makePeer(ctx, img, dir, list); err != nil {
			return nil, fmt.Errorf("nydus-image: %w", err)
		}
	}
	return img, nil
}

// record records some starts of an image, which differ where programs have threads, and returns their profile.
func (b *bench) record(ctx context.Context, dir, ref string) (profile string, err error) {
	var lists []string
	for n := range b.recordings {
		list := filepath.Join(dir, fmt.Sprint("list", n))
		if _, err := b.command(ctx, nil, b.optimizer, "record", "--quiet", "--server-path", b.server, "-o", list, "--timeout", recordLimit+"s", "--scratch", dir, ref); err != nil {
			return "", err
		}
		lists = append(lists, list)
	}
	profile = filepath.Join(dir, "profile")
	_, err = b.command(ctx, nil, b.optimizer, append([]string{"profile", "merge", "--quiet", "-o", profile}, lists...)...)
	return profile, err
}

func (b *bench) pushPlain(ctx context.Context, img *image) error {
	index, err := layout.ImageIndexFromPath(img.source.Dir)
	if err != nil {
		return err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	if len(manifest.Manifests) != 1 {
		return fmt.Errorf("%s has %d manifests, want one", img.source.Dir, len(manifest.Manifests))
	}
	plain, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		return err
	}
	_, err = b.registry.Push(ctx, img.name, img.plain, plain)
	return err
}

// bootstrapLayer returns the stored size of the last layer of a Nydus image.
func (b *bench) bootstrapLayer(ctx context.Context, img *image, tag string) (int64, error) {
	c := newRegistryClient(b.registry.Host, img.name)
	defer c.close()
	m, err := c.manifest(ctx, tag)
	if err != nil {
		return 0, err
	}
	return m.Layers[len(m.Layers)-1].Size, nil
}

// command runs a program with the given standard input and returns its standard output.
func (b *bench) command(ctx context.Context, stdin []byte, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var said bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(stdin), &said
	out, err := cmd.Output()
	if err != nil {
		text := said.Bytes()
		return nil, fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, text[max(0, len(text)-2000):])
	}
	return out, nil
}
