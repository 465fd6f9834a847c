package testcri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PodOptions describes a pod sandbox. The zero value is a pod with a name of its
// own in the Kubernetes namespace default.
type PodOptions struct {
	Name        string
	Namespace   string
	Labels      map[string]string
	Annotations map[string]string
	Privileged  bool                  // it may have privileged containers
	HostPID     bool                  // it shares the host's process ids
	Users       *runtimeapi.IDMapping // where the pod's users begin on the host, as hostUsers: false asks for; nil: they are the host's
}

// Pod is a running pod sandbox on the host's network.
type Pod struct {
	ID string

	env        *Env
	config     *runtimeapi.PodSandboxConfig
	namespaces *runtimeapi.NamespaceOption
}

// ContainerOptions describes a container. Only Image is required.
type ContainerOptions struct {
	Image       string   // reference or ID; must be in the image store
	Name        string   // empty: main
	Command     []string // replaces the image's entrypoint
	Args        []string // replaces the image's command
	Env         []string // KEY=value
	WorkingDir  string
	Labels      map[string]string
	Annotations map[string]string
	Mounts      []*runtimeapi.Mount
	Privileged  bool
	Attempt     uint32 // how often a container of this name was started before in the pod
	ReadOnly    bool   // the root filesystem
}

// Container is a container of a [Pod].
type Container struct {
	ID string

	pod     *Pod
	logPath string
}

// Result is what a container left.
type Result struct {
	ExitCode  int32
	Reason    string        // the CRI's word for its end, such as Completed, Error, StartError
	Stdout    []byte        // all of it
	Stderr    []byte        // all of it
	StartTime time.Duration // wall time of the StartContainer call
}

// RunPod starts a pod sandbox.
func (e *Env) RunPod(ctx context.Context, o PodOptions) (*Pod, error) {
	e.mu.Lock()
	e.pods++
	serial := e.pods
	e.mu.Unlock()
	if o.Name == "" {
		o.Name = fmt.Sprintf("pod-%d", serial)
	}
	if o.Namespace == "" {
		o.Namespace = "default"
	}
	logs := filepath.Join(e.dir, fmt.Sprintf("logs-%d", serial))
	if err := os.Mkdir(logs, 0o755); err != nil {
		return nil, err
	}
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: o.Name, Namespace: o.Namespace, Uid: fmt.Sprintf("%s-%d", e.id, serial)},
		LogDirectory: logs,
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"127.0.0.1"}}, // the host may have no resolv.conf
		Labels:       o.Labels,
		Annotations:  o.Annotations,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    cgroupParent(e.id),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: o.namespaces(), Privileged: o.Privileged},
		},
	}
	r, err := e.Runtime().RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		return nil, fmt.Errorf("run pod %s: %w", o.Name, err)
	}
	return &Pod{ID: r.GetPodSandboxId(), env: e, config: config, namespaces: o.namespaces()}, nil
}

// namespaces returns what the pod shares with the host: its network, and what o says.
func (o *PodOptions) namespaces() *runtimeapi.NamespaceOption {
	n := &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE, Pid: runtimeapi.NamespaceMode_CONTAINER}
	if o.HostPID {
		n.Pid = runtimeapi.NamespaceMode_NODE
	}
	if m := o.Users; m != nil {
		n.UsernsOptions = &runtimeapi.UserNamespace{
			Mode: runtimeapi.NamespaceMode_POD, Uids: []*runtimeapi.IDMapping{m}, Gids: []*runtimeapi.IDMapping{m},
		}
	}
	return n
}

// Stop ends the pod's containers and its sandbox.
func (p *Pod) Stop(ctx context.Context) error {
	_, err := p.env.Runtime().StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID})
	return err
}

// Remove removes the pod and its containers, and stops what runs.
func (p *Pod) Remove(ctx context.Context) error {
	if err := p.Stop(ctx); err != nil {
		return err
	}
	_, err := p.env.Runtime().RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID})
	return err
}

// Create creates a container in the pod and does not start it.
func (p *Pod) Create(ctx context.Context, o ContainerOptions) (*Container, error) {
	if o.Name == "" {
		o.Name = "main"
	}
	config := &runtimeapi.ContainerConfig{
		Metadata:    &runtimeapi.ContainerMetadata{Name: o.Name, Attempt: o.Attempt},
		Image:       &runtimeapi.ImageSpec{Image: o.Image},
		Command:     o.Command,
		Args:        o.Args,
		WorkingDir:  o.WorkingDir,
		Labels:      o.Labels,
		Annotations: o.Annotations,
		Mounts:      o.Mounts,
		LogPath:     o.Name + ".log",
		Linux: &runtimeapi.LinuxContainerConfig{
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: p.namespaces, Privileged: o.Privileged, ReadonlyRootfs: o.ReadOnly,
			},
		},
	}
	for _, kv := range o.Env {
		key, value, _ := strings.Cut(kv, "=")
		config.Envs = append(config.Envs, &runtimeapi.KeyValue{Key: key, Value: []byte(value)})
	}
	r, err := p.env.Runtime().CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: p.ID, Config: config, SandboxConfig: p.config,
	})
	if err != nil {
		return nil, fmt.Errorf("create container %s of %s: %w", o.Name, o.Image, err)
	}
	return &Container{ID: r.GetContainerId(), pod: p, logPath: filepath.Join(p.config.GetLogDirectory(), config.GetLogPath())}, nil
}

