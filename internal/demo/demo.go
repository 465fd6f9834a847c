package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/tools"
	"github.com/headstart-oci/headstart/internal/workload"
	"github.com/headstart-oci/headstart/pkg/persist"
)

const (
	pluginName = "02-optimizer-nri-plugin"
	waitLimit  = 10 * time.Minute // for a rebuild
	listLimit  = time.Minute      // for the list of a run that has ended
)

// demo holds what the steps share.
type demo struct {
	options
	dir string // results; stays
	out io.Writer
	log io.Writer

	env                       *testcri.Env
	plugin, server, optimizer string // our programs

	ref      string // of the workload in containerd
	manifest ocispec.Manifest
	size     int64 // bytes of the image as a registry stores it
	endless  bool  // the workload had to be stopped
}

// say prints a step.
func (d *demo) say(format string, a ...any) { fmt.Fprintf(d.out, "==> "+format+"\n", a...) }

// close takes everything down; it is called on every path.
func (d *demo) close() error {
	if d.env == nil {
		return nil
	}
	if err := d.env.Close(); err != nil {
		return fmt.Errorf("take the demo down: %w", err)
	}
	d.say("containerd is down; nothing is left running or mounted")
	if left, err := os.ReadDir(d.dir); err == nil && len(left) <= 1 { // the lock
		return os.RemoveAll(d.dir)
	}
	d.say("list and image stay in %s until the next demo", d.dir)
	return nil
}

// start builds our programs and starts containerd.
func (d *demo) start(ctx context.Context) (err error) {
	d.say("build optimizer-nri-plugin, optimizer-server and optimizer from this tree")
	for path, pkg := range map[*string]string{
		&d.plugin: "./cmd/optimizer-nri-plugin", &d.server: "./cmd/optimizer-server", &d.optimizer: "./cmd/optimizer",
	} {
		if *path, err = tools.BuildCommand(ctx, pkg); err != nil {
			return err
		}
	}
	d.say("start a private containerd (the first time its tools are built, which takes minutes)")
	d.env, err = testcri.Start(ctx, testcri.Options{Out: d.log})
	return err
}

// prepare brings the image into containerd.
func (d *demo) prepare(ctx context.Context) error {
	switch rest, layout := strings.CutPrefix(d.image, "oci:"); {
	case d.image == "":
		d.say("make an image from this machine's Go toolchain")
		img, err := workload.Build(ctx, workload.GoTool, workload.Options{Log: d.log})
		if err != nil {
			return err
		}
		d.ref = img.Reference
		if err := d.env.ImportOCI(ctx, img.Dir, d.ref); err != nil {
			return err
		}
	case layout:
		dir, _, _ := strings.Cut(rest, ":")
		d.ref = "docker.io/demo/" + strings.ToLower(filepath.Base(dir)) + ":latest"
		d.say("import %s as %s", dir, d.ref)
		if err := d.env.ImportOCI(ctx, dir, d.ref); err != nil {
			return err
		}
	default:
		named, err := reference.ParseDockerRef(d.image)
		if err != nil {
			return fmt.Errorf("IMAGE=%s: %w", d.image, err)
		}
		d.ref = named.String()
		d.say("pull %s", d.ref)
		if _, err := d.env.Pull(ctx, d.ref); err != nil {
			return err
		}
	}
	return d.describe(ctx)
}

// describe reads the image's manifest from containerd.
func (d *demo) describe(ctx context.Context) error {
	ctx = namespaces.WithNamespace(ctx, testcri.Namespace)
	img, err := d.env.Client().GetImage(ctx, d.ref)
	if err != nil {
		return err
	}
	d.manifest, err = images.Manifest(ctx, d.env.Client().ContentStore(), img.Target(), img.Platform())
	if err != nil {
		return fmt.Errorf("read the manifest of %s: %w", d.ref, err)
	}
	d.size = d.manifest.Config.Size
	for _, l := range d.manifest.Layers {
		d.size += l.Size
	}
	what := "its own command"
	if len(d.cmd) > 0 {
		what = strings.Join(d.cmd, " ")
	} else if spec, err := img.Spec(ctx); err == nil {
		what = strings.Join(append(slices.Clone(spec.Config.Entrypoint), spec.Config.Cmd...), " ")
	}
	d.say("image %s: %d layers, %.1f MB; it runs: %s", d.ref, len(d.manifest.Layers), mega(d.size), what)
	return d.checkUnpacked(ctx, img)
}

