package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// perlServer is a web server for machines without python: each request is answered with a header and a file's bytes, in a process of its
// own.
const perlServer = `perl -MIO::Socket::INET -e '$l = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 8000, Listen => 128, ReuseAddr => 1) or die; $SIG{CHLD} = "IGNORE";
	while ($c = $l->accept) { if (fork) { close $c; next } $line = <$c>; while (<$c>) { last if /^\r\n$/ } $line =~ m{GET /(\S*)}; open F, "/home/user/$1"; binmode F; print $c "HTTP/1.0 200 OK\r\n\r\n";
	while (read F, $b, 65536) { print $c $b } exit }'`

// TestPortsOfSandbox: a server in a real sandbox is reached from this machine, by many clients at once and with many bytes, and only while
// its port is exposed.
func TestPortsOfSandbox(t *testing.T) {
	state := sandboxtest.Dir(t)
	w := serve(t, state, "--on-exit=keep")
	c := w.client("", true)
	call := func(tool string, args map[string]any) sandboxtest.Answer {
		t.Helper()
		return must2(t)(c.Call(t.Context(), tool, args))
	}
	a := call("exec", map[string]any{"command": "echo hello > hi; head -c 100000000 /dev/urandom > big; sha256sum < big | cut -c1-64"})
	id, sum := a.Field("sandbox_id"), strings.TrimSpace(a.Field("output"))
	a = call("port_expose", map[string]any{"sandbox_id": id, "port": 8000, "wait_ms": 1})
	if url := a.Field("url"); a.Field("listening") != "" && a.Field("listening") != "false" ||
		!strings.HasPrefix(url, "http://127.0.0.1:") {
		t.Fatal(a.Text())
	}
	base := a.Field("url")
	if res, err := http.Get(base); err != nil || res.StatusCode != http.StatusBadGateway {
		t.Fatal(err, res)
	}
	call("exec", map[string]any{"sandbox_id": id, "command": perlServer, "background": true, "tag": "web"})
	if a = call("port_expose", map[string]any{"sandbox_id": id, "port": 8000}); a.Field("listening") != "true" {
		t.Fatal(a.Text())
	}
	if a = call("sandbox_get", map[string]any{"sandbox_id": id}); !strings.Contains(a.Text(), "listening on ports 8000, port 8000 is at "+
		base) {
		t.Error(a.Text())
	}
	fetch := func(path string) (int64, string) {
		res, err := http.Get(base + path)
		if err != nil {
			t.Error(err)
			return 0, ""
		}
		defer res.Body.Close()
		h := sha256.New()
		n, err := io.Copy(h, res.Body)
		if err != nil {
			t.Error(err)
		}
		return n, hex.EncodeToString(h.Sum(nil))
	}
	var all sync.WaitGroup
	for range 32 {
		all.Go(func() {
			for range 5 {
				if n, _ := fetch("/hi"); n != 6 {
					t.Errorf("%d bytes", n)
				}
			}
		})
	}
	all.Wait()
	if n, got := fetch("/big"); got != sum || n != 100_000_000 {
		t.Errorf("%d bytes, %s, want %s", n, got, sum)
	}

	// A slow reader stalls only itself.
	slow, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	fmt.Fprint(slow, "GET /big HTTP/1.0\r\n\r\n")
	if _, err := bufio.NewReader(slow).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	if n, _ := fetch("/hi"); n != 6 {
		t.Error("others are stalled")
	}

	// The next server has the port at the same number.
	_ = w.cmd.Process.Kill()
	_ = w.cmd.Wait() // an error, since it was killed
	w = serve(t, state, "--on-exit=keep")
	c.URL = w.url
	for {
		if res, err := http.Get(base + "/hi"); err == nil {
			_ = res.Body.Close()
			break
		}
		if t.Context().Err() != nil {
			t.Fatal("the port does not come back")
		}
	}
	call("port_close", map[string]any{"sandbox_id": id, "port": 8000})
	if _, err := net.Dial("tcp", strings.TrimPrefix(base, "http://")); err == nil {
		t.Error("a closed port takes connections")
	}
	call("sandbox_kill", map[string]any{"sandbox_id": id, "confirm": true})
}
