package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// registryClient asks an open registry for what a snapshotter's containerd would bring nydusd.
type registryClient struct {
	base   string
	client *http.Client
}

func newRegistryClient(host, repo string) *registryClient {
	return &registryClient{base: "http://" + host + "/v2/" + repo + "/", client: &http.Client{Transport: &http.Transport{}}}
}

func (c *registryClient) close() { c.client.CloseIdleConnections() }

func (c *registryClient) get(ctx context.Context, what string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+what, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest+", application/vnd.docker.distribution.manifest.v2+json")
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, errors.Join(fmt.Errorf("get %s: %s", what, resp.Status), resp.Body.Close())
	}
	return resp.Body, nil
}

func (c *registryClient) manifest(ctx context.Context, tag string) (m ocispec.Manifest, err error) {
	body, err := c.get(ctx, "manifests/"+tag)
	if err != nil {
		return m, err
	}
	err = errors.Join(json.NewDecoder(body).Decode(&m), body.Close())
	if err == nil && len(m.Layers) == 0 {
		err = fmt.Errorf("manifest %s has no layers", tag)
	}
	return m, err
}

// bootstrap fetches manifest, config and bootstrap of a Nydus image and writes the bare bootstrap to a file.
func (c *registryClient) bootstrap(ctx context.Context, tag, file string) error {
	m, err := c.manifest(ctx, tag)
	if err != nil {
		return err
	}
	config, err := c.get(ctx, "blobs/"+m.Config.Digest.String())
	if err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, config); err != nil {
		return errors.Join(err, config.Close())
	}
	if err := config.Close(); err != nil {
		return err
	}
	body, err := c.get(ctx, "blobs/"+m.Layers[len(m.Layers)-1].Digest.String())
	if err != nil {
		return err
	}
	return errors.Join(writeBootstrap(body, file), body.Close())
}

// writeBootstrap takes image/image.boot out of a gzipped tar.
func writeBootstrap(r io.Reader, file string) (err error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return err
	}
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if err != nil {
			return fmt.Errorf("look for image.boot: %w", err)
		}
		if path.Base(h.Name) != "image.boot" {
			continue
		}
		f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, tr)
		return errors.Join(err, f.Close())
	}
}
