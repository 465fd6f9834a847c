package remote_test

import (
	"io"
	"math/rand"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// BenchmarkBlob pushes and pulls one blob of 128 MiB.
func BenchmarkBlob(b *testing.B) {
	data := make([]byte, 128<<20)
	rand.New(rand.NewSource(1)).Read(data)
	e := critest.Start(b, testcri.Options{})
	r := critest.StartRegistry(b, testcri.RegistryOptions{})
	o := remote.Options{ContainerdAddress: e.Address()}
	for name, ref := range map[string]string{
		"registry": r.Host + "/app:v", "layout": "oci:" + b.TempDir() + ":v", "containerd": "containerd:example/registry.test/app:v",
	} {
		var desc ocispec.Descriptor
		b.Run(name+"/push", func(b *testing.B) {
			dst := openTarget(b, ref, o)
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for i := byte(1); b.Loop(); i++ {
				b.StopTimer()
				data[0] = i // another blob each time
				doc := remote.NewDocument(ocispec.MediaTypeImageLayer, data)
				desc = doc.Descriptor
				b.StartTimer()
				if _, err := dst.Push(b.Context(), doc.Blob()); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/pull", func(b *testing.B) {
			if name == "containerd" { // the lease that held it is gone
				dst := openTarget(b, ref, o)
				if _, err := dst.Push(b.Context(), remote.NewDocument(ocispec.MediaTypeImageLayer, data).Blob()); err != nil {
					b.Fatal(err)
				}
			}
			src := openSource(b, ref, o)
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				rc, err := src.Fetch(b.Context(), desc)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, rc); err != nil {
					b.Fatal(err)
				}
				if err := rc.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
