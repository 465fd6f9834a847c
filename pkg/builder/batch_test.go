package builder_test

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestBatches puts small chunks into batches, in the layers' blobs, the prefetch blob or both: the image
// is that without, the blobs are smaller, and the bytes do not depend on the workers. nydus-image 2.2.0
// knows no batches; TestKernelMount of internal/convert has the kernel judge.
func TestBatches(t *testing.T) {
	entries := readExpected(t)
	o := builder.DefaultOptions()
	o.ChunkSize, o.List, o.VerifyData = 1<<16, fixtureList(t, entries), true
	plain := convert(t, fixture(t), o)
	want := dumpImage(t, plain)
	for name, sizes := range map[string][2]uint32{"layers": {1 << 18, 0}, "prefetch": {0, 1 << 18}, "both": {1 << 16, 1 << 20}} {
		if raceEnabled && name != "both" {
			t.Logf("left out under the race detector: %s", name)
			continue
		}
		o.BatchSize, o.PrefetchBatchSize = sizes[0], sizes[1]
		var first string
		for _, workers := range []int{1, 3} {
			o.Workers = workers
			res := convert(t, fixture(t), o)
			if first == "" {
				first = string(res.Manifest)
			} else if first != string(res.Manifest) {
				t.Errorf("%s: another image with %d workers", name, workers)
			}
			if diff := cmp.Diff(want, dumpImage(t, res)); diff != "" {
				t.Errorf("%s: the tree differs:\n%s", name, diff)
			}
			if sizes[0] > 0 && res.Stats.BlobBytes >= plain.Stats.BlobBytes || sizes[1] > 0 && res.Stats.Prefetch.BlobBytes >= plain.Stats.Prefetch.BlobBytes {
				t.Errorf("%s: blobs of %d bytes and %d, without batches %d and %d", name, res.Stats.BlobBytes, res.Stats.Prefetch.BlobBytes, plain.Stats.BlobBytes, plain.Stats.Prefetch.BlobBytes)
			}
		}
	}
	for _, bad := range []builder.Options{{BatchSize: 5000}, {PrefetchBatchSize: 1 << 25}, {BatchSize: 1 << 16, FSVersion: rafs.V5}} {
		if _, err := builder.Convert(t.Context(), fixture(t), bad); !errors.Is(err, builder.ErrUnsupported) {
			t.Errorf("Convert with %+v = %v, want ErrUnsupported", bad, err)
		}
	}
}
