package guest

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/agent/guest/rawsys"
)

// TestDrainUnreported: what a process wrote before its end is moved at its end, also if epoll has told another goroutine, which is late.
func TestDrainUnreported(t *testing.T) {
	c, err := newCollector()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	fds, err := rawsys.Pipe(0)
	if err != nil {
		t.Fatal(err)
	}
	s := newSpool(t.TempDir())
	p := c.add(fds[0], agent.OnStdout, false, s)
	if err := c.control(unix.EPOLL_CTL_DEL, p.fd, p.token); err != nil {
		t.Fatal(err)
	}
	defer rawsys.Close(fds[1])
	if err := unix.SetNonblock(fds[1], true); err != nil {
		t.Fatal(err)
	}
	written, err := unix.Write(fds[1], []byte(strings.Repeat("x", 3*drainPart+1))) // or what the pipe holds
	if err != nil {
		t.Fatal(err)
	}
	c.drain(p)
	if !p.empty() {
		t.Error("the pipe has bytes left")
	}
	if got, _ := s.sizes(); got != int64(written) {
		t.Errorf("%d bytes are moved, want %d", got, written)
	}
}

// TestTerminalOutputAtEnd: what a program at a terminal wrote right before its end is there at its end.
func TestTerminalOutputAtEnd(t *testing.T) {
	c, _ := pair(t)
	for range 50 {
		s := start(t, c, agent.StartRequest{Command: "echo hello", Terminal: &agent.Terminal{Rows: 24, Cols: 80}, WaitMS: 60_000,
			Window: agent.Window{Head: 1000}})
		if !strings.Contains(string(s.Output.Head), "hello") {
			t.Fatalf("the output is %q", s.Output.Head)
		}
	}
}
