package testcri_test

import (
	"bufio"
	"context"
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
	"github.com/headstart-oci/headstart/internal/tools"
)

// abandon runs in a process of its own: it starts a container, says where, and
// waits to be killed.
func abandon(ctx context.Context) error {
	e, err := testcri.Start(ctx, testcri.Options{})
	if err != nil {
		return err
	}
	hello, err := tools.BuildCommand(ctx, helloPackage)
	if err != nil {
		return err
	}
	img, err := testcri.StaticImage(hello, nil)
	if err != nil {
		return err
	}
	if err := e.Import(ctx, helloRef, img); err != nil {
		return err
	}
	p, err := e.RunPod(ctx, testcri.PodOptions{})
	if err != nil {
		return err
	}
	c, err := p.Create(ctx, testcri.ContainerOptions{Image: helloRef, Args: []string{"sleep"}})
	if err != nil {
		return err
	}
	if _, err := c.Start(ctx); err != nil {
		return err
	}
	fmt.Printf("abandoned %s\n", e.Dir())
	time.Sleep(time.Minute)
	return errors.New("nobody killed this process")
}

func TestStartSweepsUpAfterAKilledProcess(t *testing.T) {
	testenv.Root(t)
	testenv.Tool(t, "containerd")
	testenv.Tool(t, "runc")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), abandonEnv+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	wait := testenv.Start(t, cmd)
	line, err := bufio.NewReader(out).ReadString('\n')
	dir, ok := strings.CutPrefix(strings.TrimSpace(line), "abandoned ")
	if err != nil || !ok {
		t.Fatalf("the process to kill said %q, %v", line, err)
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
