package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// gatewayTest is a gateway in front of a sandbox of the Fake, in which a web server runs.
type gatewayTest struct {
	*testing.T
	sb     *sandbox.Sandbox
	m      *sandbox.Manager
	g      *Gateway
	front  *httptest.Server
	port   int
	client *http.Client
	broken chan struct{} // gets a token for each flood that has ended
}

// app is the server that runs in the sandbox.
func app(broken chan<- struct{}) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/flood", func(w http.ResponseWriter, r *http.Request) {
		part := make([]byte, 64<<10)
		for {
			if _, err := w.Write(part); err != nil {
				broken <- struct{}{}
				return
			}
		}
	})
	mux.HandleFunc("/headers", func(w http.ResponseWriter, r *http.Request) {
		for i := range 2000 {
			w.Header().Set(fmt.Sprintf("X-%d", i), strings.Repeat("x", 100))
		}
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s host=%s for=%s proto=%s cookie=%q token=%q", r.Method, r.URL.RequestURI(), r.Host,
			r.Header.Get("X-Forwarded-For"), r.Header.Get("X-Forwarded-Proto"),
			r.Header.Get("Cookie"), r.Header.Get(TrafficHeader))
	})
	mux.HandleFunc("/sum", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n, err)
	})
	mux.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := 0; r.Context().Err() == nil; i++ {
			fmt.Fprintf(w, "data: %d\n\n", i)
			_ = http.NewResponseController(w).Flush()
			if i == 1 {
				<-r.Context().Done() // the reader has gone
			}
		}
	})
	mux.HandleFunc("/socket", func(w http.ResponseWriter, r *http.Request) {
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_, _ = io.Copy(conn, buffered)
	})
	mux.HandleFunc("/grpc", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Grpc-Status")
		fmt.Fprint(w, r.Proto)
		w.Header().Set("Grpc-Status", "0")
	})
	return mux
}

