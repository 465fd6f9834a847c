package metrics

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Path is where metrics are served.
const Path = "/metrics"

// unixPrefix marks an address that is the path of a socket.
const unixPrefix = "unix:"

// maxSocketPath is the length of sun_path without its closing NUL; unix(7).
const maxSocketPath = len(unix.RawSockaddrUnix{}.Path) - 1

// CheckAddress returns nil for an address that [Server.Listen] takes: "HOST:PORT" with a host of the
// loopback interface, "unix:" and an absolute path, or nothing. The metrics name no image and no
// pod, but a node's are nobody's business outside of it: a proxy with authentication may serve them.
func CheckAddress(address string) error {
	if address == "" {
		return nil
	}
	if path, ok := strings.CutPrefix(address, unixPrefix); ok {
		if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) || len(path) > maxSocketPath {
			return fmt.Errorf("got %q, want unix: and an absolute path of at most %d bytes", address, maxSocketPath)
		}
		return nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("got %q, want HOST:PORT or unix:PATH", address)
	}
	if _, err := net.LookupPort("tcp", port); err != nil || port == "" {
		return fmt.Errorf("got %q, want a port after the colon", address)
	}
	if host == "localhost" {
		return nil
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
		return fmt.Errorf("got %q, want a host of the loopback interface (127.0.0.1, ::1, localhost) or unix:PATH", address)
	}
	return nil
}

// Server serves metrics at one address at a time. The zero value serves nothing; Close it. Its methods
// are safe for concurrent use.
type Server struct {
	mu      sync.Mutex // guards what follows
	address string
	server  *http.Server
	done    chan struct{}
	closed  bool
	unlink  func() error
	quit    chan struct{} // ends the attempts to get an address that was taken; nil: there are none
}

// again is how often an address that was taken is tried.
const again = time.Second

// errTaken: somebody else serves there. It may be the plugin before this one, which is about to end.
var errTaken = errors.New("somebody listens there")

// Listen serves m at address from its return on, in place of what was served before; the same address is
// left as it is. An empty address ends serving. On an error nothing is served, except where the address is taken: that is
// served once it is free, unless Listen is called again before or Close is.
func (s *Server) Listen(address string, m *Metrics) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || address == s.address && (s.server != nil) == (address != "") {
		return nil
	}
	err := s.end()
	if address == "" {
		return err
	}
	if err := CheckAddress(address); err != nil {
		return fmt.Errorf("metrics address: %w", err)
	}
	err = s.serve(address, m)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errTaken), errors.Is(err, unix.EADDRINUSE):
		quit := make(chan struct{})
		s.quit = quit
		go s.insist(quit, address, m)
		return fmt.Errorf("serve metrics at %s: %w, until it is free", address, err)
	}
	return fmt.Errorf("serve metrics at %s: %w", address, err)
}

// insist tries to serve at an address until it does or quit is closed.
func (s *Server) insist(quit chan struct{}, address string, m *Metrics) {
	tick := time.NewTicker(again)
	defer tick.Stop()
	for {
		select {
		case <-quit:
			return
		case <-tick.C:
		}
		s.mu.Lock()
		over := s.quit != quit
		if !over && s.serve(address, m) == nil {
			s.quit, over = nil, true
		}
		s.mu.Unlock()
		if over {
			return
		}
	}
}

// serve serves m at address. Called with mu held, when nothing is served.
func (s *Server) serve(address string, m *Metrics) error {
	l, unlink, err := listen(address)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("GET "+Path, m.Handler())
	// Bounds for clients that never end their request or never read.
	server := &http.Server{Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l) // ErrServerClosed, or the listener is gone: then nothing is served
	}()
	s.address, s.server, s.done, s.unlink = address, server, done, unlink
	return nil
}

// Close ends serving, for good.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return s.end()
}

func (s *Server) end() error {
	if s.quit != nil {
		close(s.quit)
		s.quit = nil
	}
	if s.server == nil {
		return nil
	}
	err := s.server.Close()
	<-s.done
	err = errors.Join(err, s.unlink())
	s.address, s.server, s.done, s.unlink = "", nil, nil, nil
	return err
}

// listen returns a listener, and what removes the socket of a Unix one if that is still ours.
func listen(address string) (net.Listener, func() error, error) {
	path, ok := strings.CutPrefix(address, unixPrefix)
	if !ok {
		l, err := net.Listen("tcp", address)
		return l, func() error { return nil }, err
	}
	if err := removeDead(path); err != nil {
		return nil, nil, err
	}
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // by us, when it is ours
	ours, err := os.Lstat(path)
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		return nil, nil, errors.Join(err, l.Close())
	}
	return l, func() error {
		now, err := os.Lstat(path)
		if err != nil || !os.SameFile(ours, now) {
			return nil //nolint:nilerr // another one's, or gone
		}
		return os.Remove(path)
	}, nil
}

// removeDead removes a socket that nobody listens on: a plugin that was killed left it.
func removeDead(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is there and no socket", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		return errors.Join(fmt.Errorf("%s: %w", path, errTaken), c.Close())
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}
