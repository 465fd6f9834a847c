package tracefs_test

import (
	"fmt"
	"os"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// helperEnv makes the test binary a program for tests; its value says which.
const helperEnv = "TRACEFS_TEST_HELPER"

func TestMain(m *testing.M) {
	switch what := os.Getenv(helperEnv); what {
	case "":
		testenv.Main(m)
	case "nothing":
	case "workload":
		if err := workload(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	default:
		fmt.Fprintln(os.Stderr, "unknown helper", what)
		os.Exit(2)
	}
}
