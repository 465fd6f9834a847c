package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// runRebuild builds one job of the queue; it is what the plugin starts as a child process.
func runRebuild(ctx context.Context, args []string, stderr io.Writer) error {
	if len(args) != 1 {
		fmt.Fprintln(stderr, "usage: optimizer-nri-plugin rebuild JOBFILE")
		return errUsage
	}
	enc := zapcore.NewConsoleEncoder(zap.NewProductionEncoderConfig())
	log := zap.New(zapcore.NewCore(enc, zapcore.Lock(zapcore.AddSync(stderr)), zapcore.InfoLevel))
	return rebuild.RunChild(ctx, args[0], func(ctx context.Context, j rebuild.Job, temp string) (rebuild.Result, error) {
		return build(ctx, j, buildOptions{temp: temp, log: log})
	})
}

type buildOptions struct {
	temp string
	log  *zap.Logger
}

// build converts the image of a job, pinned to the digest that was recorded: its tag may
// have moved since.
func build(ctx context.Context, j rebuild.Job, o buildOptions) (rebuild.Result, error) {
	list, err := readList(j.List)
	if err != nil {
		return rebuild.Result{}, rebuild.Permanent(err)
	}
	opts, err := convertOptions(j, list, o)
	if err != nil {
		return rebuild.Result{}, rebuild.Permanent(err)
	}
	sum, err := convert.Run(ctx, opts)
	if err != nil {
		if hopeless(err) {
			err = rebuild.Permanent(err)
		}
		return rebuild.Result{}, err
	}
	for _, w := range sum.Warnings {
		o.log.Warn(w)
	}
	res := rebuild.Result{
		Target:        sum.Target,
		Manifest:      sum.TargetDigest.String(),
		Source:        sum.Source,
		SourceBytes:   sum.SourceBytes,
		BlobBytes:     sum.TargetBytes,
		Blobs:         sum.Uploaded + sum.Existed,
		PrefetchBytes: sum.Prefetch.Bytes,
		PrefetchFiles: sum.Prefetch.Files,
	}
	if sum.Prefetch.Blob != "" {
		res.PrefetchBlob = "sha256:" + sum.Prefetch.Blob
	}
	return res, nil
}

func readList(path string) (*persist.List, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the list: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read from
	l, err := persist.Read(f)
	if err != nil {
		return nil, fmt.Errorf("read the list %s: %w", path, err)
	}
	return l, nil
}

func convertOptions(j rebuild.Job, list *persist.List, o buildOptions) (convert.Options, error) {
	source, err := remote.Containerd(j.Options.ContainerdNamespace, j.Image.Reference)
	if err != nil {
		return convert.Options{}, err
	}
	d, err := digest.Parse(j.Image.Digest)
	if err != nil {
		return convert.Options{}, fmt.Errorf("digest of image %s: %w", j.Image.Reference, err)
	}
	b := builder.DefaultOptions()
	if b.Compressor, err = rafs.ParseCompressor(j.Options.Compressor); err != nil {
		return convert.Options{}, err
	}
	if b.Digester, err = rafs.ParseDigester(j.Options.Digester); err != nil {
		return convert.Options{}, err
	}
	if j.Options.ChunkSize < rafs.MinChunkSize || j.Options.ChunkSize > rafs.MaxChunkSize {
		return convert.Options{}, fmt.Errorf("chunk size: got %d, want %d to %d", j.Options.ChunkSize, rafs.MinChunkSize, rafs.MaxChunkSize)
	}
	b.ChunkSize = uint32(j.Options.ChunkSize)
	b.Workers = j.Options.Workers
	b.MarkPrefetchBlob = j.Options.MarkPrefetchBlob
	b.TempDir = o.temp
	b.VerifyData = true // nobody waits for it
	r := remote.Options{
		HostsDir:          j.Options.HostsDir,
		DockerConfig:      j.Options.DockerConfig,
		ContainerdAddress: j.Options.ContainerdAddress,
		Namespace:         j.Options.ContainerdNamespace,
		RegistryFallback:  true,
		Log:               o.log,
	}
	return convert.Options{
		Source: source.WithDigest(d).String(), Target: j.Target, Platform: j.Image.Platform,
		List: list, Build: b, SourceRemote: r, TargetRemote: r,
	}, nil
}

// hopeless reports whether another attempt must fail as well: the image is what it is,
// unless what was read of it was cut off or damaged on its way.
func hopeless(err error) bool {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, remote.ErrDigest) || errors.Is(err, remote.ErrStalled) {
		return false
	}
	for _, e := range []error{
		convert.ErrUnsupported, builder.ErrInvalid, builder.ErrUnsupported,
		remote.ErrInvalid, remote.ErrUnsupported, remote.ErrPlatform, remote.ErrTooLarge,
		rafs.ErrUnsupported,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
