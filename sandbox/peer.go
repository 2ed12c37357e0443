package sandbox

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// errStranger means that another user of this machine made the connection.
var errStranger = errors.New("another user of this machine made it")

// checkPeer returns nil if the server's own user or root made a connection to this machine's loopback. If that cannot be found out, it is
// an error, because the connection carries no other proof.
func checkPeer(conn net.Conn) error {
	from, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return err
	}
	uid, err := ownerOf(from, to)
	if err != nil { // such as no netlink in a container
		var perr error
		if uid, perr = ownerInProc(from, to); perr != nil {
			return fmt.Errorf("find whose connection it is: %w", errors.Join(err, perr))
		}
	}
	if uid != 0 && uid != os.Geteuid() {
		return errStranger
	}
	return nil
}

// errNoSocket means that the other end of the connection is closed; the kernel reports root as its user.
var errNoSocket = errors.New("its other end is closed")

// Constants of NETLINK_SOCK_DIAG (sock_diag(7), linux/inet_diag.h).
const (
	sockDiagByFamily = 20
	diagRequest      = 56 // size of inet_diag_req_v2 in bytes
	diagAnswer       = 72 // size of inet_diag_msg in bytes
	diagUID          = 64 // offset in inet_diag_msg
	diagInode        = 68
)

// ownerOf asks the kernel for the user of a TCP socket of this machine, given its local and remote address, both IPv4.
func ownerOf(local, remote netip.AddrPort) (uid int, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		return 0, err
	}
	ask := make([]byte, unix.NLMSG_HDRLEN+diagRequest)
	host := binary.NativeEndian
	host.PutUint32(ask[0:], uint32(len(ask)))
	host.PutUint16(ask[4:], sockDiagByFamily)
	host.PutUint16(ask[6:], unix.NLM_F_REQUEST)
	body := ask[unix.NLMSG_HDRLEN:]
	body[0], body[1] = unix.AF_INET, unix.IPPROTO_TCP
	host.PutUint32(body[4:], 1<<32-1) // any state
	id := body[8:]
	binary.BigEndian.PutUint16(id[0:], local.Port())
	binary.BigEndian.PutUint16(id[2:], remote.Port())
	l, r := local.Addr().Unmap().As4(), remote.Addr().Unmap().As4()
	copy(id[4:], l[:])
	copy(id[20:], r[:])
	host.PutUint64(id[40:], 1<<64-1) // any cookie
	if err := unix.Sendto(fd, ask, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, err
	}
	answer := make([]byte, 1024)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return 0, err
	}
	answer = answer[:n]
	if n < unix.NLMSG_HDRLEN+4 {
		return 0, errors.New("a short answer of sock_diag")
	}
	body = answer[unix.NLMSG_HDRLEN:]
	if host.Uint16(answer[4:]) == unix.NLMSG_ERROR {
		return 0, fmt.Errorf("sock_diag: %w", unix.Errno(-int32(host.Uint32(body))))
	}
	if host.Uint16(answer[4:]) != sockDiagByFamily || len(body) < diagAnswer {
		return 0, errors.New("an unexpected answer of sock_diag")
	}
	if host.Uint32(body[diagInode:]) == 0 {
		return 0, errNoSocket
	}
	return int(host.Uint32(body[diagUID:])), nil
}

// ownerInProc is ownerOf by the kernel's lists of all sockets (proc(5)).
func ownerInProc(local, remote netip.AddrPort) (uid int, err error) {
	want := []string{procAddress(local, false) + " " + procAddress(remote, false), procAddress(local, true) + " " +
		procAddress(remote, true)}
	for _, name := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		list, rerr := os.ReadFile(name)
		if err = errors.Join(err, rerr); rerr != nil {
			continue
		}
		for line := range bytes.Lines(list) {
			f := strings.Fields(string(line))
			if len(f) < 10 || !slices.Contains(want, f[1]+" "+f[2]) {
				continue
			}
			if f[9] == "0" {
				return 0, errNoSocket
			}
			return strconv.Atoi(f[7])
		}
	}
	return 0, errors.Join(err, errNoSocket)
}

// procAddress formats an IPv4 address as in /proc/net/tcp or, if mapped, as in /proc/net/tcp6: as 32-bit words in the machine's byte order.
func procAddress(a netip.AddrPort, mapped bool) string {
	ip := a.Addr().Unmap().As4()
	word := make([]byte, 4)
	binary.BigEndian.PutUint32(word, binary.NativeEndian.Uint32(ip[:]))
	text := hex.EncodeToString(word)
	if mapped {
		prefix := make([]byte, 4)
		binary.BigEndian.PutUint32(prefix, binary.NativeEndian.Uint32([]byte{0, 0, 0xff, 0xff}))
		text = strings.Repeat("0", 16) + hex.EncodeToString(prefix) + text
	}
	return strings.ToUpper(text) + fmt.Sprintf(":%04X", a.Port())
}
