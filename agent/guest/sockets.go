package guest

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketBuffer is how much the kernel buffers for a connection that the host dials, in each direction, in bytes.
const socketBuffer = 64 << 10

// How much the kernel buffers for other TCP connections, in bytes. The default is 4 MB for each direction, and the data of many unread
// connections would be in the memory of the sandbox's kernel, not in that of any process. Root can raise these bounds.
const (
	maxReceive = 256 << 10
	maxSend    = 128 << 10
)

// keepLittle is the Control function of a Dialer; it gives connections small buffers.
func keepLittle(network, _ string, c syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	var err error
	return errors.Join(c.Control(func(fd uintptr) {
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, socketBuffer),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer))
	}), err)
}

// boundSockets bounds the buffers of the sandbox's TCP connections.
func boundSockets() error {
	write := func(name string, most int) error {
		return os.WriteFile("/proc/sys/net/ipv4/"+name, fmt.Appendf(nil, "4096 %d %d\n", most, most), 0o644)
	}
	return errors.Join(write("tcp_rmem", maxReceive), write("tcp_wmem", maxSend))
}
