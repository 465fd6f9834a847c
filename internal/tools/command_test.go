package tools_test

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/tools"
)

func TestBuildCommand(t *testing.T) {
	first, err := tools.BuildCommand(t.Context(), "./internal/tools/cmd/tools")
	if err != nil {
		t.Fatal(err)
	}
	second, err := tools.BuildCommand(t.Context(), "./internal/tools/cmd/tools")
	if err != nil {
		t.Fatal(err)
	}
	if first != second || filepath.Base(first) != "tools" {
		t.Errorf("BuildCommand = %s, then %s, want one path that ends in tools", first, second)
	}
	out, err := exec.Command(first, "list").Output()
	if err != nil || !strings.Contains(string(out), "containerd@") {
		t.Errorf("tools list = %q, %v, want a line for containerd", out, err)
	}
	if _, err := tools.BuildCommand(t.Context(), "./cmd/no-such-command"); err == nil {
		t.Error("BuildCommand(./cmd/no-such-command) succeeded")
	}
}
