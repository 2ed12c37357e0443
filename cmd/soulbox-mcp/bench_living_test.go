package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// benchLiving measures terminals, watches and ports.
func benchLiving(b *testing.B, t *table, p *program) {
	y := p.call("exec", map[string]any{"command": "stty -icanon; exec cat > /dev/null", "tty": true}).Result.StructuredContent["process_id"]
	t.measure(b, "a key typed at a terminal and its echo by MCP stdio", 300, func() {
		m := p.call("process_write", map[string]any{"process_id": y, "input": "x", "yield_ms": 20})
		if m.Result.StructuredContent["output"] != "x" {
			b.Fatalf("echo: %s", m.text())
		}
	})
	p.call("process_signal", map[string]any{"process_id": y, "signal": "SIGKILL"})

	p.exec("mkdir -p /home/user/watched")
	cursor := p.call("file_watch", map[string]any{"path": "/home/user/watched"}).Result.StructuredContent["cursor"]
	var delays []time.Duration
	for i := range 100 {
		waiting := p.start("file_watch", map[string]any{"cursor": cursor})
		begin := time.Now()
		done := p.start("file_write", map[string]any{"path": fmt.Sprintf("/home/user/watched/f%d", i), "content": "x"})
		m := p.await(waiting)
		delays = append(delays, time.Since(begin))
		cursor = m.Result.StructuredContent["cursor"]
		p.await(done)
		for p.call("file_watch", map[string]any{"cursor": cursor, "yield_ms": 0}).Result.StructuredContent["cursor"] != cursor {
			cursor = p.call("file_watch", map[string]any{"cursor": cursor, "yield_ms": 0}).Result.StructuredContent["cursor"]
		}
	}
	t.record("a file written by a tool until file_watch tells it", delays)
	benchPort(b, t, p)
}

// helloServer answers requests of many connections, which stay open, in one process.
const helloServer = `perl -MIO::Socket::INET -MIO::Select -e '$l = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => %d, Listen => 128, ReuseAddr => 1) or die; $s = IO::Select->new($l);
	while (1) { for $c ($s->can_read) { if ($c == $l) { $s->add($l->accept); next } $n = sysread $c, $b, 65536; if (!$n) { $s->remove($c); close $c; next }
	$k = () = $b =~ /\r\n\r\n/g; syswrite $c, ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello" x $k) } }'`

// benchPort loads a server in the sandbox by 64 connections for 20 s, and the same server on this machine.
func benchPort(b *testing.B, t *table, p *program) {
	const conns, long = 64, 20 * time.Second
	p.call("exec", map[string]any{"command": fmt.Sprintf(helloServer, 8000), "background": true})
	url := fmt.Sprint(p.call("port_expose", map[string]any{"port": 8000}).Result.StructuredContent["url"])
	inside, errors := load(conns, long, url)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	_ = l.Close() // only its port number was needed
	server := exec.Command("/bin/sh", "-c", "exec "+fmt.Sprintf(helloServer, port))
	if err := server.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() {
		_ = server.Process.Kill()
		_ = server.Wait() // an error, since it was killed
	}()
	own := fmt.Sprintf("http://127.0.0.1:%d", port)
	sandboxtest.Eventually(b, "the server on this machine", func() bool { n, _ := load(1, 10*time.Millisecond, own); return n > 0 })
	outside, _ := load(conns, 5*time.Second, own)
	t.say(fmt.Sprintf("a port of a sandbox, %d connections for %s", conns, long),
		fmt.Sprintf("%.0f requests/s, %d errors; the same server on this machine %.0f: a ratio of %.2f", inside, errors, outside,
			inside/outside))
}

// load requests a URL over many connections at once, and returns requests per second and the number of errors.
func load(conns int, long time.Duration, url string) (perSecond float64, errors int64) {
	var good, bad atomic.Int64
	transport := &http.Transport{MaxIdleConnsPerHost: conns}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 30 * time.Second}
	begin := time.Now()
	var all sync.WaitGroup
	for range conns {
		all.Go(func() {
			for time.Since(begin) < long {
				res, err := client.Get(url)
				if err != nil {
					bad.Add(1)
					continue
				}
				body, err := io.ReadAll(res.Body)
				_ = res.Body.Close()
				if err != nil || strings.TrimSpace(string(body)) != "hello" {
					bad.Add(1)
					continue
				}
				good.Add(1)
			}
		})
	}
	all.Wait()
	return float64(good.Load()) / time.Since(begin).Seconds(), bad.Load()
}
