package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// greedyServer is a web server of one process that gives each client all that its connection accepts, and makes /tmp/full when the
// connections of all 505 accept hardly more.
const greedyServer = `perl -MIO::Socket::INET -MIO::Select -e '$l = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 8000, Listen => 1024, ReuseAddr => 1) or die; $l->blocking(0); $SIG{PIPE} = "IGNORE";
	$b = "x" x 65536; $in = IO::Select->new($l); while (1) { for $s ($in->can_read(0.5)) { if ($s == $l) { while ($c = $l->accept) { $c->blocking(0); $in->add($c) } }
	else { sysread $s, $q, 65536; $in->remove($s); syswrite $s, "HTTP/1.0 200 OK\r\n\r\n"; push @out, $s } } next if @out < 505;
	$n = 0; for $s (@out) { while ($w = syswrite $s, $b) { $n += $w } } if ($n < 10_000_000) { open F, ">/tmp/full"; sleep } }'`

// TestVisitorsReadNothing: clients that ask for much and read nothing cost the server and the sandbox's kernel a little per connection, and
// do not affect others. There are as many visitors as one sandbox accepts.
func TestVisitorsReadNothing(t *testing.T) {
	state := sandboxtest.Dir(t)
	w := serve(t, state)
	c := w.client("", true)
	call := func(tool string, args map[string]any) sandboxtest.Answer {
		t.Helper()
		return must2(t)(c.Call(t.Context(), tool, args))
	}
	id := call("exec", map[string]any{"command": greedyServer, "background": true, "tag": "web"}).Field("sandbox_id")
	a := call("port_expose", map[string]any{"sandbox_id": id, "port": 8000, "public": true})
	if a.Field("listening") != "true" {
		t.Fatal(a.Text())
	}
	var conns []net.Conn
	sentry := sentryOf(t, state)
	serverBefore, sentryBefore := anonymous(t, w.cmd.Process.Pid), anonymous(t, sentry)
	const visitors = 505
	for len(conns) < visitors { // some at a time: on a busy machine more connections would not be accepted in time
		from := len(conns)
		for range min(25, visitors-from) {
			conn, err := net.Dial("tcp", strings.TrimPrefix(a.Field("url"), "http://"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close() })
			if err := conn.(*net.TCPConn).SetReadBuffer(64 << 10); err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(conn, "GET /big HTTP/1.0\r\n\r\n")
			conns = append(conns, conn)
		}
		for _, conn := range conns[from:] {
			_ = conn.SetReadDeadline(time.Now().Add(60 * time.Second))
			head := make([]byte, len("HTTP/1.0 200"))
			if _, err := io.ReadFull(conn, head); err != nil || string(head) != "HTTP/1.0 200" {
				t.Fatalf("%q %v", head, err)
			}
		}
	}
	sandboxtest.Eventually(t, "all connections are full", func() bool {
		return call("exec", map[string]any{"sandbox_id": id, "command": "ls /tmp/full"}).Field("exit_code") == "0"
	})
	kernel, server := anonymous(t, sentry), anonymous(t, w.cmd.Process.Pid)
	t.Logf("the sandbox' kernel: %d MB, before %d MB; the server: %d MB, before %d MB", kernel>>20, sentryBefore>>20, server>>20,
		serverBefore>>20)
	if kernel > 256<<20 {
		t.Errorf("the sandbox' kernel takes %d MB", kernel>>20)
	}
	if server > 256<<20 {
		t.Errorf("the server takes %d MB", server>>20)
	}
	if out := call("exec", map[string]any{"sandbox_id": id, "command": "echo well"}).Field("output"); out != "well\n" {
		t.Errorf("%q", out)
	}
	call("sandbox_kill", map[string]any{"sandbox_id": id, "confirm": true})
}

// sentryOf is the kernel process of the only sandbox of a state directory.
func sentryOf(t *testing.T, state string) int {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		line, err := os.ReadFile(name)
		if args := strings.Split(string(line), "\x00"); err == nil && strings.Contains(string(line), "--root="+state) &&
			strings.HasSuffix(args[0], "sandbox") {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatal("no sandbox runs")
	return 0
}

// anonymous is how much memory of its own (anonymous pages) a process has, in bytes.
func anonymous(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(text), "RssAnon:")
	kb, err := strconv.ParseInt(strings.Fields(line)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}

// TestScreensAtOnce: terminals of the largest size that are rendered at the same time wait for each other, and the server's memory stays
// bounded.
func TestScreensAtOnce(t *testing.T) {
	w := serve(t, "")
	c := w.client("", true)
	call := func(tool string, args map[string]any) sandboxtest.Answer {
		t.Helper()
		return must2(t)(c.Call(t.Context(), tool, args))
	}
	// Both screens are used; every cell takes its space, whatever is in it.
	fill := `perl -e '$| = 1; print "line\n" x 320, "\e[?1049h\e[Hdone"; sleep'`
	a := call("exec", map[string]any{"command": fill, "background": true, "tty": true, "rows": 300, "cols": 500, "tag": "tty"})
	id := a.Field("sandbox_id")
	sandboxtest.Eventually(t, "the terminal is full", func() bool {
		a, err := c.Call(t.Context(), "process_wait", map[string]any{"sandbox_id": id, "tag": "tty", "screen": true, "yield_ms": 1})
		return err == nil && strings.Contains(a.Text(), "done") // on a busy machine it may take too long, and says so
	})
	before := anonymous(t, w.cmd.Process.Pid)
	var all sync.WaitGroup
	for range 12 {
		all.Go(func() {
			a, err := c.Call(t.Context(), "process_wait", map[string]any{"sandbox_id": id, "tag": "tty", "screen": true, "yield_ms": 1})
			if err != nil || !strings.Contains(a.Text(), "done") && !strings.Contains(a.Text(), "too long to render") {
				t.Error(a.Text(), err)
			}
		})
	}
	ended := make(chan struct{})
	go func() { all.Wait(); close(ended) }()
	most := before
	for going := true; going; {
		select {
		case <-ended:
			going = false
		case <-time.After(20 * time.Millisecond):
			most = max(most, anonymous(t, w.cmd.Process.Pid))
		}
	}
	t.Logf("the server: %d MB, before %d MB", most>>20, before>>20)
	if most > 300<<20 {
		t.Errorf("the server takes %d MB", most>>20)
	}
	call("sandbox_kill", map[string]any{"sandbox_id": id, "confirm": true})
}
