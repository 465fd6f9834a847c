package converter_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/builder"
	nydus "github.com/headstart-oci/headstart/pkg/builder/converter"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

type brokenWriter struct{}

var errBroken = errors.New("broken")

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

func TestErrors(t *testing.T) {
	second := time.Nanosecond
	for name, opt := range map[string]nydus.PackOption{
		"version": {FsVersion: "7"}, "aligned": {FsVersion: "5", AlignedChunk: true}, "batch v5": {FsVersion: "5", BatchSize: "4096"}, "ref v5": {OCIRef: true, FsVersion: "5"}, "ref batch": {OCIRef: true, BatchSize: "4096"}, "ref dictionary": {OCIRef: true, ChunkDictPath: "/any"}, "encrypt": {Encrypt: true}, "batch": {BatchSize: "12345"},
		"compressor": {Compressor: "brotli"}, "chunk size": {ChunkSize: "3000"}, "chunk sizes": {ChunkSize: "1MiB"}, "small": {ChunkSize: "512"},
	} {
		w, err := nydus.Pack(t.Context(), io.Discard, opt)
		if err == nil {
			err = w.Close()
		}
		if !errors.Is(err, nydus.ErrUnsupported) {
			t.Errorf("%s: %v, want ErrUnsupported", name, err)
		}
	}
	if _, err := nydus.Pack(t.Context(), io.Discard, nydus.PackOption{ChunkDictPath: "/missing"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("dictionary: %v", err)
	}
	closing := func(ctx context.Context, dest io.Writer, opt nydus.PackOption, data []byte) error {
		w, err := nydus.Pack(ctx, dest, opt)
		if err != nil {
			return err
		}
		_, _ = w.Write(data) // Close says it
		return w.Close()
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	layer := tarOf(t, "a=1")
	for name, c := range map[string]struct {
		got, want error
	}{
		"no tar":       {closing(t.Context(), io.Discard, nydus.PackOption{}, []byte(strings.Repeat("no tar", 200))), builder.ErrInvalid},
		"cut off":      {closing(t.Context(), io.Discard, nydus.PackOption{}, layer[:512]), builder.ErrInvalid},
		"lower links":  {closing(t.Context(), io.Discard, nydus.PackOption{}, linkTar(t)), nydus.ErrUnsupported},
		"broken dest":  {closing(t.Context(), brokenWriter{}, nydus.PackOption{}, layer), errBroken},
		"cancelled":    {closing(cancelled, io.Discard, nydus.PackOption{}, layer), context.Canceled},
		"timeout":      {closing(t.Context(), io.Discard, nydus.PackOption{Timeout: &second}, layer), context.DeadlineExceeded},
		"no bootstrap": {nydus.Unpack(t.Context(), reader(layer), io.Discard, nydus.UnpackOption{}), rafs.ErrNoBootstrap},
		"empty":        {nydus.Unpack(t.Context(), reader(nil), io.Discard, nydus.UnpackOption{}), rafs.ErrNoBootstrap},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v, want %v", name, c.got, c.want)
		}
	}
	// A flipped byte anywhere in a packed layer is found by unpacking it, or changes nothing that is read.
	blob := pack(t, tarOf(t, "a="+strings.Repeat("abc", 3000)), nydus.PackOption{})
	want := names(t, unpacked(t, blob))
	for i := 0; i < len(blob); i += 5 {
		bad := bytes.Clone(blob)
		bad[i] ^= 0x10
		var out bytes.Buffer
		if err := nydus.Unpack(t.Context(), reader(bad), &out, nydus.UnpackOption{}); err != nil {
			continue
		}
		if !cmp.Equal(want, names(t, out.Bytes())) {
			t.Fatalf("byte %d flipped: unpacked to something else", i)
		}
	}
}

// linkTar has a hard link to a file of a lower layer.
func linkTar(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: "l", Linkname: "below"}), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
