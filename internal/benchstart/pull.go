package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/image-spec/identity"

	"github.com/headstart-oci/headstart/internal/linksim"
	"github.com/headstart-oci/headstart/internal/testcri"
)

// startPull has a new containerd pull and unpack the whole plain image, as a kubelet has it do.
func startPull(ctx context.Context, b *bench, img *image, link *linksim.Link, dir string) (_ *started, err error) {
	hosts := fmt.Sprintf("server = %[1]q\n\n[host.%[1]q]\n  capabilities = [\"pull\", \"resolve\"]\n", "http://"+link.Host())
	env, err := testcri.Start(ctx, testcri.Options{Dir: dir, Hosts: map[string]string{link.Host(): hosts}, Out: b.log})
	if err != nil {
		return nil, err
	}
	s := &started{pids: []int{env.PID()}}
	s.onClose(env.Close)
	defer func() {
		if err != nil {
			_ = s.close()
		}
	}()
	link.Reset()
	s.began = time.Now()
	ref := link.Host() + "/" + img.name + ":" + img.plain
	if _, err := env.Pull(ctx, ref); err != nil {
		return nil, err
	}
	// A view of the unpacked layers is what a container's overlay is made of.
	ctx = namespaces.WithNamespace(ctx, testcri.Namespace)
	mounts, err := env.Client().SnapshotService("overlayfs").View(ctx, "benchstart", identity.ChainID(img.source.Config.RootFS.DiffIDs).String())
	if err != nil {
		return nil, err
	}
	if len(mounts) != 1 {
		return nil, fmt.Errorf("the snapshot has %d mounts, want one", len(mounts))
	}
	if mounts[0].Type == "bind" {
		s.layers = []string{mounts[0].Source}
		return s, nil
	}
	for _, o := range mounts[0].Options {
		if lower, ok := strings.CutPrefix(o, "lowerdir="); ok {
			s.layers = strings.Split(lower, ":")
			slices.Reverse(s.layers) // overlay names the topmost first
		}
	}
	if len(s.layers) == 0 {
		return nil, fmt.Errorf("the snapshot has no lower directory: %q", mounts[0].Options)
	}
	return s, nil
}
