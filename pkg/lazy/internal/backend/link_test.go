package backend_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/linksim"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/backend"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// program is an image of one layer with files of 64 KiB that compress to about half, of which a start reads listed ones, and its registry.
func program(b testing.TB, files, listed int) *registry {
	b.Helper()
	rnd := rand.New(rand.NewPCG(1, 2))
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	list := &persist.List{Reference: "test", Platform: "linux/amd64", Engine: "fanotify", Grade: "file"}
	p := make([]byte, 64<<10)
	for i := range files {
		for j := range p {
			p[j] = byte(rnd.UintN(16))
		}
		name := fmt.Sprintf("f%04d", i)
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(p))}); err != nil {
			b.Fatal(err)
		}
		if _, err := w.Write(p); err != nil {
			b.Fatal(err)
		}
		if i*listed/files != (i+1)*listed/files {
			list.Accesses = append(list.Accesses, trace.Access{Path: "/" + name, How: trace.Opened})
		}
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	d := digest.FromBytes(layer.Bytes())
	config, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{d}},
	})
	if err != nil {
		b.Fatal(err)
	}
	src := builder.Source{Config: config, Layers: []builder.Layer{{
		Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: d, Size: int64(layer.Len())},
		Open:       func(context.Context) (io.ReadCloser, error) { return io.NopCloser(&layer), nil },
	}}}
	s := &registry{files: map[string][]byte{}, quit: make(chan struct{})}
	o := builder.DefaultOptions()
	o.TempDir, o.ChunkSize, o.List, o.NoRecompress = b.TempDir(), 1<<16, list, true
	s.publish(b, src, o)
	return s
}

// BenchmarkStart is a start over links: from a reference until a reader has read what the list names, in its order, as fast as it can
// or with pauses that make it slower than the link. The unit "x" is the time over what the link alone needs for the bytes
// of bootstrap and prefetch blob and six round trips.
func BenchmarkStart(b *testing.B) {
	s := program(b, 600, 200)
	for _, p := range []linksim.Profile{{RTT: 10 * time.Millisecond, BitsPerSecond: 1e9}, {RTT: 20 * time.Millisecond, BitsPerSecond: 100e6}, {RTT: 80 * time.Millisecond, BitsPerSecond: 25e6}} {
		for name, prefetch := range map[string]bool{"prefetch": true, "demand": false} {
			b.Run(p.String()+"/"+name, func(b *testing.B) {
				link, err := linksim.Start(s.host, p)
				if err != nil {
					b.Fatal(err)
				}
				defer link.Close()
				var took time.Duration
				var total fill.Stats
				for b.Loop() {
					link.Reset()
					began := time.Now()
					total = start(b, link.Host()+"/some/app:v", prefetch)
					took += time.Since(began)
				}
				least := p.Transfer(total.Demand.Bytes+total.Prefetch.Bytes) + 6*p.RTT
				b.ReportMetric(float64(took)/float64(b.N)/float64(least), "x")
				b.ReportMetric(float64(link.Stats().Requests), "requests")
				b.ReportMetric(float64(link.Stats().Down)/1e6, "MB")
				b.ReportMetric(float64(total.Misses), "misses")
				b.ReportMetric(float64(total.Overtakes), "overtakes")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// start reads the chunks of the prefetch blob in order.
func start(b *testing.B, ref string, prefetch bool) (total fill.Stats) {
	b.Helper()
	o := options()
	o.Early = func(string) bool { return prefetch }
	img, err := backend.Open(b.Context(), ref, o)
	if err != nil {
		b.Fatal(err)
	}
	m := &mount{t: b, s: fill.New(fill.Options{})}
	n := img.Origin().Prefetch
	for i, info := range img.RAFS.Blobs {
		c := &cache{data: make([]byte, info.UncompressedSize), ready: map[uint64]bool{}}
		blob, err := m.s.Open(c, img.Blob(i), info, img.RAFS.BlobChunks(i))
		if err != nil {
			b.Fatal(err)
		}
		m.blobs = append(m.blobs, blob)
	}
	if prefetch {
		m.s.Start(fill.Plan{Blobs: m.blobs, Stream: n, Background: fill.BackgroundNone})
	}
	for _, c := range img.RAFS.BlobChunks(n) {
		if err := m.blobs[n].Ensure(b.Context(), int64(c.UncompressedOffset), int64(c.UncompressedSize)); err != nil {
			b.Fatal(err)
		}
	}
	for _, blob := range m.blobs {
		total.Add(blob.Stats())
	}
	m.s.Close()
	if err := img.Close(); err != nil {
		b.Fatal(err)
	}
	return total
}
