package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/gzip"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// The frames of a trace, read from the uncompressed layers, are the bytes of the files that
// the list names: as those who made the fixture say.
func TestExportTrace(t *testing.T) {
	t.Parallel()
	fixtures := testenv.Fixtures(t)
	source := "oci:" + filepath.Join(fixtures, "oci", "source")
	b, err := os.ReadFile(filepath.Join(fixtures, "expected.json"))
	if err != nil {
		t.Fatal(err)
	}
	var tree []struct{ Path, Type, SHA256 string }
	if err := json.Unmarshal(b, &tree); err != nil {
		t.Fatal(err)
	}
	layers := layerTars(t, source)
	tried := 0
	for _, f := range tree {
		if f.Type != "reg" || f.SHA256 == hex.EncodeToString(sha256.New().Sum(nil)) || tried == 12 {
			continue
		}
		tried++
		out := filepath.Join(t.TempDir(), "trace")
		var stderr bytes.Buffer
		args := []string{"profile", "export", "-", "--format", "overlaybd-trace", "--image", source, "--platform", "linux/amd64", "-o", out}
		if err := run(t.Context(), args, bytes.NewReader([]byte(f.Path+"\n")), io.Discard, &stderr); err != nil {
			t.Fatalf("%s: %v, %s", f.Path, err, stderr.Bytes())
		}
		trace, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		for at := 24; at < len(trace); at += 24 {
			frame := trace[at : at+24]
			n, off := binary.LittleEndian.Uint64(frame[8:]), binary.LittleEndian.Uint64(frame[16:])
			h.Write(layers[binary.LittleEndian.Uint32(frame[4:])][off : off+n])
		}
		if got := hex.EncodeToString(h.Sum(nil)); got != f.SHA256 {
			t.Errorf("%s: the frames hold sha256 %s, want %s", f.Path, got, f.SHA256)
		}
	}
	if tried < 5 {
		t.Errorf("%d files tried: the fixture should have more", tried)
	}
}

func layerTars(t *testing.T, name string) (out [][]byte) {
	t.Helper()
	ref, err := remote.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	src, err := remote.OpenSource(t.Context(), ref, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	img, err := remote.Select(t.Context(), src, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range img.Layers {
		rc, err := src.Fetch(t.Context(), l.Descriptor)
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(rc)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(z)
		if err = errors.Join(err, rc.Close()); err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}
