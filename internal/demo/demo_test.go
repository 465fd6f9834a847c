package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/workload"
)

// TestMain fails when a demo left something running or mounted.
func TestMain(m *testing.M) { testenv.Main(m) }

func staticImage(t *testing.T) *workload.Image {
	t.Helper()
	testenv.Root(t)
	for _, name := range []string{"containerd", "runc", "fsck.erofs"} {
		testenv.Tool(t, name)
	}
	img, err := workload.Build(t.Context(), workload.Static, workload.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestDemo(t *testing.T) {
	img := staticImage(t)
	var out bytes.Buffer
	o := options{image: "oci:" + img.Dir, times: 2, dir: t.TempDir()}
	if err := run(t.Context(), o, &out, io.Discard); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, want := range []string{"==> check the rebuilt image", "prefetch blob", "lost 0", "files touched", "without", "==> containerd is down"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("output lacks %q:\n%s", want, out.String())
		}
	}
	lists, err := filepath.Glob(filepath.Join(o.dir, "run-*", "lists", "*", "*", "*.list"))
	if err != nil || len(lists) == 0 {
		t.Errorf("lists = %q, %v; want those of the runs", lists, err)
	}
}

// TestDemoServer has a workload that does not end.
func TestDemoServer(t *testing.T) {
	img := staticImage(t)
	var out bytes.Buffer
	o := options{image: "oci:" + img.Dir, cmd: []string{"/bin/touch", "read", "/data/b", "wait"}, times: 5, dir: t.TempDir(), limit: time.Second}
	if err := run(t.Context(), o, &out, io.Discard); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if !strings.Contains(out.String(), "stop it") {
		t.Errorf("output does not say that the workload is stopped:\n%s", out.String())
	}
}

// TestInterrupt ends the demo while it runs a container; TestMain sees what is left.
func TestInterrupt(t *testing.T) {
	img := staticImage(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &trigger{word: "without the plugin", do: cancel}
	o := options{image: "oci:" + img.Dir, cmd: []string{"/bin/touch", "wait"}, times: 1, dir: t.TempDir()}
	err := run(ctx, o, out, io.Discard)
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "interrupted; everything was taken down") {
		t.Errorf("run = %v, want that it was interrupted", err)
	}
}

func TestFailingWorkload(t *testing.T) {
	img := staticImage(t)
	o := options{image: "oci:" + img.Dir, cmd: []string{"/bin/touch", "fail", "7"}, times: 1, dir: t.TempDir()}
	err := run(t.Context(), o, io.Discard, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "exit code 7") {
		t.Errorf("run = %v, want exit code 7", err)
	}
}

// TestResults has directories of a demo that goes on, of one that ended and of one that was before locks.
func TestResults(t *testing.T) {
	parent := t.TempDir()
	var said []string
	say := func(format string, a ...any) { said = append(said, fmt.Sprintf(format, a...)) }
	first, err := resultDir(parent, say)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(parent, "run-old/lists"), 0o755); err != nil {
		t.Fatal(err)
	}
	second, err := resultDir(parent, say)
	if err != nil {
		t.Fatal(err)
	}
	if dirs, err := filepath.Glob(filepath.Join(parent, "run-*")); err != nil || len(dirs) != 2 || len(said) != 1 || !strings.Contains(said[0], "results of 1 earlier demos") {
		t.Errorf("there are %q, %v, said %q; want both that go on", dirs, err, said)
	}
	if err := errors.Join(first.held.Close(), second.held.Close()); err != nil {
		t.Fatal(err)
	}
	third, err := resultDir(parent, say)
	if err != nil {
		t.Fatal(err)
	}
	defer third.held.Close()
	if dirs, err := filepath.Glob(filepath.Join(parent, "run-*")); err != nil || len(dirs) != 1 || dirs[0] != third.dir {
		t.Errorf("there are %q, %v, want %s", dirs, err, third.dir)
	}
}

func TestBadImage(t *testing.T) {
	staticImage(t)
	for image, want := range map[string]string{"UPPER CASE": "IMAGE=", "oci:" + os.DevNull: "index.json"} {
		err := run(t.Context(), options{image: image, times: 1, dir: t.TempDir()}, io.Discard, io.Discard)
		if err == nil {
			t.Errorf("run(%q) = nil, want an error about %s", image, want)
		}
	}
}

// trigger calls do a moment after word was written.
type trigger struct {
	word string
	do   func()
}

func (g *trigger) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte(g.word)) {
		time.AfterFunc(300*time.Millisecond, g.do)
	}
	return len(p), nil
}
