package testcri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/headstart-oci/headstart/internal/tools"
)

// RegistryOptions says how a [Registry] is run. The zero value is an open one.
type RegistryOptions struct {
	Dir  string    // directory to make the private one in; empty: os.TempDir()
	Auth string    // the auth section of its configuration as YAML, indented by two spaces; empty: none
	Out  io.Writer // gets what package tools installs; nil: nothing
}

// Registry is a real registry server (distribution) on the loopback interface,
// over plain HTTP, with its storage in a directory of its own.
type Registry struct {
	Host string // 127.0.0.1:port, as it stands in references

	dir    string
	daemon *daemon
}

const registryConfig = `version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %q}
  delete: {enabled: true}
http:
  addr: 127.0.0.1:0
`

// StartRegistry starts a registry and returns when it answers. The caller closes
// it.
func StartRegistry(ctx context.Context, o RegistryOptions) (_ *Registry, err error) {
	store, err := tools.NewStore(tools.Options{Out: o.Out})
	if err != nil {
		return nil, err
	}
	program, err := store.Ensure(ctx, "registry")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(o.Dir, "registry-*")
	if err != nil {
		return nil, err
	}
	r := &Registry{dir: dir}
	if err := r.start(ctx, program, o); err != nil {
		return nil, errors.Join(fmt.Errorf("start registry: %w; its log:\n%s", err, tail(r.Log(), 4096)), r.Close())
	}
	return r, nil
}

func (r *Registry) start(ctx context.Context, program string, o RegistryOptions) (err error) {
	config := fmt.Sprintf(registryConfig, filepath.Join(r.dir, "storage"))
	if o.Auth != "" {
		config += "auth:\n" + o.Auth + "\n"
	}
	path := filepath.Join(r.dir, "config.yml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return err
	}
	log, err := os.OpenFile(r.logPath(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	cmd := exec.Command(program, "serve", path)
	cmd.Dir, cmd.Stdout, cmd.Stderr = r.dir, log, log
	// The environment of a host must not reach into its configuration.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "OTEL_TRACES_EXPORTER=none"}
	r.daemon, err = startDaemon(cmd)
	if err := errors.Join(err, log.Close()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return r.waitReady(ctx)
}

// waitReady finds the port, which the kernel chose, in the server's log and
// returns once the server answers there.
func (r *Registry) waitReady(ctx context.Context) error {
	listening := regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+)`)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if m := listening.FindStringSubmatch(r.Log()); m != nil {
			if r.answers(ctx, m[1]) {
				r.Host = m[1]
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-r.daemon.done:
			return fmt.Errorf("it ended: %w", r.daemon.err)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (r *Registry) answers(ctx context.Context, host string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+"/v2/", nil)
	if err != nil {
		return false
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.Body.Close() == nil
}

func (r *Registry) logPath() string { return filepath.Join(r.dir, "registry.log") }

// Log returns the server's log so far, or the error of reading it as text.
func (r *Registry) Log() string {
	text, err := os.ReadFile(r.logPath())
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// HostsTOML returns the hosts.toml that tells containerd how to speak to the
// registry: [Env.AddHost](r.Host, r.HostsTOML()).
func (r *Registry) HostsTOML() string {
	var b bytes.Buffer
	fmt.Fprintf(&b, "server = %q\n\n[host.%q]\n  capabilities = [\"pull\", \"resolve\", \"push\"]\n", "http://"+r.Host, "http://"+r.Host)
	return b.String()
}

// Push puts img into the registry at repository and tag, and returns the
// reference to pull it by.
func (r *Registry) Push(ctx context.Context, repository, tag string, img v1.Image) (string, error) {
	ref := r.Host + "/" + repository + ":" + tag
	parsed, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		return "", err
	}
	transport := &http.Transport{DisableKeepAlives: true}
	if err := remote.Write(parsed, img, remote.WithContext(ctx), remote.WithTransport(transport)); err != nil {
		return "", fmt.Errorf("push %s: %w", ref, err)
	}
	return ref, nil
}

// Close ends the server and removes its storage. It is safe to call twice.
func (r *Registry) Close() error {
	if r.daemon != nil {
		r.daemon.stop()
	}
	return os.RemoveAll(r.dir)
}
