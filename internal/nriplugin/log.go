package nriplugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// LogFileNone is the log_file that means none.
const LogFileNone = "none"

// logName is the file under PersistDir that a plugin launched by containerd logs to: containerd gives it no stderr.
const logName = "optimizer-nri-plugin.log"

// maxLogFile is when a log file becomes FILE.1, in bytes.
const maxLogFile = 16 << 20

// NewLogger returns a logger that writes lines for people to stderr and JSON lines to the
// configured file; see [Config.LogFile] for launched. The file is created with its
// directory, and moved to FILE.1 at 16 MiB. An error about a file that the configuration
// names is returned; the default file is done without. The caller closes the second result.
func NewLogger(c *Config, stderr io.Writer, launched bool) (*zap.Logger, io.Closer, error) {
	level, err := zapcore.ParseLevel(c.LogLevel)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: key log_level: %w", ErrConfig, err)
	}
	enc := zap.NewProductionEncoderConfig()
	enc.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	enc.EncodeDuration = zapcore.StringDurationEncoder
	cores := []zapcore.Core{zapcore.NewCore(zapcore.NewConsoleEncoder(enc), zapcore.Lock(zapcore.AddSync(stderr)), level)}
	path := c.LogFile
	if path == "" && launched {
		path = filepath.Join(c.PersistDir, logName)
	}
	var closer io.Closer = io.NopCloser(nil)
	if path != "" && path != LogFileNone {
		f, err := openLog(path)
		switch {
		case err == nil:
			closer = f
			cores = append(cores, zapcore.NewCore(zapcore.NewJSONEncoder(enc), f, level))
		case c.LogFile != "":
			return nil, nil, fmt.Errorf("key log_file: %w", err)
		}
	}
	return zap.New(zapcore.NewTee(cores...)), closer, nil
}

// logFile is a file that is moved aside when it has grown. Safe for concurrent use.
type logFile struct {
	path string

	mu   sync.Mutex // guards what follows
	f    *os.File
	size int64
}

func openLog(path string) (*logFile, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	l := &logFile{path: path}
	return l, l.open()
}

func (l *logFile) open() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.f, l.size = f, info.Size()
	return nil
}

func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return 0, fs.ErrClosed
	}
	if l.size > 0 && l.size+int64(len(p)) > maxLogFile {
		if err := l.rotate(); err != nil {
			return 0, err
		}
	}
	n, err := l.f.Write(p)
	l.size += int64(n)
	return n, err
}

// rotate moves the file aside, unless another process sharing it did so already.
func (l *logFile) rotate() error {
	ours, err := l.f.Stat()
	if err == nil {
		if now, serr := os.Stat(l.path); serr == nil && os.SameFile(ours, now) {
			err = os.Rename(l.path, l.path+".1")
		}
	}
	if err != nil {
		return err
	}
	old := l.f
	if err := l.open(); err != nil {
		return err
	}
	return old.Close()
}

// Sync is a no-op: lines are handed to the kernel one by one.
func (l *logFile) Sync() error { return nil }

// Close closes the file; later lines are dropped.
func (l *logFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	f := l.f
	l.f = nil
	return f.Close()
}

// nriLogger gives NRI's own messages to zap, at a level below its: they are about every connection.
type nriLogger struct{ log func() *zap.Logger }

func (n nriLogger) Debugf(_ context.Context, f string, a ...any) { n.log().Debug(fmt.Sprintf(f, a...)) }

func (n nriLogger) Infof(_ context.Context, f string, a ...any) { n.log().Debug(fmt.Sprintf(f, a...)) }

func (n nriLogger) Warnf(_ context.Context, f string, a ...any) { n.log().Warn(fmt.Sprintf(f, a...)) }

func (n nriLogger) Errorf(_ context.Context, f string, a ...any) { n.log().Warn(fmt.Sprintf(f, a...)) }