func (d *demo) checkUnpacked(ctx context.Context, img containerd.Image) error {
	ok, err := img.IsUnpacked(ctx, "overlayfs")
	if err == nil && !ok {
		err = errors.New("not unpacked")
	}
	return err
}

// dropPlugin installs the plugin as the README says and restarts containerd.
func (d *demo) dropPlugin(ctx context.Context) error {
	d.say("drop %s into the NRI plugin directory, its configuration beside it, restart containerd", pluginName)
	server := filepath.Join(d.env.Dir(), "optimizer-server")
	if err := copyProgram(d.server, server); err != nil {
		return err
	}
	config := fmt.Sprintf("persist_dir = %q\nserver_path = %q\ncontainerd_address = %q\nlog_file = %q\n",
		d.dir, server, d.env.Address(), filepath.Join(d.dir, "plugin.log"))
	if err := os.WriteFile(filepath.Join(d.env.PluginConfigDir(), pluginName+".conf"), []byte(config), 0o644); err != nil {
		return err
	}
	if err := d.env.InstallPlugin(pluginName, d.plugin); err != nil {
		return err
	}
	return d.env.Restart(ctx)
}

// product is what the plugin made of the first run.
type product struct {
	path   string // of the list
	list   *persist.List
	result rebuild.Result
}

// rebuilt waits for the list of the first traced run and for the rebuilt image.
func (d *demo) rebuilt(ctx context.Context, f figures) (product, error) {
	ctx, cancel := context.WithTimeout(ctx, waitLimit)
	defer cancel()
	d.say("wait for the access list and the rebuilt image")
	path, err := d.listOf(ctx, f.first)
	if err != nil {
		return product{}, err
	}
	p := product{path: path}
	if p.list, err = readList(path); err != nil {
		return product{}, fmt.Errorf("access list of container %.12s: %w", f.first, err)
	}
	if !p.list.Complete() {
		return product{}, fmt.Errorf("the access list is incomplete, so nothing is rebuilt: %+v", p.list.Losses)
	}
	err = d.wait(ctx, func() error { return d.result(&p) })
	if err != nil {
		return product{}, fmt.Errorf("rebuild: %w", err)
	}
	d.say("built %s in %.1f s", p.result.Target, p.result.Duration.Seconds())
	return p, nil
}

// errPending says that something is not there yet.
var errPending = errors.New("not there")

// wait repeats try until it returns something else than errPending.
func (d *demo) wait(ctx context.Context, try func() error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if !errors.Is(err, errPending) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-tick.C:
		}
	}
}

// result reads what the rebuild queue recorded of the list's image.
func (d *demo) result(p *product) error {
	for _, dir := range []string{"done", "failed"} {
		paths, err := filepath.Glob(filepath.Join(d.dir, "*", dir, "*.json"))
		if err != nil {
			return err
		}
		for _, path := range paths {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if dir == "failed" {
				var f rebuild.Failure
				return errors.Join(json.Unmarshal(data, &f), fmt.Errorf("given up: %s", f.Error))
			}
			if err := json.Unmarshal(data, &p.result); err != nil {
				return err
			}
			if p.result.Image.Digest == p.list.Digest {
				return nil
			}
		}
	}
	return errPending
}

func readList(path string) (_ *persist.List, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return persist.Read(f)
}

func copyProgram(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func count(n int) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

func mega(n int64) float64 { return float64(n) / 1e6 }

// median returns the middle of sorted durations, zero without any.
func median(d []time.Duration) time.Duration {
	if len(d) == 0 {
		return 0
	}
	return d[len(d)/2]
}
