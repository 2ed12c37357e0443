package guest

import (
	"io"
	"net"
	"testing"
	"time"
)

// TestNobodyReads: if the host's reader stops, only little of what a server in the sandbox sends is buffered; all of it arrives once the
// reader continues.
func TestNobodyReads(t *testing.T) {
	c, _ := pair(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const all = 20 << 20
	taken := make(chan int, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_ = conn.(*net.TCPConn).SetWriteBuffer(socketBuffer) // as in a sandbox
		sent, part := 0, make([]byte, 16<<10)
		for first := true; sent < all; {
			if first {
				_ = conn.SetWriteDeadline(time.Now().Add(time.Second)) // nothing moves for that long
			}
			n, err := conn.Write(part[:min(len(part), all-sent)])
			sent += n
			if err != nil && first {
				first = false
				_ = conn.SetWriteDeadline(time.Time{})
				taken <- sent
			} else if err != nil {
				t.Error(err)
				return
			}
		}
	}()
	conn, err := c.Dial(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if n := <-taken; n > 1<<20 {
		t.Errorf("%d bytes wait", n)
	}
	if n, err := io.Copy(io.Discard, conn); err != nil || n != all {
		t.Error(n, err)
	}
}
