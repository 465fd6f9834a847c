package workload

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pythonServer = `"""Imports numpy and flask, serves one request to itself and says ready.

With the argument "hold" it then waits to be stopped; else it ends.
"""
import signal
import sys
import threading
import urllib.request

import flask
import numpy
from werkzeug.serving import make_server

app = flask.Flask(__name__)


@app.route("/")
def index():
    return str(int(numpy.arange(1000).sum()))


server = make_server("127.0.0.1", 0, app)
# A stop is noticed at the next poll.
thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
thread.start()
with urllib.request.urlopen("http://127.0.0.1:%d/" % server.server_port) as answer:
    print("ready", answer.read().decode(), flush=True)
if sys.argv[1:] == ["hold"]:
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
server.shutdown()
thread.join()
`
	// nginxConfig serves on a socket file: two containers in the host's network do not collide.
	nginxConfig = `daemon off;
worker_processes 2;
error_log /dev/stderr notice;
pid /run/nginx.pid;
events { worker_connections 64; }
http {
	include /etc/nginx/mime.types;
	access_log off;
	server {
		listen unix:/run/nginx.sock;
		root /var/www/html;
		index index.nginx-debian.html;
	}
}
`
)

// release is the Debian-like system that images are made of: the host's own, from the
// mirror that the host's apt is configured with.
type release struct {
	suite, mirror, components string
	acquire                   string // apt settings of the host that concern fetching: proxies
}

// packages says what a Debian image adds to the base.
type packages struct {
	reference string
	names     []string
	entries   []entry
	command   []string
}

func debianPackages(name Name) packages {
	if name == Nginx {
		return packages{
			reference: "docker.io/library/nginx:latest", names: []string{"nginx"},
			entries: []entry{{name: "etc/nginx/headstart.conf", mode: 0o644, data: []byte(nginxConfig)}},
			command: []string{"/usr/sbin/nginx", "-c", "/etc/nginx/headstart.conf"},
		}
	}
	return packages{
		reference: "docker.io/headstart/python:1", names: []string{"python3-numpy", "python3-flask"},
		entries: []entry{{name: "app/server.py", mode: 0o644, data: []byte(pythonServer)}},
		command: []string{"/usr/bin/python3", "/app/server.py"},
	}
}

// debianRecipe is a minimal Debian as base layer, packages as the second and a
// configuration as the third. The base is an image of its own that both share.
func debianRecipe(ctx context.Context, name Name, o Options) (*recipe, error) {
	p := debianPackages(name)
	inputs := []string{"debian 4", strings.Join(p.names, " "), strings.Join(p.command, "\x00")}
	for _, e := range p.entries {
		inputs = append(inputs, e.name, string(e.data))
	}
	id, codename, err := hostRelease()
	if err != nil {
		return nil, err
	}
	inputs = append(inputs, id, codename)
	build := func(ctx context.Context, w *layoutWriter, scratch string) error {
		base, err := debianBase(ctx, o, id, codename)
		if err != nil {
			return err
		}
		return buildDebian(ctx, w, base, p, scratch)
	}
	return &recipe{name: name, reference: p.reference, inputs: inputs, build: build}, ctx.Err()
}

// debianBase returns the base image, which is cached like every other.
func debianBase(ctx context.Context, o Options, id, codename string) (*Image, error) {
	build := func(ctx context.Context, w *layoutWriter, scratch string) error {
		rel, err := hostMirror(ctx, id, codename)
		if err != nil {
			return err
		}
		root := filepath.Join(scratch, "root")
		if err := debootstrap(ctx, rel, root); err != nil {
			return err
		}
		return w.layer("base", func(tw *tar.Writer) error {
			return writeTree(ctx, tw, root, treeOptions{skip: skipSystem})
		})
	}
	return cached(ctx, o, &recipe{
		name: "debian", reference: "docker.io/headstart/debian:1",
		inputs: []string{"base 3", id, codename}, build: build,
	})
}

func buildDebian(ctx context.Context, w *layoutWriter, base *Image, p packages, scratch string) error {
	id, codename, err := hostRelease()
	if err != nil {
		return err
	}
	rel, err := hostMirror(ctx, id, codename)
	if err != nil {
		return err
	}
	lower, root := filepath.Join(scratch, "base"), filepath.Join(scratch, "root")
	if err := extract(ctx, base, lower); err != nil {
		return err
	}
	if err := run(exec.CommandContext(ctx, "cp", "-a", lower, root)); err != nil {
		return err
	}
	if err := install(ctx, rel, root, p.names); err != nil {
		return err
	}
	if err := w.copyLayers(base); err != nil {
		return err
	}
	err = w.layer(strings.Join(p.names, " "), func(tw *tar.Writer) error {
		return writeTree(ctx, tw, root, treeOptions{base: lower, skip: skipSystem})
	})
	if err != nil {
		return err
	}
	w.config.Config.Cmd = p.command
	w.config.Config.Env = append(w.config.Config.Env, "LANG=C.UTF-8", "PYTHONDONTWRITEBYTECODE=1")
	return w.layer("configuration", func(tw *tar.Writer) error { return writeEntries(tw, p.entries) })
}

