package sandbox

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// TestPeer: both ways of asking find the user of a connection's other end, and neither takes a closed end for root's.
func TestPeer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ways := map[string]func(local, remote netip.AddrPort) (int, error){"netlink": ownerOf, "proc": ownerInProc}
	accept := func() (conn net.Conn, from, to netip.AddrPort) {
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn, netip.MustParseAddrPort(conn.RemoteAddr().String()), netip.MustParseAddrPort(conn.LocalAddr().String())
	}
	mine, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn, from, to := accept()
	for name, ask := range ways {
		if uid, err := ask(from, to); err != nil || uid != os.Geteuid() {
			t.Error(name, uid, err)
		}
	}
	if err := checkPeer(conn); err != nil {
		t.Error(err)
	}
	_ = mine.Close()
	for name, ask := range ways {
		if uid, err := ask(from, to); err == nil {
			t.Error(name, "tells the user of a closed one:", uid)
		}
	}
	if err := checkPeer(conn); err == nil {
		t.Error("a closed one is known")
	}
	if os.Geteuid() != 0 {
		return // no other user can be made to connect
	}
	cmd := exec.Command("bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/127.0.0.1/%d; cat <&3", to.Port()))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, from, to = accept()
	for name, ask := range ways {
		if uid, err := ask(from, to); err != nil || uid != 12345 {
			t.Error(name, uid, err)
		}
	}
	if err := checkPeer(conn); !errors.Is(err, errStranger) {
		t.Error(err)
	}
	_ = conn.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
