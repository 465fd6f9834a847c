package nydusd_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/nydusd"
	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestStart(t *testing.T) {
	testenv.Root(t)
	program := testenv.Tool(t, "nydusd")
	dir := filepath.Join(testenv.Fixtures(t), "nydus", "v6-zstd")
	d, err := nydusd.Start(t.Context(), nydusd.Options{
		Program: program, Bootstrap: filepath.Join(dir, "image.boot"), Dir: t.TempDir(), Backend: nydusd.Files(filepath.Join(dir, "blobs")),
	})
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(d.Mount); err != nil || len(entries) == 0 {
		t.Errorf("the mount has %v, %v", entries, err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if entries, err := os.ReadDir(d.Mount); err != nil || len(entries) > 0 {
		t.Errorf("after Close there is %v, %v", entries, err)
	}
}

func TestStartFails(t *testing.T) {
	program := filepath.Join(t.TempDir(), "nydusd")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho no such image\nexit 3\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	d, err := nydusd.Start(t.Context(), nydusd.Options{Program: program, Bootstrap: "none", Dir: t.TempDir(), Backend: nydusd.Files("/nonexistent")})
	if d != nil || err == nil || !strings.Contains(err.Error(), "no such image") {
		t.Errorf("Start = %v, %v; want what the program said", d, err)
	}
}
