package tools

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tailSize is how many bytes of a failed command's output an error quotes.
const tailSize = 4 << 10

// build makes p in a directory beside its place and renames it into place, so
// that a package is there as a whole or not at all. The caller holds p's lock.
func (s *Store) build(ctx context.Context, p Package) (err error) {
	stale, err := filepath.Glob(filepath.Join(s.dir, ".tmp-"+p.String()+"-*"))
	if err != nil {
		return err
	}
	for _, dir := range stale { // of a process that was killed: we hold the lock
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	tmp, err := os.MkdirTemp(s.dir, ".tmp-"+p.String()+"-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	out := filepath.Join(tmp, "out")
	bin := filepath.Join(out, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	switch p.kind {
	case goInstall:
		err = s.goInstall(ctx, p, tmp, bin)
	case goScratch:
		err = s.goScratch(ctx, p, tmp, bin)
	case cargoCrate:
		err = s.cargoInstall(ctx, p, tmp, out)
	default:
		err = fmt.Errorf("tools: kind %d cannot be built", p.kind)
	}
	if err != nil {
		return err
	}
	final := filepath.Join(s.dir, p.String())
	if err := os.RemoveAll(final); err != nil { // incomplete, or we would not be here
		return err
	}
	return os.Rename(out, final)
}

func (s *Store) goInstall(ctx context.Context, p Package, tmp, bin string) error {
	args := []string{"install", "-trimpath"}
	for _, src := range p.source {
		args = append(args, src+"@"+p.Version)
	}
	s.sayf("installing %s: go %s", p, strings.Join(args, " "))
	return s.run(ctx, p, command{
		dir: tmp, name: "go", args: args,
		env: []string{"GOBIN=" + bin, "CGO_ENABLED=0", "GOWORK=off", "GOOS=", "GOARCH="},
	})
}

// goScratch builds a main package in a module of its own: go install refuses
// modules with replace directives, as runc's is. cgo stays on, because runc
// enters namespaces in C; libseccomp is not asked for.
func (s *Store) goScratch(ctx context.Context, p Package, tmp, bin string) error {
	src := filepath.Join(tmp, "src")
	if err := os.Mkdir(src, 0o755); err != nil {
		return err
	}
	env := []string{"CGO_ENABLED=1", "GOWORK=off", "GOOS=", "GOARCH="}
	for _, pkg := range p.source {
		s.sayf("installing %s: go build %s in a scratch module", p, pkg)
		for _, args := range [][]string{
			{"mod", "init", "scratch"},
			{"get", pkg + "@" + p.Version},
			{"build", "-mod=mod", "-trimpath", "-o", filepath.Join(bin, filepath.Base(pkg)), pkg},
		} {
			if err := s.run(ctx, p, command{dir: src, name: "go", args: args, env: env}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Store) cargoInstall(ctx context.Context, p Package, tmp, out string) error {
	args := []string{"install", p.source[0] + "@" + p.Version, "--locked", "--root", out}
	s.sayf("installing %s: cargo %s (about ten minutes on two cores)", p, strings.Join(args[:3], " "))
	return s.run(ctx, p, command{
		dir: tmp, name: "cargo", args: args,
		env: []string{"CARGO_TARGET_DIR=" + filepath.Join(tmp, "target")},
	})
}

// command is one program to run.
type command struct {
	dir  string
	name string
	args []string
	env  []string // added to our own
}

// run runs c, says every half minute that it still does, and quotes the end of
// its output when it fails. Cancelling ctx ends the whole process group.
func (s *Store) run(ctx context.Context, p Package, c command) error {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, c.name, c.args...)
	cmd.Dir = c.dir
	cmd.Env = append(os.Environ(), c.env...)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second

	start := time.Now()
	done := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(30 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				s.sayf("still installing %s (%.0f s)", p, time.Since(start).Seconds())
			case <-done:
				return
			}
		}
	}()
	err := cmd.Run()
	close(done)
	<-stopped
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		text := out.Bytes()
		if len(text) > tailSize {
			text = text[len(text)-tailSize:]
		}
		return fmt.Errorf("%s %s: %w\n%s", c.name, strings.Join(c.args, " "), err, bytes.TrimSpace(text))
	}
	return nil
}
