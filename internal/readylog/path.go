package readylog

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxStatus bounds the answer about one container, in bytes: its labels and annotations are in it.
const maxStatus = 4 << 20

// Path asks the CRI at containerd's socket, address, for the path of a container's log, which NRI does
// not tell, and for the time at which the container was created: what the file has from before is of another. A container whose
// pod has no log directory has none, which is an error.
func Path(ctx context.Context, address, container string) (_ string, created time.Time, err error) {
	conn, err := grpc.NewClient("unix://"+strings.TrimPrefix(address, "unix://"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxStatus)))
	if err != nil {
		return "", created, fmt.Errorf("ask the CRI at %s: %w", address, err)
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	r, err := runtimeapi.NewRuntimeServiceClient(conn).ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: container})
	if err != nil {
		return "", created, fmt.Errorf("ask the CRI at %s for container %s: %w", address, container, err)
	}
	path := r.GetStatus().GetLogPath()
	if at := r.GetStatus().GetCreatedAt(); at > 0 { // CRI, api.proto: ContainerStatus, in ns
		created = time.Unix(0, at)
	}
	if path == "" {
		return "", created, fmt.Errorf("container %s has no log file", container)
	}
	return path, created, nil
}
