package main

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/headstart-oci/headstart/internal/linksim"
	"github.com/headstart-oci/headstart/internal/nydusd"
)

func startNydusd(ctx context.Context, b *bench, img *image, link *linksim.Link, dir string) (*started, error) {
	return b.nydusd(ctx, img, link, dir, false)
}

func startNydusdPrefetch(ctx context.Context, b *bench, img *image, link *linksim.Link, dir string) (*started, error) {
	return b.nydusd(ctx, img, link, dir, true)
}

// nydusd brings the bootstrap and serves the image with the real nydusd.
func (b *bench) nydusd(ctx context.Context, img *image, link *linksim.Link, dir string, prefetch bool) (*started, error) {
	program, err := b.tools.Ensure(ctx, "nydusd")
	if err != nil {
		return nil, err
	}
	own, boot := filepath.Join(dir, "nydusd"), filepath.Join(dir, "boot")
	if err := os.Mkdir(own, 0o700); err != nil {
		return nil, err
	}
	s := &started{began: time.Now()}
	client := newRegistryClient(link.Host(), img.peer.repo)
	err = client.bootstrap(ctx, img.peer.tag, boot)
	client.close()
	if err != nil {
		return nil, err
	}
	d, err := nydusd.Start(ctx, nydusd.Options{Program: program, Bootstrap: boot, Dir: own, Backend: nydusd.Registry(link.Host(), img.peer.repo), Prefetch: prefetch})
	if err != nil {
		return nil, err
	}
	s.onClose(d.Close)
	s.pids, s.layers = []int{d.PID}, []string{d.Mount}
	return s, nil
}
