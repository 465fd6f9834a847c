package tracefs_test

import (
	"fmt"
	"os"
	"runtime"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// helperEnv makes the test binary a program for tests; its value says which.
const helperEnv = "TRACEFS_TEST_HELPER"

// A helper that calls execve does so in its first thread unless it says otherwise: the
// goroutine of main is on it now and stays there.
func init() {
	if os.Getenv(helperEnv) != "" {
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	name := os.Getenv(helperEnv)
	if name == "" {
		testenv.Main(m)
		return
	}
	run, ok := helpers[name]
	if !ok {
		fmt.Fprintln(os.Stderr, "unknown helper", name)
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		os.Exit(1)
	}
}
