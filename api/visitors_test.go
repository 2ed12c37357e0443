package api

import (
	"bufio"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestVisitorsOfOneAddress: requests and tunnels of one address are bounded, an IPv6 network counts as one address, and a proxy on this
// machine has no bound.
func TestVisitorsOfOneAddress(t *testing.T) {
	var v visitors
	var all []func()
	for i := range maxVisitor {
		leave, ok := v.admit(fmt.Sprintf("[2001:db8::%x]:%d", i, 1000+i))
		if !ok {
			t.Fatal(i)
		}
		all = append(all, leave)
	}
	if _, ok := v.admit("[2001:db8::ffff]:80"); ok {
		t.Error("one more has come in")
	}
	for _, other := range []string{"[2001:db8:0:1::1]:80", "192.0.2.1:80", "127.0.0.1:80", "@"} {
		leave, ok := v.admit(other)
		if !ok {
			t.Fatal(other)
		}
		all = append(all, leave)
	}
	for _, leave := range all {
		leave()
		leave()
	}
	if len(v.by) != 0 {
		t.Error(v.by)
	}
	g := newGatewayTest(t)
	if _, err := g.sb.Expose(g.port, true); err != nil {
		t.Fatal(err)
	}
	for range maxVisitor {
		if _, ok := g.g.visitors.admit("192.0.2.1:80"); !ok {
			t.Fatal("it is full too early")
		}
	}
	for from, want := range map[string]int{"192.0.2.1:81": http.StatusServiceUnavailable, "192.0.2.2:80": http.StatusOK} {
		r, w := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+g.host(g.port)+"/", nil), httptest.NewRecorder()
		r.RemoteAddr = from
		if g.front.Config.Handler.ServeHTTP(w, r); w.Code != want {
			t.Errorf("a visitor from %s gets %d: %s", from, w.Code, w.Body)
		}
	}
}

// tunnel opens a tunnel through the gateway, and returns the status and body of the answer.
func (g *gatewayTest) tunnel() (conn net.Conn, status int, body string) {
	g.Helper()
	conn, err := net.Dial("tcp", g.front.Listener.Addr().String())
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { _ = conn.Close() })
	fmt.Fprintf(conn, "GET /socket HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", g.host(g.port))
	_ = conn.SetReadDeadline(time.Now().Add(60 * time.Second))
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		g.Fatal(err)
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		text := make([]byte, 1000)
		n, _ := res.Body.Read(text)
		return conn, res.StatusCode, string(text[:n])
	}
	return conn, res.StatusCode, ""
}

// TestTunnelsAreCharged: each tunnel is charged to the account of the sandbox's owner. A full account is an error that names it; other
// owners' sandboxes are unaffected; health, kill and pause still work; and what has ended is returned to the account.
func TestTunnelsAreCharged(t *testing.T) {
	const share = 8 // a tunnel is a request and a connection into the sandbox
	accounts := access.NewAccounts(map[access.Resource]access.Bound{access.Connections: {Total: 100, Share: share},
		access.Buffers: {Total: 100 << 20, Share: 50 << 20}})
	g := newGatewayTest(t, func(o *sandbox.Options) { o.Accounts = accounts })
	if _, err := g.sb.Expose(g.port, true); err != nil {
		t.Fatal(err)
	}
	var conns []net.Conn
	for range share / 2 {
		conn, status, body := g.tunnel()
		if status != http.StatusSwitchingProtocols {
			t.Fatal(status, body)
		}
		conns = append(conns, conn)
	}
	if _, status, body := g.tunnel(); status != http.StatusServiceUnavailable ||
		!strings.Contains(body, "the account of ann is full: 8 of 8 connections are used; close connections") {
		t.Error(status, body)
	}
	control := &Control{Manager: g.m, Gateway: g.g, Owner: func(r *http.Request) (string, error) { return r.Header.Get("X-API-Key"), nil },
		Log: slog.New(slog.DiscardHandler)}
	t.Cleanup(control.Close)
	mux := http.NewServeMux()
	for pattern, h := range control.Routes() {
		mux.Handle(pattern, h)
	}
	ask := func(method, path, owner string) int {
		r := httptest.NewRequest(method, path, strings.NewReader("{}"))
		r.Header.Set("X-API-Key", owner)
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		return w.Code
	}
	path := "/sandboxes/" + g.sb.ID()
	if code := ask(http.MethodPost, path+"/timeout", "ann"); code != http.StatusServiceUnavailable {
		t.Error("the account is not full:", code)
	}
	if code := ask(http.MethodPost, "/sandboxes", "bob"); code == http.StatusServiceUnavailable {
		t.Error("another owner is refused:", code)
	}
	if res, body := g.get(g.host(49983), "/health"); res.StatusCode != http.StatusNoContent {
		t.Error("health:", res.StatusCode, body)
	}
	if code := ask(http.MethodGet, path, "ann"); code != http.StatusOK {
		t.Error("get:", code)
	}
	_ = conns[0].Close()
	sandboxtest.Eventually(t, "an ended tunnel is given back", func() bool {
		return slices.Contains(accounts.Uses(), access.Use{Owner: "ann", Resource: access.Connections, Used: share - 2, Share: share})
	})
	if code := ask(http.MethodDelete, path, "ann"); code != http.StatusNoContent {
		t.Error("kill:", code)
	}
	sandboxtest.Eventually(t, "all is given back", func() bool { return len(accounts.Uses()) == 0 })
}

// TestVisitorStalls: a client that reads nothing while there is something to send is cut off.
func TestVisitorStalls(t *testing.T) {
	g := newGatewayTest(t)
	g.g.stall = 200 * time.Millisecond
	if _, err := g.sb.Expose(g.port, true); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", g.front.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /flood HTTP/1.1\r\nHost: %s\r\n\r\n", g.host(g.port))
	select {
	case <-g.broken: // the server in the sandbox sees the end
	case <-time.After(30 * time.Second):
		t.Error("it goes on")
	}
}
