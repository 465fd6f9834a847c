package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/tools"
)

func TestRun(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	for _, tc := range []struct {
		name string
		args []string
		want error
		out  string
	}{
		{"nothing", nil, errUsage, ""},
		{"no names", []string{"install"}, errUsage, ""},
		{"unknown verb", []string{"remove", "runc"}, errUsage, ""},
		{"unknown tool", []string{"install", "no-such-tool"}, tools.ErrUnknown, ""},
		{"unknown path", []string{"path", "no-such-tool"}, tools.ErrUnknown, ""},
		{"list", []string{"list"}, nil, "missing    containerd@"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out, errOut bytes.Buffer
			err := run(t.Context(), tc.args, &out, &errOut)
			if !errors.Is(err, tc.want) || !strings.Contains(out.String(), tc.out) {
				t.Errorf("run(%q) = %v, printed %q, want %v and %q", tc.args, err, out.String(), tc.want, tc.out)
			}
			if errors.Is(err, errUsage) != strings.Contains(errOut.String(), "usage:") {
				t.Errorf("run(%q) said %q, want the usage only for bad usage", tc.args, errOut.String())
			}
		})
	}
}