func newGatewayTest(t *testing.T, change ...func(*sandbox.Options)) *gatewayTest {
	t.Helper()
	o := sandbox.Options{Dir: t.TempDir(), Runtime: &sandboxtest.Fake{}, Templates: sandboxtest.Templates{}, Version: "test",
		ConnWait: 50 * time.Millisecond}
	for _, do := range change {
		do(&o)
	}
	m, err := sandbox.NewManager(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	sb, err := m.Create(t.Context(), sandbox.CreateOptions{Owner: "ann"})
	if err != nil {
		t.Fatal(err)
	}
	broken := make(chan struct{}, 100)
	inside := httptest.NewUnstartedServer(app(broken))
	inside.Config.Protocols = new(http.Protocols)
	inside.Config.Protocols.SetHTTP1(true)
	inside.Config.Protocols.SetUnencryptedHTTP2(true)
	inside.Start()
	t.Cleanup(inside.Close)
	g := &gatewayTest{T: t, sb: sb, m: m, broken: broken, port: inside.Listener.Addr().(*net.TCPAddr).Port}
	g.front = httptest.NewUnstartedServer(nil)
	base, err := Base("Box.Test", "http://"+g.front.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	g.g = NewGateway(m, base, slog.New(slog.DiscardHandler))
	g.front.Config.Handler = g.g.Handler(http.HandlerFunc(func(w http.ResponseWriter,
		r *http.Request) {
		fmt.Fprint(w, "the server itself")
	}))
	g.front.Config.Protocols = inside.Config.Protocols
	g.front.Start()
	t.Cleanup(g.front.Close)
	// Every name leads to the front server.
	dialer := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, g.front.Listener.Addr().String())
	}
	transport := &http.Transport{DialContext: dialer}
	t.Cleanup(transport.CloseIdleConnections)
	g.client = &http.Client{Transport: transport, Timeout: 30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return g
}

func (g *gatewayTest) host(port int) string { return fmt.Sprintf("%d-%s.box.test", port, g.sb.ID()) }

// get requests a path at a host; headers are names and values in turn.
func (g *gatewayTest) get(host, path string, headers ...string) (*http.Response, string) {
	g.Helper()
	req, err := http.NewRequestWithContext(g.Context(), http.MethodGet, "http://"+host+path, nil)
	if err != nil {
		g.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := g.client.Do(req)
	if err != nil {
		g.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		g.Fatal(err)
	}
	return res, string(body)
}

// TestGatewayToken: a port that is not public requires the sandbox's token, in a header, link or cookie; the sandbox never sees the token.
func TestGatewayToken(t *testing.T) {
	g := newGatewayTest(t)
	host, secret := g.host(g.port), g.sb.TrafficToken()
	if len(secret) < 26 {
		t.Fatalf("token %q", secret)
	}
	p, err := g.sb.Expose(g.port, false)
	if err != nil {
		t.Fatal(err)
	}
	for name, headers := range map[string][]string{"none": nil, "empty": {TrafficHeader, ""}, "wrong": {TrafficHeader, secret + "x"},
		"wrong cookie": {"Cookie", trafficCookie + "=x"}, "a key": {"Authorization", "Bearer " + secret}} {
		res, body := g.get(host, "/", headers...)
		var f failure
		if err := json.Unmarshal([]byte(body), &f); err != nil || res.StatusCode != 403 || f.Code != 403 || f.SandboxID != g.sb.ID() ||
			strings.Contains(body, secret) {
			t.Errorf("%s: %d %s", name, res.StatusCode, body)
		}
	}
	want := func(path, cookie string) string {
		return fmt.Sprintf("GET %s host=%s for=127.0.0.1 proto=http cookie=%q token=\"\"", path, host, cookie)
	}
	if _, body := g.get(host, "/a?b=c%20d", TrafficHeader, secret); body != want("/a?b=c%20d", "") {
		t.Error(body)
	}
	if _, body := g.get(host, "/a", "Cookie", "mine=1; "+trafficCookie+"="+secret+"; other=2"); body != want("/a", "mine=1; other=2") {
		t.Error(body)
	}
	link, err := url.Parse(g.g.URL(g.sb, p))
	if err != nil || link.Port() == "" || link.Hostname() != host {
		t.Fatal(link, err)
	}
	if _, body := g.get(host, link.RequestURI()+"&x=1"); body != want("/?x=1", "") {
		t.Error("a program with the link:", body)
	}
	odd := `a=1; prefs={"dark":true}; n=Zürich; b=2`
	if _, body := g.get(host, "/", "Cookie", trafficCookie+"=wrong; "+odd+"; "+trafficCookie+"="+secret); body != want("/", odd) {
		t.Error(body)
	}
	res, _ := g.get(host, link.RequestURI()+"&x=1", "User-Agent", "Mozilla/5.0")
	if res.StatusCode != http.StatusFound || res.Header.Get("Location") != "/?x=1" || len(res.Cookies()) != 1 {
		t.Fatal(res.StatusCode, res.Header)
	}
	if c := res.Cookies()[0]; c.Value != secret || !c.HttpOnly || c.Domain != "" {
		t.Error(c)
	}
	if res, _ := g.get(host, "//elsewhere.example/"+link.RequestURI()[1:], "User-Agent",
		"Mozilla/5.0"); strings.HasPrefix(res.Header.Get("Location"), "//") {
		t.Error("leads away:", res.Header)
	}
	conn, err := net.Dial("tcp", g.front.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /socket?%s=%s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", TrafficQuery, secret,
		host)
	if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Error("a WebSocket with the token in its URL:", res, err)
	}
	if p, err = g.sb.Expose(g.port, true); err != nil || !p.Public {
		t.Fatal(p, err)
	}
	if _, body := g.get(host, "/"); body != want("/", "") || strings.Contains(g.g.URL(g.sb, p), secret) {
		t.Error(body)
	}
	if _, err = g.sb.Expose(g.port, false); err != nil {
		t.Fatal(err)
	}
	if res, _ := g.get(host, "/"); res.StatusCode != 403 {
		t.Error(res.StatusCode)
	}
}

// TestGatewayErrors: the gateway answers for missing sandboxes and ports as E2B does, with a page for browsers.
func TestGatewayErrors(t *testing.T) {
	g := newGatewayTest(t)
	if _, err := g.sb.Expose(1, true); err != nil {
		t.Fatal(err)
	}
	secret := g.sb.TrafficToken()
	const invalid = "400 Invalid sandbox ID or port: a host is {port}-{sandbox id} before the domain; elsewhere the headers " +
		"E2b-Sandbox-Id and E2b-Sandbox-Port name them."
	for host, want := range map[string]string{
		g.host(1): `502 {"sandboxId":"` + g.sb.ID() +
			`","message":"The sandbox is running but port is not open","port":1,"code":502}`,
		strings.ToUpper(g.host(1)) + ".": `502 {"sandboxId":"` + g.sb.ID() +
			`","message":"The sandbox is running but port is not open","port":1,"code":502}`,
		"1-" + g.sb.ID() + "-client.box.test": `502 {"sandboxId":"` + g.sb.ID() +
			`","message":"The sandbox is running but port is not open","port":1,"code":502}`,
		g.host(2): `502 {"sandboxId":"` + g.sb.ID() +
			`","message":"The port is not exposed: call port_expose","port":2,"code":502}`,
		"1-sb000000000000000000.box.test": `502 {"sandboxId":"sb000000000000000000","message":"The sandbox was not found","code":502}`,
		"x.box.test":                      invalid,
		"0-" + g.sb.ID() + ".box.test":    invalid,
		"box.test":                        "200 the server itself",
		"1-" + g.sb.ID() + ".other.test":  "200 the server itself",
	} {
		res, body := g.get(host, "/", TrafficHeader, secret)
		if got := strconv.Itoa(res.StatusCode) + " " + strings.TrimSpace(body); got != want {
			t.Errorf("%s: %s", host, got)
		}
	}
	res, body := g.get(g.host(1), "/", "User-Agent", "Mozilla/5.0")
	if !strings.HasPrefix(body, "<html") || !strings.HasPrefix(res.Header.Get("Content-Type"), "text/html") {
		t.Error(body)
	}
	if err := g.sb.Kill(errors.New("a test")); err != nil {
		t.Fatal(err)
	}
	if res, body := g.get(g.host(1), "/", TrafficHeader, secret); res.StatusCode != 502 || !strings.Contains(body, "not found") {
		t.Error(body)
	}
}

// TestGatewayPasses: large bodies, events as they come, upgrades, HTTP/2 and gRPC pass.
func TestGatewayPasses(t *testing.T) {
	g := newGatewayTest(t)
	if _, err := g.sb.Expose(g.port, true); err != nil {
		t.Fatal(err)
	}
	host := g.host(g.port)
	res, err := g.client.Post("http://"+host+"/sum", "application/octet-stream", io.LimitReader(zeros{}, 20<<20))
	if err != nil {
		t.Fatal(err)
	}
	if body, _ := io.ReadAll(res.Body); string(body) != "20971520 <nil>" {
		t.Errorf("%s", body)
	}
	_ = res.Body.Close()

	ctx, cancel := context.WithCancel(t.Context())
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+"/events", nil)
	if res, err = g.client.Do(req); err != nil {
		t.Fatal(err)
	}
	events := bufio.NewScanner(res.Body)
	for _, want := range []string{"data: 0", "", "data: 1"} {
		if !events.Scan() || events.Text() != want {
			t.Fatalf("%q, %v", events.Text(), events.Err())
		}
	}
	cancel()
	_ = res.Body.Close()

	conn, err := net.Dial("tcp", g.front.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /socket HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", host)
	r := bufio.NewReader(conn)
	if res, err = http.ReadResponse(r, nil); err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(res, err)
	}
	fmt.Fprint(conn, "frame\n")
	if line, err := r.ReadString('\n'); err != nil || line != "frame\n" {
		t.Fatal(line, err)
	}

	two := new(http.Protocols)
	two.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: two, DialContext: g.client.Transport.(*http.Transport).DialContext}
	defer transport.CloseIdleConnections()
	for kind, want := range map[string]string{"application/grpc": "HTTP/2.0", "text/plain": "HTTP/1.1"} {
		res, err := (&http.Client{Transport: transport}).Post("http://"+host+"/grpc", kind, strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if string(body) != want || res.ProtoMajor != 2 || res.Trailer.Get("Grpc-Status") != "0" {
			t.Errorf("%s: %s %v %v", kind, body, res.Proto, res.Trailer)
		}
	}
}

