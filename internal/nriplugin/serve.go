package nriplugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	nrinet "github.com/containerd/nri/pkg/net"
	"github.com/containerd/nri/pkg/stub"
	"go.uber.org/zap"
)

// The name and index that a plugin started by hand registers with when it is told none
// and its file's name has none.
const (
	DefaultName = "optimizer-nri-plugin"
	DefaultIdx  = "02"
)

// ServeOptions says where the runtime is.
type ServeOptions struct {
	// Name and Idx are what the plugin registers as; empty: from the file's name, else the defaults.
	Name, Idx string
	// Socket is NRI's socket for plugins started by hand; empty: NRI's default.
	Socket string
	// Launch is the connection that the runtime made when it launched the plugin; nil: started by hand.
	Launch *Launch
	// Backoff is the wait before the n-th attempt to connect, n from 1; nil: 100 ms doubling to 5 s.
	Backoff func(n int) time.Duration
}

// Launch is what a plugin that the runtime launched got from it.
type Launch struct {
	Name, Idx string
	Conn      net.Conn
}

// Launched returns what the runtime left in the environment, or nil when it did not launch this
// process. It takes the connection: the variables are unset and no child inherits it,
// so that the runtime sees at once when this process dies. Call it first in main.
func Launched() (*Launch, error) {
	env := os.Getenv(api.PluginSocketEnvVar)
	if env == "" {
		return nil, nil
	}
	fd, err := strconv.Atoi(env)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("%s=%q: want the number of a descriptor", api.PluginSocketEnvVar, env)
	}
	conn, err := nrinet.NewFdConn(fd)
	if err != nil {
		return nil, fmt.Errorf("%s=%q: %w", api.PluginSocketEnvVar, env, err)
	}
	l := &Launch{Name: os.Getenv(api.PluginNameEnvVar), Idx: os.Getenv(api.PluginIdxEnvVar), Conn: conn}
	for _, v := range []string{api.PluginSocketEnvVar, api.PluginNameEnvVar, api.PluginIdxEnvVar} {
		if err := os.Unsetenv(v); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// identity fills in the name and index.
func (o *ServeOptions) identity() error {
	if o.Launch != nil {
		o.Name, o.Idx = o.Launch.Name, o.Launch.Idx
	}
	idx, name, err := api.ParsePluginName(filepath.Base(os.Args[0]))
	if err != nil {
		idx, name = DefaultIdx, DefaultName
	}
	if o.Name == "" {
		o.Name = name
	}
	if o.Idx == "" {
		o.Idx = idx
	}
	if err := api.CheckPluginIndex(o.Idx); err != nil {
		return fmt.Errorf("index %q: %w", o.Idx, err)
	}
	return nil
}

// Serve connects p to the runtime and serves it until ctx ends. A plugin that was
// launched serves one connection and returns nil when it has ended; one started by hand connects
// again, also to a runtime that is not up yet. Errors are those of a launched plugin's
// registration, and of options.
func Serve(ctx context.Context, p *Plugin, o ServeOptions) error {
	if err := o.identity(); err != nil {
		return err
	}
	if o.Socket == "" {
		o.Socket = api.DefaultSocketPath
	}
	if o.Backoff == nil {
		o.Backoff = func(n int) time.Duration { return min(100*time.Millisecond<<min(n-1, 6), 5*time.Second) }
	}
	if o.Launch != nil {
		_, err := p.serveConn(ctx, o, o.Launch.Conn)
		return err
	}
	p.connectAgain(ctx, o)
	return nil
}

// connectAgain serves one connection after the other until ctx ends.
func (p *Plugin) connectAgain(ctx context.Context, o ServeOptions) {
	for failures := 0; ctx.Err() == nil; {
		served, err := p.dial(ctx, o)
		if ctx.Err() != nil {
			return
		}
		if served {
			failures = 0
			p.log().Info("the connection to the runtime ended, connecting again", zap.String("socket", o.Socket))
		}
		failures++
		if err != nil && (failures == 1 || failures%12 == 0) {
			p.log().Warn("not connected to the runtime, trying again", zap.String("socket", o.Socket), zap.Int("attempt", failures), zap.Error(err))
		}
		t := time.NewTimer(o.Backoff(failures))
		select {
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

func (p *Plugin) dial(ctx context.Context, o ServeOptions) (served bool, err error) {
	var d net.Dialer
	ctxDial, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := d.DialContext(ctxDial, "unix", o.Socket)
	if err != nil {
		return false, err
	}
	return p.serveConn(ctx, o, conn)
}

// serveConn serves one connection until it or ctx ends; served tells whether the runtime configured us.
func (p *Plugin) serveConn(ctx context.Context, o ServeOptions, c net.Conn) (served bool, err error) {
	conn := &watchedConn{Conn: c, down: make(chan struct{})}
	defer conn.Close() //nolint:errcheck // it has ended
	st, err := stub.New(p, stub.WithPluginName(o.Name), stub.WithPluginIdx(o.Idx), stub.WithConnection(conn),
		stub.WithOnClose(func() {}), stub.WithLogger(nriLogger{p.log}))
	if err != nil {
		return false, fmt.Errorf("make the plugin's stub: %w", err)
	}
	started := make(chan error, 1)
	// In a goroutine of its own, which may stay: Start waits for Configure and does not
	// notice that the connection ended before (nri v0.12.5, pkg/stub).
	go func() { started <- st.Start(ctx) }()
	select {
	case err := <-started:
		if err != nil {
			return false, fmt.Errorf("register with the runtime: %w", err)
		}
	case <-conn.down:
		return false, errors.New("register with the runtime: it closed the connection")
	case <-ctx.Done():
		return false, nil
	}
	select {
	case <-conn.down:
	case <-ctx.Done():
	}
	// Stop takes a lock that the stub's own end may hold while it waits for its server.
	stopped := make(chan struct{})
	go func() {
		st.Stop()
		close(stopped)
	}()
	waitFor(context.WithoutCancel(ctx), stopped, time.Second)
	return true, nil
}

// watchedConn closes down when the connection has ended, whichever side ended it.
type watchedConn struct {
	net.Conn
	once sync.Once
	down chan struct{}
}

func (c *watchedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.end()
	}
	return n, err
}

func (c *watchedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil {
		c.end()
	}
	return n, err
}

// Close closes the connection.
func (c *watchedConn) Close() error {
	c.end()
	return c.Conn.Close()
}

func (c *watchedConn) end() { c.once.Do(func() { close(c.down) }) }
