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
	java      []string // names of entries to be replaced by what they compile to
	command   []string
}

func debianPackages(name Name) (packages, error) {
	switch name {
	case Nginx:
		return packages{
			reference: "docker.io/library/nginx:latest", names: []string{"nginx"},
			entries: []entry{{name: "etc/nginx/headstart.conf", mode: 0o644, data: []byte(nginxConfig)}},
			command: []string{"/usr/sbin/nginx", "-c", "/etc/nginx/headstart.conf"},
		}, nil
	case Node:
		source, err := programs.ReadFile("programs/node/server.js")
		return packages{
			reference: "docker.io/headstart/node:1", names: []string{"nodejs", "node-serve-static", "node-finalhandler", "node-yargs"},
			entries: []entry{{name: "app/server.js", mode: 0o644, data: source}},
			command: []string{"/usr/bin/node", "/app/server.js"},
		}, err
	case JDK:
		source, err := programs.ReadFile("programs/jdk/Server.java")
		return packages{
			reference: "docker.io/headstart/jdk:1", names: []string{"default-jre-headless"},
			entries: []entry{{name: "app/Server.java", mode: 0o644, data: source}}, java: []string{"app/Server.java"},
			command: []string{"/usr/bin/java", "-cp", "/app", "Server"},
		}, err
	}
	return packages{
		reference: "docker.io/headstart/python:1", names: []string{"python3-numpy", "python3-flask"},
		entries: []entry{{name: "app/server.py", mode: 0o644, data: []byte(pythonServer)}},
		command: []string{"/usr/bin/python3", "/app/server.py"},
	}, nil
}

// debianRecipe is a minimal Debian as base layer, packages as the second and a
// configuration as the third. The base is an image of its own that both share.
func debianRecipe(ctx context.Context, name Name, o Options) (*recipe, error) {
	p, err := debianPackages(name)
	if err != nil {
		return nil, err
	}
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
	if p.entries, err = compileJava(ctx, root, p); err != nil {
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
	for _, tool := range []string{"debootstrap", "apt-get", "apt-config", "chroot", "unshare"} {
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
		if err := run(within(ctx, root, args...)); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrUnavailable, strings.Join(args[:2], " "), err)
		}
	}
	return errors.Join(os.Remove(policy), os.Remove(conf))
}

// within returns a command that runs in the root, in mount and process namespaces of its own: it finds a
// /proc, which Java's packages ask for, and nothing of it is left when it ends.
func within(ctx context.Context, root string, args ...string) *exec.Cmd {
	own := []string{"--mount", "--pid", "--fork", "--kill-child", "--mount-proc=" + filepath.Join(root, "proc"), "chroot", root}
	cmd := exec.CommandContext(ctx, "unshare", append(own, args...)...)
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "TMPDIR=") }),
		"DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	killGroup(cmd)
	return cmd
}

// compileJava returns p's entries with class files in place of the Java sources. The compiler is a module
// that Debian's runtime has too.
func compileJava(ctx context.Context, root string, p packages) ([]entry, error) {
	if len(p.java) == 0 {
		return p.entries, nil
	}
	const work = "/tmp/java" // what is in /tmp is left out of images
	args := []string{"/usr/bin/java", "-m", "jdk.compiler/com.sun.tools.javac.Main", "-d", work}
	if err := os.Mkdir(filepath.Join(root, work), 0o755); err != nil {
		return nil, err
	}
	var entries []entry
	dir := ""
	for _, e := range p.entries {
		if !slices.Contains(p.java, e.name) {
			entries = append(entries, e)
			continue
		}
		dir = filepath.Dir(e.name)
		source := filepath.Join(work, filepath.Base(e.name))
		if err := os.WriteFile(filepath.Join(root, source), e.data, 0o644); err != nil {
			return nil, err
		}
		args = append(args, source)
	}
	if err := run(within(ctx, root, args...)); err != nil {
		return nil, fmt.Errorf("compile %s: %w", strings.Join(p.java, ", "), err)
	}
	classes, err := filepath.Glob(filepath.Join(root, work, "*.class"))
	if err != nil {
		return nil, err
	}
	for _, c := range classes {
		data, err := os.ReadFile(c)
		if err != nil {
			return nil, err
		}
		entries = append(entries, entry{name: filepath.Join(dir, filepath.Base(c)), mode: 0o644, data: data})
	}
	return entries, nil
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