// TestGatewayEnds: a request that a client gives up ends in the sandbox too, and closing a port ends its connections.
func TestGatewayEnds(t *testing.T) {
	g := newGatewayTest(t)
	expose := func(public bool) {
		t.Helper()
		if _, err := g.sb.Expose(g.port, public); err != nil {
			t.Fatal(err)
		}
	}
	expose(true)
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+g.host(g.port)+"/flood", nil)
		res, err := g.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, res.Body, 1<<20); err != nil {
			t.Fatal(err)
		}
		cancel()
		_ = res.Body.Close()
		<-g.broken // the server in the sandbox has seen it
	}
	if res, body := g.get(g.host(g.port), "/headers"); res.StatusCode != http.StatusBadGateway || len(res.Header) > 20 {
		t.Error(res.StatusCode, len(res.Header), body)
	}
	for name, end := range map[string]func(){
		"closed":         func() { _ = g.sb.Unexpose(g.port) },
		"public no more": func() { expose(false) },
	} {
		expose(true)
		conn := g.socket()
		end()
		if _, err := conn.ReadString('\n'); err == nil {
			t.Errorf("%s: goes on", name)
		}
	}
	expose(true)
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+g.host(g.port)+"/events", nil)
	res, err := g.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	g.g.Close()
	if _, err := io.ReadAll(res.Body); err == nil {
		t.Error("a stream outlives the gateway")
	}
	_ = res.Body.Close()
}

