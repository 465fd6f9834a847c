package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer/server"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestParse(t *testing.T) {
	const files = server.DefaultMaxFiles
	tests := map[string]struct {
		args []string
		env  map[string]string
		want server.Config
		err  string
	}{
		"flags":           {args: []string{"--pid", "7", "--root", "/x", "--max-files", "5"}, want: server.Config{PID: 7, Root: "/x", MaxFiles: 5}},
		"running":         {args: []string{"--pid", "7", "--attach"}, want: server.Config{PID: 7, Attach: true, MaxFiles: files}},
		"pid only":        {args: []string{"-pid=7"}, want: server.Config{PID: 7, MaxFiles: files}},
		"upstream":        {env: map[string]string{"_MNTNS_PID": "7", "_TARGET": "/"}, want: server.Config{PID: 7, Root: "/", MaxFiles: files}},
		"flags win":       {args: []string{"--pid", "8"}, env: map[string]string{"_MNTNS_PID": "7"}, want: server.Config{PID: 8, MaxFiles: files}},
		"nothing":         {err: "--pid is 0, want a process id"},
		"negative":        {args: []string{"--pid", "-1"}, err: "--pid is -1"},
		"no number":       {args: []string{"--pid", "x"}, err: `invalid value "x"`},
		"env, no number":  {env: map[string]string{"_MNTNS_PID": "7x"}, err: `_MNTNS_PID is "7x"`},
		"no files":        {args: []string{"--pid", "7", "--max-files", "0"}, err: "--max-files is 0, want at least 1"},
		"argument":        {args: []string{"--pid", "7", "more"}, err: `unexpected argument "more"`},
		"ahead of what":   {args: []string{"--pid", "7", "--pages-ahead"}, err: "--pages-ahead is for --pages"},
		"no instance":     {args: []string{"--pid", "7", "--pages", "1,false"}, err: "no instance of tracefs came along"},
		"unknown flag":    {args: []string{"--what"}, err: "flag provided but not defined"},
		"flag, not usage": {args: []string{"--pid"}, err: "flag needs an argument"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var stderr bytes.Buffer
			got, err := parse(tt.args, -1, func(k string) string { return tt.env[k] }, &stderr)
			if tt.err != "" {
				if !errors.Is(err, errUsage) || !strings.Contains(err.Error(), tt.err) || got != (server.Config{}) {
					t.Errorf("parse = %+v, %v; want %q", got, err, tt.err)
				}
				return
			}
			if err != nil || got != tt.want {
				t.Errorf("parse = %+v, %v; want %+v", got, err, tt.want)
			}
		})
	}
	var stderr bytes.Buffer
	if _, err := parse([]string{"--help"}, -1, os.Getenv, &stderr); !errors.Is(err, flag.ErrHelp) || !strings.Contains(stderr.String(), "_MNTNS_PID") {
		t.Errorf("parse(--help) = %v, says %q", err, stderr.String())
	}
}

func TestRunUsage(t *testing.T) {
	var stderr bytes.Buffer
	if err := run(context.Background(), []string{"x"}, -1, os.Getenv, nil, nil, &stderr); !errors.Is(err, errUsage) {
		t.Errorf("run = %v, want %v", err, errUsage)
	}
}

func TestExitStatus(t *testing.T) {
	for name, tt := range map[string]struct {
		args []string
		code int
		text string
	}{
		"help":  {[]string{"--help"}, 0, "Usage of optimizer-server"},
		"usage": {nil, 2, "optimizer-server: usage: --pid is 0"},
		"gone":  {[]string{"--pid", "4194304"}, 1, "optimizer-server: open process 4194304"},
	} {
		cmd := exec.Command(testenv.Binary(t, "optimizer-server"), tt.args...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		_ = cmd.Run() // the status is looked at
		if got := cmd.ProcessState.ExitCode(); got != tt.code || !strings.Contains(stderr.String(), tt.text) {
			t.Errorf("%s: exit status %d, says %q; want %d, %q", name, got, stderr.String(), tt.code, tt.text)
		}
	}
}