// skipSystem leaves out what a Debian root has for the time of its making only.
func skipSystem(rel string, d fs.DirEntry) bool {
	switch rel {
	case "etc/resolv.conf", "etc/hostname", "var/log/bootstrap.log", "var/cache/ldconfig/aux-cache":
		return true
	}
	for _, dir := range []string{"var/lib/apt/lists/", "var/cache/apt/", "dev/", "proc/", "sys/", "run/", "tmp/"} {
		if strings.HasPrefix(rel, dir) {
			return true
		}
	}
	return filepath.Dir(rel) == "var/log" && !d.IsDir()
}

// hostRelease returns ID and VERSION_CODENAME of os-release(5).
func hostRelease() (id, codename string, err error) {
	data, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", "", fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	scan := bufio.NewScanner(bytes.NewReader(data))
	for scan.Scan() {
		key, value, _ := strings.Cut(scan.Text(), "=")
		value = strings.Trim(value, `"'`)
		switch key {
		case "ID":
			id = value
		case "VERSION_CODENAME":
			codename = value
		}
	}
	if codename == "" {
		return "", "", fmt.Errorf("%w: os-release of %q names no release", ErrUnavailable, id)
	}
	return id, codename, scan.Err()
}

// hostMirror asks the host's apt for its mirror and proxies.
func hostMirror(ctx context.Context, id, codename string) (release, error) {
	rel := release{suite: codename, components: "main"}
	if id == "ubuntu" {
		rel.components = "main,universe"
	}
	for _, tool := range []string{"debootstrap", "apt-get", "apt-config", "chroot"} {
		if _, err := exec.LookPath(tool); err != nil {
			return release{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	if os.Geteuid() != 0 {
		return release{}, fmt.Errorf("%w: debootstrap needs root", ErrUnavailable)
	}
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Identifier: Packages").Output()
	if err != nil {
		return release{}, fmt.Errorf("%w: ask apt for its mirror: %w", ErrUnavailable, err)
	}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) == 3 && fields[0] == codename && fields[1] == "main" {
			rel.mirror = fields[2]
			break
		}
	}
	out, err = exec.CommandContext(ctx, "apt-config", "dump", "--format", "%F \"%v\";%n", "Acquire::http", "Acquire::https").Output()
	if err != nil {
		return release{}, fmt.Errorf("%w: ask apt for its proxies: %w", ErrUnavailable, err)
	}
	rel.acquire = string(out)
	return rel, nil
}

func debootstrap(ctx context.Context, rel release, root string) error {
	args := []string{"--variant=minbase", "--components=" + rel.components, rel.suite, root}
	if rel.mirror != "" {
		args = append(args, rel.mirror)
	}
	cmd := exec.CommandContext(ctx, "debootstrap", args...)
	killGroup(cmd)
	if err := run(cmd); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return nil
}

// install runs apt in the root. Services do not start there.
func install(ctx context.Context, rel release, root string, names []string) error {
	if err := devices(root); err != nil {
		return err
	}
	policy := filepath.Join(root, "usr/sbin/policy-rc.d")
	conf := filepath.Join(root, "etc/apt/apt.conf.d/99host")
	if err := os.WriteFile(policy, []byte("#!/bin/sh\nexit 101\n"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(conf, []byte(rel.acquire), 0o644); err != nil {
		return err
	}
	if data, err := os.ReadFile("/etc/resolv.conf"); err == nil {
		if err := os.WriteFile(filepath.Join(root, "etc/resolv.conf"), data, 0o644); err != nil {
			return err
		}
	}
	for _, args := range [][]string{
		{"apt-get", "update", "-q"},
		append([]string{"apt-get", "install", "-y", "-q", "--no-install-recommends"}, names...),
	} {
		cmd := exec.CommandContext(ctx, "chroot", append([]string{root}, args...)...)
		cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "TMPDIR=") }),
			"DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
		killGroup(cmd)
		if err := run(cmd); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrUnavailable, strings.Join(args[:2], " "), err)
		}
	}
	return errors.Join(os.Remove(policy), os.Remove(conf))
}

// devices makes the devices that package scripts use; images leave /dev out.
func devices(root string) error {
	for name, minor := range map[string]uint32{"null": 3, "zero": 5, "urandom": 9} {
		path := filepath.Join(root, "dev", name)
		if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, minor))); err != nil && !errors.Is(err, unix.EEXIST) { //nolint:gosec // G115: a small number
			return fmt.Errorf("%w: make %s: %w", ErrUnavailable, path, err)
		}
		if err := os.Chmod(path, 0o666); err != nil {
			return err
		}
	}
	return nil
}

// extract unpacks the layers of an image that has no whiteouts.
func extract(ctx context.Context, img *Image, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, l := range img.Manifest.Layers {
		cmd := exec.CommandContext(ctx, "tar", "-xzpf", img.blobPath(l.Digest), "-C", dir, "--numeric-owner", "--xattrs", "--xattrs-include=*")
		if err := run(cmd); err != nil {
			return fmt.Errorf("extract base: %w", err)
		}
	}
	return nil
}

// killGroup makes cmd and what it starts end together when its context does.
func killGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
}
