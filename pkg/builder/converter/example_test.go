package converter_test

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	nydus "github.com/headstart-oci/headstart/pkg/builder/converter"
)

// A layer's tar goes in while the blob comes out; Close says whether it is whole.
func ExamplePack() {
	var layer, blob bytes.Buffer // the tar of a layer, and where its blob goes
	layer.Write(make([]byte, 1024))
	w, err := nydus.Pack(context.Background(), &blob, nydus.PackOption{Compressor: "zstd"})
	if err != nil {
		fmt.Println(err)
		return
	}
	if _, err := io.Copy(w, &layer); err != nil {
		fmt.Println(err)
	}
	fmt.Println(w.Close(), blob.Len() > 0)
	// Output: <nil> true
}

// The blobs of an image's layers make its bootstrap.
func ExampleMerge() {
	var blob, bootstrap bytes.Buffer
	w, err := nydus.Pack(context.Background(), &blob, nydus.PackOption{})
	if err != nil {
		fmt.Println(err)
		return
	}
	_, _ = w.Write(make([]byte, 1024))
	if err := w.Close(); err != nil {
		fmt.Println(err)
		return
	}
	layer := nydus.Layer{Digest: digest.FromBytes(blob.Bytes()), ReaderAt: memory{bytes.NewReader(blob.Bytes())}}
	blobs, err := nydus.Merge(context.Background(), []nydus.Layer{layer}, &bootstrap, nydus.MergeOption{WithTar: true})
	fmt.Println(len(blobs), err)
	// Output: 0 <nil>
}

// containerd's converter with both functions converts an image of a content store.
func ExampleConvertHookFunc() {
	_ = func(ctx context.Context, store content.Store, image ocispec.Descriptor) (*ocispec.Descriptor, error) {
		convert := converter.IndexConvertFuncWithHook(
			nydus.LayerConvertFunc(nydus.PackOption{}), true, platforms.Default(),
			converter.ConvertHooks{PostConvertHook: nydus.ConvertHookFunc(nydus.MergeOption{OCI: true})})
		return convert(ctx, store, image)
	}
}
