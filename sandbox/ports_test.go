package sandbox_test

import (
	"bufio"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// inside is a server that, with the Fake, runs in the sandbox.
func inside(t *testing.T, serve func(net.Conn)) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(conn)
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

func exposePort(t *testing.T, sb *sandbox.Sandbox, port int) sandbox.Port {
	t.Helper()
	p, err := sb.Expose(port, false)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestPorts: bytes pass unchanged in both directions at once, with half-closes, over many connections.
func TestPorts(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	sb := create(t, m, sandbox.CreateOptions{})
	port := inside(t, func(c net.Conn) { // answers with the checksum of all input at its end
		h := sha256.New()
		if _, err := io.Copy(h, c); err == nil {
			fmt.Fprintf(c, "%x", h.Sum(nil))
		}
	})
	p := exposePort(t, sb, port)
	if again := exposePort(t, sb, port); again != p || len(sb.Ports()) != 1 {
		t.Fatal(again, p)
	}
	if there, err := sb.AwaitPort(t.Context(), port, time.Second); err != nil || !there {
		t.Fatal(there, err)
	}
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			conn, err := net.Dial("tcp", p.Address())
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			body := make([]byte, 300_000)
			rand.Read(body)
			if _, err := conn.Write(body); err != nil {
				t.Error(err)
			}
			_ = conn.(*net.TCPConn).CloseWrite()
			got, err := io.ReadAll(conn)
			if want := fmt.Sprintf("%x", sha256.Sum256(body)); err != nil || string(got) != want {
				t.Errorf("%v %q, want %s", err, got, want)
			}
		})
	}
	all.Wait()

	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello from ", r.URL.Path) }))
	defer web.Close()
	w := exposePort(t, sb, web.Listener.Addr().(*net.TCPAddr).Port)
	for range 3 { // kept alive
		res, err := http.Get("http://" + w.Address() + "/x")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil || string(body) != "hello from /x" {
			t.Fatal(string(body), err)
		}
	}
	if err := sb.Unexpose(port); err != nil {
		t.Fatal(err)
	}
	if err := sb.Unexpose(port); !errors.Is(err, sandbox.ErrNotExposed) {
		t.Fatal(err)
	}
	if conn, err := net.Dial("tcp", p.Address()); err == nil {
		_ = conn.Close()
		t.Fatal("a closed port takes connections")
	}
}

// TestPortNothingListens: a browser gets a page that says so; other clients see the connection close.
func TestPortNothingListens(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	sb := create(t, m, sandbox.CreateOptions{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	_ = l.Close()
	p := exposePort(t, sb, port)
	res, err := http.Get("http://" + p.Address())
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(res.Body)
	_ = res.Body.Close()
	if res.StatusCode != http.StatusBadGateway || !strings.Contains(string(body), fmt.Sprint("port ", port)) {
		t.Fatal(res.StatusCode, string(body))
	}
	conn, err := net.Dial("tcp", p.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "not http\n")
	if line, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
		t.Fatal(line)
	}
	for _, wrong := range []int{0, -1, 65536} {
		if _, err := sb.Expose(wrong, false); !errors.Is(err, sandbox.ErrInvalid) {
			t.Error(wrong, err)
		}
	}
}

// TestPortsEnd: connections end with their sandbox; an adopted sandbox has its ports again, at the same numbers.
func TestPortsEnd(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	keep := func(o *sandbox.Options) { o.Keep = true }
	first := newManager(t, dir, fake, keep)
	sb := create(t, first, sandbox.CreateOptions{})
	p := exposePort(t, sb, inside(t, func(c net.Conn) { _, _ = io.Copy(c, c) }))
	echo := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp", p.Address())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		fmt.Fprint(conn, "hi\n")
		if line, err := bufio.NewReader(conn).ReadString('\n'); line != "hi\n" {
			t.Fatal(line, err)
		}
		return conn
	}
	ends := func(conn net.Conn) {
		t.Helper()
		_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		var timeout net.Error
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
			t.Fatal("the connection is still open")
		}
	}
	conn := echo()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	ends(conn)
	second := newManager(t, dir, fake, keep)
	again := awaitSandbox(t, second, "", sb.ID())
	if list := again.Ports(); len(list) != 1 || list[0] != p {
		t.Fatal(list, p)
	}
	conn = echo()
	if err := again.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	ends(conn)
}

// TestExposeWhileKilled: a port that is exposed while its sandbox ends is not exposed, and what is remembered of the sandbox has no port.
func TestExposeWhileKilled(t *testing.T) {
	var sb *sandbox.Sandbox
	killed := make(chan error, 1)
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, func(o *sandbox.Options) {
		o.Listen = func(network, address string) (net.Listener, error) {
			go func() { killed <- sb.Kill(nil) }()
			sandboxtest.Eventually(t, "the sandbox is killed", func() bool { return sb.Info().State == sandbox.Killed })
			return net.Listen(network, address)
		}
	})
	sb = create(t, m, sandbox.CreateOptions{})
	if _, err := sb.Expose(8080, false); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("%v, want an error of its state", err)
	}
	if err := <-killed; err != nil {
		t.Error(err)
	}
	if ports := sb.Ports(); len(ports) != 0 {
		t.Error(ports)
	}
}
