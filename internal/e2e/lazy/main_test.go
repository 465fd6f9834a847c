// Package lazy_test uses lazy mounts as a user does: through the optimizer command, with real images,
// read by many processes in every way there is, with a link that breaks and a daemon that is killed. Judges
// are what tar unpacks, the fixtures' own comparer, and runc.
package lazy_test

import (
	"os"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) {
	if os.Getenv(walkerVariable) != "" {
		os.Exit(walker())
	}
	testenv.Main(m)
}
