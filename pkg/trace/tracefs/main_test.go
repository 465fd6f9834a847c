package tracefs_test

import (
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
