package workload

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// programs holds the sources of the static programs that images carry.
//
//go:embed programs
var programs embed.FS

// programInputs returns what the binary of a program depends on.
func programInputs(ctx context.Context, name string) ([]string, error) {
	version, err := goEnv(ctx, "GOVERSION")
	if err != nil {
		return nil, err
	}
	arch, err := goEnv(ctx, "GOARCH")
	if err != nil {
		return nil, err
	}
	src, err := programs.ReadFile(path.Join("programs", name, "main.go"))
	if err != nil {
		return nil, err
	}
	return []string{version, arch, string(src)}, nil
}

// compile builds the program into a static binary and returns its bytes; scratch is a
// directory for its use.
func compile(ctx context.Context, name, scratch string) ([]byte, error) {
	src, err := programs.ReadFile(path.Join("programs", name, "main.go"))
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(scratch, "src-"+name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "main.go"), src, 0o644); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module "+name+"\n\ngo 1.25\n"), 0o644); err != nil {
		return nil, err
	}
	out := filepath.Join(dir, name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=", "GOWORK=off")
	if err := run(cmd); err != nil {
		return nil, fmt.Errorf("compile %s: %w", name, err)
	}
	return os.ReadFile(out)
}

func goEnv(ctx context.Context, name string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "env", name)
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("%w: no go command: %w", ErrUnavailable, err)
	}
	if err != nil {
		return "", fmt.Errorf("go env %s: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// run runs cmd; its error ends with the last lines that cmd said.
func run(cmd *exec.Cmd) error {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if err == nil {
		return nil
	}
	said := strings.TrimSpace(out.String())
	if lines := strings.Split(said, "\n"); len(lines) > 5 {
		said = strings.Join(lines[len(lines)-5:], "\n")
	}
	return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, said)
}