// socket opens a WebSocket that echoes what it gets.
func (g *gatewayTest) socket() *bufio.Reader {
	g.Helper()
	conn, err := net.Dial("tcp", g.front.Listener.Addr().String())
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { _ = conn.Close() })
	fmt.Fprintf(conn, "GET /socket HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", g.host(g.port))
	r := bufio.NewReader(conn)
	if res, err := http.ReadResponse(r, nil); err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		g.Fatal(res, err)
	}
	fmt.Fprint(conn, "frame\n")
	if line, err := r.ReadString('\n'); err != nil || line != "frame\n" {
		g.Fatal(line, err)
	}
	return r
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestBase(t *testing.T) {
	for in, want := range map[[2]string]string{
		{"box.example.com", "https://mcp.example.com"}: "https://box.example.com",
		{"localhost", "http://127.0.0.1:8787"}:         "http://localhost:8787",
	} {
		if u, err := Base(in[0], in[1]); err != nil || u.String() != want {
			t.Error(u, err)
		}
	}
	for _, bad := range []string{"", "a b", ".x", "x.", "http://x", "x:80"} {
		if u, err := Base(bad, "http://127.0.0.1:1"); err == nil {
			t.Error(u)
		}
	}
}

// TestGatewayIngress: open ports need not be exposed; their servers may speak TLS and see another host; headers name them if the host does
// not; a request wakes a sandbox that may be woken, once it has proof.
func TestGatewayIngress(t *testing.T) {
	g := newGatewayTest(t)
	inside := httptest.NewTLSServer(app(g.broken))
	defer inside.Close()
	port := inside.Listener.Addr().(*net.TCPAddr).Port
	times := sandbox.Times{Life: time.Minute, OnTimeout: sandbox.ActionPause}
	sb, err := g.m.Create(t.Context(), sandbox.CreateOptions{Times: times,
		Ingress: sandbox.Ingress{Open: sandbox.OpenToken, Host: "inside:${PORT}", TLS: []int{port}}})
	if err != nil {
		t.Fatal(err)
	}
	host := func(port int) string { return fmt.Sprintf("%d-%s.box.test", port, sb.ID()) }
	for _, p := range []int{port, g.port} {
		if res, body := g.get(host(p), "/x", TrafficHeader, sb.TrafficToken()); res.StatusCode != 200 ||
			!strings.Contains(body, fmt.Sprintf("host=inside:%d", p)) || !strings.Contains(body, `token=""`) {
			t.Errorf("%d: %s %s", p, res.Status, body)
		}
	}
	if res, _ := g.get(host(port), "/x"); res.StatusCode != 403 {
		t.Error(res.Status)
	}
	if res, body := g.get("127.0.0.1", "/x", SandboxHeader, sb.ID(), PortHeader, strconv.Itoa(port), TrafficHeader,
		sb.TrafficToken()); res.StatusCode != 200 || !strings.Contains(body, "GET /x") {
		t.Errorf("%s %s", res.Status, body)
	}
	pause := func(auto bool) {
		t.Helper()
		if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true, AutoResume: auto}); err != nil {
			t.Fatal(err)
		}
	}
	pause(true)
	if res, _ := g.get(host(port), "/x"); res.StatusCode != 403 || sb.Info().State != sandbox.Paused {
		t.Errorf("%s: who has not shown the token wakes it", res.Status)
	}
	if res, _ := g.get(host(port), "/x", TrafficHeader, sb.TrafficToken()); res.StatusCode != 200 ||
		time.Until(sb.Info().ExpiresAt) < 4*time.Minute {
		t.Errorf("%s %s", res.Status, sb.Info().ExpiresAt)
	}
	pause(false)
	if res, body := g.get(host(port), "/x", TrafficHeader, sb.TrafficToken()); res.StatusCode != 502 ||
		!strings.Contains(body, "The sandbox was not found") || sb.Info().State != sandbox.Paused {
		t.Errorf("%s %s", res.Status, body)
	}
}
