package guest

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketBuffer is what the kernel keeps of a connection of the host's for each direction, in bytes.
const socketBuffer = 64 << 10

// What it keeps of any TCP connection, in bytes. It would be 4 MB for each direction, and what many connections that nobody reads hold is
// in the sandbox' kernel, outside of any process' memory. Root can have more.
const (
	maxReceive = 256 << 10
	maxSend    = 128 << 10
)

// keepLittle is the Control of a Dialer whose connections keep little.
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

// boundSockets bounds the buffers of the sandbox' TCP connections.
func boundSockets() error {
	write := func(name string, most int) error {
		return os.WriteFile("/proc/sys/net/ipv4/"+name, fmt.Appendf(nil, "4096 %d %d\n", most, most), 0o644)
	}
	return errors.Join(write("tcp_rmem", maxReceive), write("tcp_wmem", maxSend))
}
