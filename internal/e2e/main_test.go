// Package e2e_test runs the plugin, the tracer and the rebuild as a user does: dropped
// into a real containerd, driven through the CRI, with real images, and judged by tools
// of others (strace, fsck.erofs, the kernel, nydus-image, the distribution registry).
package e2e_test

import (
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
