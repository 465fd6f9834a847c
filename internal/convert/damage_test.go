package convert_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// A blob of a dictionary that is damaged in a layout makes no damaged image: who names the dictionary is told, and auto does without.
func TestChunkDictDamagedBlob(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := options(t, "oci:"+dir+"/out:a")
	o.List = nil
	run(t, o)
	harm(t, filepath.Join(dir, "out", "blobs", "sha256"))

	o.ChunkDict, o.Target = "oci:"+dir+"/out:a", "oci:"+dir+"/out:b"
	if _, err := convert.Run(t.Context(), o); !errors.Is(err, remote.ErrDigest) || !strings.Contains(err.Error(), "stored blob") {
		t.Errorf("Run with the damaged dictionary = %v, want ErrDigest of a stored blob", err)
	}
	o.Target = "oci:" + dir + "/elsewhere:b"
	if _, err := convert.Run(t.Context(), o); !errors.Is(err, remote.ErrDigest) {
		t.Errorf("Run to another layout = %v, want ErrDigest", err)
	}
	o.ChunkDict, o.Target = convert.DictAuto, "oci:"+dir+"/out:b"
	sum := run(t, o)
	if sum.DictBlobs != 0 || len(sum.Warnings) != 1 || !strings.Contains(sum.Warnings[0], "are not referred to") {
		t.Errorf("auto: %+v, want no dictionary, and a warning", sum)
	}
	sound(t, o.Target) // the damaged file has been replaced, too
	empty(t, o.Build.TempDir)
}

// A blob that the target's layout has already, damaged, is replaced when the dictionary brings it, and when optimize does.
func TestDamagedAtTarget(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := options(t, "oci:"+dir+"/from:a")
	o.List = nil
	run(t, o)
	o.Target = "oci:" + dir + "/to:a"
	run(t, o)
	store := filepath.Join(dir, "to", "blobs", "sha256")
	harm(t, store)
	o.ChunkDict, o.Target = "oci:"+dir+"/from:a", "oci:"+dir+"/to:b"
	if sum := run(t, o); sum.DictBlobs == 0 {
		t.Fatalf("%+v, want blobs of the dictionary", sum)
	}
	sound(t, o.Target)
	harm(t, store)
	if _, err := convert.Optimize(t.Context(), convert.OptimizeOptions{
		Source: "oci:" + dir + "/from:a", Target: "oci:" + dir + "/to:c", Build: builder.OptimizeOptions{List: list("/etc")},
	}); err != nil {
		t.Fatal(err)
	}
	sound(t, "oci:"+dir+"/to:c")

	// Manifest and config, too, when the image is written again.
	files, err := filepath.Glob(filepath.Join(store, "*"))
	if err != nil || len(files) < 5 {
		t.Fatalf("%d files in the layout: %v", len(files), err)
	}
	for _, f := range files {
		flip(t, f)
	}
	o.ChunkDict = ""
	run(t, o)
	sound(t, o.Target)
}

// sound checks every chunk of a published image.
func sound(t *testing.T, ref string) {
	t.Helper()
	img, err := nydusimage.Open(t.Context(), ref, nydusimage.Options{Platform: "linux/amd64", TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	boot, size := img.Bootstrap()
	open := func(b rafs.Blob) (io.ReaderAt, error) { return img.OpenBlob(t.Context(), b) }
	if _, err := rafs.Check(t.Context(), boot, size, open, rafs.CheckOptions{Data: true}); err != nil {
		t.Errorf("%s: %v", ref, err)
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
}

// harm flips a bit in the largest blob of store.
func harm(t *testing.T, store string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(store, "*"))
	if err != nil {
		t.Fatal(err)
	}
	var path string
	var most int64
	for _, f := range files {
		if st, err := os.Stat(f); err == nil && st.Size() > most {
			path, most = f, st.Size()
		}
	}
	flip(t, path)
}

// flip flips a bit in the file at path.
func flip(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/3] ^= 4
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
