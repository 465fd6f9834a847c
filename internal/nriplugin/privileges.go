package nriplugin

import (
	"errors"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// WarnPrivileges says in one line of the log when this process may not record anything, and reports whether it
// may. Containers start all the same, and each gets a line that says that it was not recorded.
func WarnPrivileges(log *zap.Logger) bool {
	err := fanotify.Probe(fanotify.FeatureGroup)
	if errors.Is(err, fanotify.ErrPermission) {
		log.Warn("containers will not be recorded: it takes CAP_SYS_ADMIN, and not in a user namespace: " + oneLine(err.Error()))
		return false
	}
	return true
}
