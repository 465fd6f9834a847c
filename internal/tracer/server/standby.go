package server

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
)

// maxOrders is how long the orders of a parent may be, in bytes.
const maxOrders = 4 << 10

// StandBy says on stdin, a socket of packets, that this process stands by, waits for orders there, and returns them: the arguments of a command
// line, and the descriptor of the instance of tracefs that came along, -1 when none did. It returns [io.EOF] when the parent closed its
// end, or died, and has none. What does not depend on the orders is done before: the container waits for what follows them.
func StandBy(stdin *os.File) (args []string, instance int, err error) {
	warm()
	fd := int(stdin.Fd())
	if _, err := unix.Write(fd, []byte(stream.StandsBy)); err != nil {
		if errors.Is(err, unix.EPIPE) {
			err = io.EOF
		}
		return nil, -1, fmt.Errorf("say that this process stands by: %w", err)
	}
	text, rights := make([]byte, maxOrders), make([]byte, unix.CmsgSpace(4))
	for {
		n, m, flags, _, err := unix.Recvmsg(fd, text, rights, unix.MSG_CMSG_CLOEXEC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, -1, fmt.Errorf("wait for orders: %w", err)
		case n == 0:
			return nil, -1, io.EOF
		}
		instance = descriptor(rights[:m])
		if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
			err = fmt.Errorf("orders of more than %d bytes, or with too many descriptors", maxOrders)
			if instance >= 0 {
				err = errors.Join(err, unix.Close(instance))
			}
			return nil, -1, err
		}
		return strings.Split(string(text[:n]), "\x00"), instance, nil
	}
}

// warm does once, with this process, what is done with a container's: the kernel reads the program's pages when they are first used.
func warm() {
	if t, err := openTarget(os.Getpid()); err == nil { // else whoever traces finds out why
		_ = t.close()
	}
}
