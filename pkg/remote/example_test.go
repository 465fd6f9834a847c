package remote_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// Copy one platform's image into an OCI layout.
func Example() {
	err := func(ctx context.Context) error {
		from, err := remote.Parse("docker.io/library/nginx:latest")
		if err != nil {
			return err
		}
		src, err := remote.OpenSource(ctx, from, remote.Options{})
		if err != nil {
			return err
		}
		img, err := remote.Select(ctx, src, "linux/amd64")
		if err != nil {
			return errors.Join(err, src.Close())
		}
		var blobs []remote.Blob
		for _, l := range img.Layers {
			blobs = append(blobs, remote.Blob{Descriptor: l.Descriptor, Open: func(ctx context.Context) (io.ReadCloser, error) {
				return src.Fetch(ctx, l.Descriptor)
			}})
		}
		dst, err := remote.OpenTarget(ctx, remote.Layout("images", "nginx"), remote.Options{})
		if err != nil {
			return errors.Join(err, src.Close())
		}
		_, err = remote.Publish(ctx, dst, blobs,
			remote.Document{Descriptor: img.Manifest.Config, Data: img.ConfigBytes},
			remote.Document{Descriptor: img.Descriptor, Data: img.ManifestBytes}, remote.PublishOptions{})
		return errors.Join(err, dst.Close(), src.Close())
	}(context.Background())
	if err != nil {
		log.Print(err)
	}
}

func ExampleParse() {
	for _, s := range []string{"nginx", "oci:images/nginx:v1", "containerd:default/docker.io/library/nginx:1.25"} {
		ref, err := remote.Parse(s)
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(ref.Kind, ref)
	}
	// Output:
	// registry docker.io/library/nginx:latest
	// oci layout oci:images/nginx:v1
	// containerd containerd:default/docker.io/library/nginx:1.25
}

// A config is small: it is held in memory and pushed like a blob.
func ExampleNewDocument() {
	doc := remote.NewDocument(ocispec.MediaTypeImageConfig, []byte("{}"))
	fmt.Fprintln(os.Stdout, doc.Descriptor.Digest, doc.Descriptor.Size)
	// Output: sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a 2
}
