// Command nriprobe is an NRI plugin that does nothing but append the names of
// the hooks that it hears of to the file that its configuration names.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

type probe struct{ path string }

func main() {
	s, err := stub.New(&probe{})
	if err == nil {
		err = s.Run(context.Background())
	}
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "nriprobe:", err)
		os.Exit(1)
	}
}

func (p *probe) Configure(_ context.Context, config, runtime, _ string) (api.EventMask, error) {
	p.path = strings.TrimSpace(config)
	return 0, p.note("Configure " + runtime)
}

func (p *probe) StartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("StartContainer " + c.GetName())
}

func (p *probe) RemoveContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("RemoveContainer " + c.GetName())
}

func (p *probe) note(line string) (err error) {
	f, err := os.OpenFile(p.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = f.WriteString(line + "\n")
	return err
}
