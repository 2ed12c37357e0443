package sandbox

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"soulbox.dev/soulbox/access"
)

// TestNetworkCheck: entries that are neither a domain nor a range are refused, and the others are normalized.
func TestNetworkCheck(t *testing.T) {
	for in, want := range map[string]string{
		"Example.COM": "example.com", "example.com.": "example.com", "*.Example.com": "*.example.com",
		"bücher.example": "xn--bcher-kva.example",
		"192.0.2.1":      "192.0.2.1", "192.0.2.77/24": "192.0.2.77/24", "::ffff:192.0.2.1": "::ffff:192.0.2.1", "*": "*",
	} {
		n, err := Network{Mode: NetworkAllowlist, Allow: []string{in}}.check()
		if err != nil || n.Allow[0] != want {
			t.Errorf("%q: %v, %v", in, n.Allow, err)
		}
	}
	for _, bad := range []string{"", "**", "*.", "ok.com\x00.evil", "a b", "a/b", "http://x", "*.*.com", "x..y", "1.2.3.4/99"} {
		if n, err := (Network{Mode: NetworkAllowlist, Allow: []string{bad}}).check(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q is taken: %v", bad, n.Allow)
		}
	}
	for _, bad := range []Network{{Mode: "all"}, {Mode: NetworkFull, Allow: []string{"x.com"}}, {Allow: []string{"x.com"}},
		{Mode: NetworkFull, Deny: []string{"x.com"}}, {Mode: NetworkAllowlist, Deny: []string{"192.0.2.0/24"}},
		{Mode: NetworkAllowlist, Allow: make([]string, maxAllow+1)}} {
		if _, err := bad.check(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v is taken", bad)
		}
	}
	some, err := Network{Mode: NetworkFull, Deny: []string{"198.51.100.0/24"}, Allow: []string{"198.51.100.7", "ok.example"}}.check()
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]bool{"198.51.100.1": false, "198.51.100.7": true, "203.0.113.1": true} {
		if some.permits("", netip.MustParseAddr(addr)) != want {
			t.Errorf("%s: %v", addr, !want)
		}
	}
	loose := Network{Mode: NetworkFull, Deny: []string{"198.51.100.77/24", "203.0.113.9"}, Said: &NetworkWords{Allow: []string{"*"}}}
	if loose, err = loose.check(); err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]bool{"198.51.100.1": false, "203.0.113.9": false, "203.0.113.8": true} {
		if loose.permits("", netip.MustParseAddr(addr)) != want {
			t.Errorf("%s: %v", addr, !want)
		}
	}
	every := Network{Mode: NetworkAllowlist, Allow: []string{"*"}}
	if !every.permits("any.example", netip.Addr{}) || every.permits("", netip.MustParseAddr("203.0.113.1")) {
		t.Error("* is not every name and nothing else")
	}
	if _, err := (Network{Mode: NetworkFull, Said: &NetworkWords{Allow: []string{"a b"}}}).check(); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	if !some.permits("ok.example", netip.Addr{}) || some.permits("other.example", netip.Addr{}) || !some.hasRanges() {
		t.Error("a name is taken for its addresses")
	}
}