// Start starts the container and returns the wall time of the call, NRI hooks
// included.
func (c *Container) Start(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	_, err := c.pod.env.Runtime().StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ID})
	took := time.Since(start)
	if err != nil {
		return took, fmt.Errorf("start container %.12s: %w", c.ID, err)
	}
	return took, nil
}

// Status returns what the CRI says of the container.
func (c *Container) Status(ctx context.Context) (*runtimeapi.ContainerStatus, error) {
	r, err := c.pod.env.Runtime().ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.ID})
	if err != nil {
		return nil, err
	}
	return r.GetStatus(), nil
}

// PID returns the process ID of the container's init on the host.
func (c *Container) PID(ctx context.Context) (int, error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	container, err := c.pod.env.Client().LoadContainer(ctx, c.ID)
	if err != nil {
		return 0, err
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		return 0, err
	}
	return int(task.Pid()), nil
}

// Wait returns the container's exit code once it has ended. It asks the CRI
// every few milliseconds, and goes on when containerd restarts meanwhile.
func (c *Container) Wait(ctx context.Context) (int32, error) {
	s, err := c.wait(ctx)
	return s.GetExitCode(), err
}

func (c *Container) wait(ctx context.Context) (*runtimeapi.ContainerStatus, error) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		s, err := c.Status(ctx)
		if err == nil && s.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED {
			return s, nil
		}
		if err != nil && ctx.Err() == nil && !restarting(err) {
			return nil, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for container %.12s: %w", c.ID, ctx.Err())
		}
	}
}

// restarting says whether err is what calls return while containerd is down or
// coming up: the connection is closed, refused, or the CRI is not ready.
func restarting(err error) bool {
	code := status.Code(err)
	return code == codes.Unavailable || code == codes.Canceled
}

// Logs returns what the container has written so far.
func (c *Container) Logs() (stdout, stderr []byte, err error) {
	text, err := os.ReadFile(c.logPath)
	if err != nil {
		return nil, nil, err
	}
	stdout, stderr = parseLog(text)
	return stdout, stderr, nil
}

// parseLog splits a log of the CRI: lines of time, stream, F or P (full, or part
// of a line that goes on) and text.
func parseLog(text []byte) (stdout, stderr []byte) {
	for line := range bytes.Lines(text) {
		f := bytes.SplitN(line, []byte(" "), 4)
		if len(f) < 4 {
			continue
		}
		content := f[3]
		if !bytes.HasPrefix(f[2], []byte("F")) {
			content = bytes.TrimSuffix(content, []byte("\n"))
		}
		if string(f[1]) == "stderr" {
			stderr = append(stderr, content...)
		} else {
			stdout = append(stdout, content...)
		}
	}
	return stdout, stderr
}

// Exec runs a command in the running container and returns its output and exit
// code.
func (c *Container) Exec(ctx context.Context, command ...string) (stdout, stderr []byte, exit int32, err error) {
	r, err := c.pod.env.Runtime().ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.ID, Cmd: command})
	if err != nil {
		return nil, nil, 0, fmt.Errorf("exec in container %.12s: %w", c.ID, err)
	}
	return r.GetStdout(), r.GetStderr(), r.GetExitCode(), nil
}

// Stop ends the container: SIGTERM, and SIGKILL after grace, in whole seconds.
func (c *Container) Stop(ctx context.Context, grace time.Duration) error {
	_, err := c.pod.env.Runtime().StopContainer(ctx, &runtimeapi.StopContainerRequest{
		ContainerId: c.ID, Timeout: int64(grace / time.Second),
	})
	return err
}

// Remove removes the container, which must have ended.
func (c *Container) Remove(ctx context.Context) error {
	_, err := c.pod.env.Runtime().RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.ID})
	return err
}

// Run runs a container to its end in a pod of its own, and removes both.
func (e *Env) Run(ctx context.Context, o ContainerOptions) (res Result, err error) {
	p, err := e.RunPod(ctx, PodOptions{})
	if err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, p.Remove(context.WithoutCancel(ctx))) }()
	c, err := p.Create(ctx, o)
	if err != nil {
		return Result{}, err
	}
	if res.StartTime, err = c.Start(ctx); err != nil {
		return res, err
	}
	s, err := c.wait(ctx)
	if err != nil {
		return res, err
	}
	res.ExitCode, res.Reason = s.GetExitCode(), s.GetReason()
	res.Stdout, res.Stderr, err = c.Logs()
	return res, err
}
