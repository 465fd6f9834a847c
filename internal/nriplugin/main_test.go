package nriplugin_test

import (
	"os"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(envHang); mode != "" {
		os.Exit(hangMain(mode))
	}
	testenv.Main(m)
}