// TestNetworkRefuses: no spelling of an address leads to this machine, to a private network, or past the list.
func TestNetworkRefuses(t *testing.T) {
	full := Network{Mode: NetworkFull}
	list, err := Network{Mode: NetworkAllowlist, Allow: []string{"ok.example", "*.sub.example", "198.51.100.0/24"}}.check()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		n  Network
		to string
	}{
		{full, "127.0.0.1:80"}, {full, "localhost:80"}, {full, "LOCALHOST.:80"}, {full, "10.1.2.3:80"}, {full, "169.254.169.254:80"},
		{full, "[::1]:80"}, {full, "[::ffff:127.0.0.1]:80"},
		{full, "[::ffff:7f00:1]:80"}, {full, "[64:ff9b::7f00:1]:80"}, {full, "[fe80::1%lo]:80"}, {full, "[fd00::1]:80"},
		{full, "0.0.0.0:80"}, {full, "[::]:80"}, {full, "192.168.1.1:22"},
		{full, "100.64.0.1:80"}, {full, "224.0.0.1:80"}, {full, "255.255.255.255:80"}, {full, "2130706433:80"}, {full, "0x7f.1:80"},
		{full, "x\x00y:80"}, {full, "203.0.113.1:0"}, {full, "203.0.113.1:http"},
		{list, "evil.example:80"}, {list, "ok.example.evil:80"}, {list, "evilok.example:80"}, {list, "sub.example:80"},
		{list, "203.0.113.1:80"}, {list, "ok.example\x00.evil:80"}, {list, "198.51.101.1:80"},
		{Network{}, "203.0.113.1:80"}, {Network{Mode: NetworkAllowlist}, "203.0.113.1:80"},
	} {
		e := newEgress()
		e.network = func() (Network, context.Context) { return test.n, t.Context() }
		conn, err := e.dial(t.Context(), "tcp", test.to)
		if err == nil {
			_ = conn.Close()
			t.Errorf("%+v reaches %q", test.n, test.to)
		}
		if host, _, _ := net.SplitHostPort(test.to); net.ParseIP(host) != nil && !errors.Is(err, ErrRefused) {
			t.Errorf("%q: %v", test.to, err)
		}
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, own := range addrs {
		p := netip.MustParsePrefix(own.String())
		if !isOwn(p.Addr()) || p.Addr().Is6() && !p.Addr().Is4In6() && p.Bits() < 128 && !isOwn(p.Addr().Next()) {
			t.Errorf("%s is reached", own)
		}
	}
	for name, want := range map[string]bool{"ok.example": true, "a.sub.example": true, "a.b.sub.example": true, "asub.example": false} {
		if list.permits(name, netip.Addr{}) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
}

// TestRefusedEnds: when a client asks the proxy for a page of a blocked host, the connection ends without a page that could pass for the
// host's; when it asks for a tunnel, it is refused one. The reason is in the log.
func TestRefusedEnds(t *testing.T) {
	e := newEgress()
	e.network = func() (Network, context.Context) { return Network{Mode: NetworkAllowlist}, t.Context() }
	said := make(chan string, 10) // called from several goroutines
	e.note = func(format string, args ...any) { said <- fmt.Sprintf(format, args...) }
	proxy := httptest.NewServer(e)
	defer proxy.Close()
	for _, test := range []struct{ ask, want string }{{"GET http://blocked.example/", ""},
		{"CONNECT blocked.example:443", "HTTP/1.1 403 Forbidden"}} {
		conn, err := net.Dial("tcp", proxy.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: blocked.example\r\nConnection: close\r\n\r\n", test.ask)
		got, err := io.ReadAll(conn)
		if err != nil || (test.want == "") != (len(got) == 0) || !strings.HasPrefix(string(got), test.want) {
			t.Errorf("%s: %q %v", test.ask, got, err)
		}
		_ = conn.Close()
	}
	if first := <-said; len(said) != 1 || !strings.Contains(first,
		"a connection to blocked.example was refused: blocked.example: the network of this sandbox does not allow it") {
		t.Errorf("%q, and %d more", first, len(said))
	}
}

// TestEgressBounds: whatever one client of the proxy asks for, the server holds a bounded number of connections to the network for it,
// including idle ones; a full account is reported, and idle connections make room.
func TestEgressBounds(t *testing.T) {
	world := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello") }))
	defer world.Close()
	var open, most atomic.Int64
	accounts := access.NewAccounts(map[access.Resource]access.Bound{access.Connections: {Total: 1000, Share: 100}})
	e := newEgress()
	e.network = func() (Network, context.Context) { return Network{Mode: NetworkFull}, t.Context() }
	e.take = func() (func(), error) { return accounts.Take("ann", access.Connections, 1) }
	e.reach = func(ctx context.Context, d *net.Dialer, network, _ string) (net.Conn, error) {
		conn, err := net.Dial(network, world.Listener.Addr().String())
		if err != nil {
			return nil, err
		}
		most.Store(max(most.Load(), open.Add(1)))
		return &slotConn{conn, sync.OnceFunc(func() { open.Add(-1) })}, nil
	}
	proxy := httptest.NewServer(e)
	defer proxy.Close()
	defer e.plain.CloseIdleConnections()
	client, err := net.Dial("tcp", proxy.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	from := bufio.NewReader(client)
	ask := func(host string) (int, string) {
		t.Helper()
		fmt.Fprintf(client, "GET http://%s/ HTTP/1.1\r\nHost: %s\r\n\r\n", host, host)
		res, err := http.ReadResponse(from, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(body)
	}
	for i := range 500 {
		if code, body := ask(fmt.Sprintf("h%d.example", i)); code != http.StatusOK || body != "hello" {
			t.Fatal(code, body)
		}
	}
	if most.Load() > maxEgressIdle+2 {
		t.Errorf("%d connections to the world for one client", most.Load())
	}
	rest, err := accounts.Take("ann", access.Connections, 100-accounts.Uses()[0].Used)
	if err != nil {
		t.Fatal(err)
	}
	if code, body := ask("more.example"); code != http.StatusOK { // idle connections make room
		t.Error(code, body)
	}
	rest()
	for {
		e.plain.CloseIdleConnections() // a connection becomes idle a moment after its answer
		if rest, err = accounts.Take("ann", access.Connections, 100); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if code, body := ask("full.example"); code != http.StatusServiceUnavailable || !strings.Contains(body, "the account of ann is full") {
		t.Error(code, body)
	}
	rest()
	var held []func()
	for range maxEgress {
		release, err := e.place()
		if release == nil { // the account is smaller
			if !errors.Is(err, access.ErrFull) {
				t.Fatal(err)
			}
			break
		}
		held = append(held, release)
	}
	for _, release := range held {
		release()
	}
	if uses := accounts.Uses(); len(uses) != 0 || len(e.slots) != 0 {
		t.Error(uses, len(e.slots))
	}
}
