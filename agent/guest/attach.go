package guest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// attachSocket is the socket where bridges reach the agent. It is abstract, so no program can remove or replace it in the file system.
const attachSocket = "@soulbox-agent"

// ListenAttach serves bridges until the machine ends. A bridge runs as root in the agent's own cgroup, where only the runtime can put a
// process: a client of the agent can lift the limits, so no user's process may be one, not even root's.
func (s *Server) ListenAttach() error {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: attachSocket, Net: "unix"})
	if err != nil {
		return err
	}
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return err
		}
		if !isBridge(conn) {
			_ = conn.Close()
			continue
		}
		go func() { _ = s.Serve(conn) }() // how it ends matters only to the bridge
	}
}

func isBridge(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil ||
		cerr != nil || cred.Uid != 0 {
		return false
	}
	in, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cred.Pid))
	return err == nil && strings.TrimSpace(string(in)) == "0::/agent"
}

// Attach is the bridge: it connects stdio with the agent of the machine that it runs in.
func Attach(in io.Reader, out io.WriteCloser) error {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: attachSocket, Net: "unix"})
	if err != nil {
		return err
	}
	defer conn.Close()
	go func() {
		_, _ = io.Copy(conn, in)
		_ = conn.Close() // the host has closed its end
	}()
	_, err = io.Copy(out, conn)
	return errors.Join(err, out.Close())
}
