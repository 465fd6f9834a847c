package testcri_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/testenv/procfs"
)

// TestAbandon is not a test: TestStartSweepsUp runs it in another process and
// kills that while a container runs.
func TestAbandon(t *testing.T) {
	if os.Getenv("TESTCRI_ABANDON") == "" {
		t.SkipNow()
	}
	e := critest.Start(t, testcri.Options{})
	importHello(t, e)
	p, err := e.RunPod(t.Context(), testcri.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.Create(t.Context(), testcri.ContainerOptions{Image: helloRef, Args: []string{"sleep"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("\nabandoned %s\n", e.Dir())
	time.Sleep(time.Minute)
	t.Fatal("nobody killed this process")
}

func TestStartSweepsUpAfterAKilledProcess(t *testing.T) {
	testenv.Root(t)
	testenv.Tool(t, "containerd")
	testenv.Tool(t, "runc")
	cmd := exec.Command(os.Args[0], "-test.run=^TestAbandon$", "-test.v")
	cmd.Env = append(os.Environ(), "TESTCRI_ABANDON=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	wait := testenv.Start(t, cmd)
	var dir string
	var text strings.Builder
	for s := bufio.NewScanner(out); dir == "" && s.Scan(); {
		dir, _ = strings.CutPrefix(s.Text(), "abandoned ")
		if dir == s.Text() {
			dir = ""
			fmt.Fprintln(&text, s.Text())
		}
	}
	if dir == "" {
		t.Fatalf("the process to kill said:\n%s", text.String())
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := wait(); err == nil {
		t.Fatal("the killed process ended well")
	}
	if mounts, err := procfs.MountsBelow(dir); err != nil || len(mounts) == 0 {
		t.Fatalf("MountsBelow(%s) = %q, %v, want what was abandoned", dir, mounts, err)
	}
	critest.Start(t, testcri.Options{})
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stat %s after Start = %v, want ErrNotExist", dir, err)
	}
	// What is left in processes and mounts, TestMain finds.
}
