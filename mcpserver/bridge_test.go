package mcpserver_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/mcp"

	"soulbox.dev/soulbox/mcpserver"
)

// bridged is a client on stdio of a site, with a proxy in between that the test can break.
type bridged struct {
	*client
	proxy *proxy
}

// proxy passes connections on until the test breaks them.
type proxy struct {
	net.Listener
	to    string
	mu    sync.Mutex
	conns map[net.Conn]bool
	down  atomic.Bool
}

func (p *proxy) serve() {
	for {
		in, err := p.Accept()
		if err != nil {
			return
		}
		if p.down.Load() {
			_ = in.Close()
			continue
		}
		p.mu.Lock() // held until the connection is registered, so that none to the old address remains after a break
		out, err := net.Dial("tcp", p.to)
		if err == nil {
			p.conns[in], p.conns[out] = true, true
		}
		p.mu.Unlock()
		if err != nil {
			_ = in.Close()
			continue
		}
		for _, way := range [][2]net.Conn{{in, out}, {out, in}} {
			go func() {
				_, _ = io.Copy(way[0], way[1]) // ends when either is closed
				_, _ = way[0].Close(), way[1].Close()
			}()
		}
	}
}

// breakAll resets every connection.
func (p *proxy) breakAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.(*net.TCPConn).SetLinger(0) // a reset, not an orderly end
		_ = c.Close()
		delete(p.conns, c)
	}
}

func newBridge(t *testing.T, s *site, change func(*mcpserver.Bridge)) *bridged {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Listener: l, to: s.Listener.Addr().String(), conns: map[net.Conn]bool{}}
	go p.serve()
	t.Cleanup(func() { _ = l.Close(); p.breakAll() })
	b := mcpserver.Bridge{URL: "http://" + l.Addr().String()}
	b.SetPatience(time.Minute)
	if change != nil {
		change(&b)
	}
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	c := &client{t: t, in: inW, out: bufio.NewReaderSize(outR, 1<<20), done: make(chan error, 1), stop: cancel}
	go func() {
		err := b.Serve(ctx, inR, outW)
		_ = outW.Close()
		c.done <- err
	}()
	t.Cleanup(func() { cancel(); _ = inW.Close(); _ = outR.Close() })
	return &bridged{c, p}
}

// hello begins the conversation as clients of the era with sessions do.
func (b *bridged) hello() {
	b.send(`{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},` +
		`"clientInfo":{"name":"t","version":"1"}}}`)
	b.receive()
	b.send(`{"jsonrpc":"2.0","method":"notifications/initialized"}`)
}

const modernMeta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`

// TestBridge: the server over HTTP answers what a client on stdio asks, in both eras, with notifications, updates and cancellation.
func TestBridge(t *testing.T) {
	s := newSite(t, nil)
	b := newBridge(t, s, nil)
	b.hello()
	b.send(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"notes","arguments":{},"_meta":{"progressToken":"t"}}}`)
	for i := 1; i <= 3; i++ {
		if r := b.receive(); r.Params.Progress != i {
			t.Fatalf("%+v", r)
		}
	}
	if r := b.receive(); string(r.ID) != "1" {
		t.Fatalf("%+v", r)
	}
	b.send(`{"jsonrpc":"2.0","id":2,"method":"resources/subscribe","params":{"uri":"test://it"}}`)
	b.receive()
	(*s.changed.Load())()
	if r := b.receive(); r.Method != "notifications/resources/updated" {
		t.Fatalf("%+v", r)
	}
	for id, line := range map[int]string{
		3: `{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"block","arguments":{}}}`,
		4: `{"jsonrpc":"2.0","id":4,"method":"tools/call","params":{"name":"block","arguments":{},` + modernMeta + `}}`,
	} {
		b.send(line)
		<-s.started
		b.send(fmt.Sprintf(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":%d}}`, id))
		if err := <-s.ended; err != mcpserver.ErrCancelled {
			t.Fatal(id, err)
		}
	}
	b.send(`{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":"echo","arguments":{"text":"hi"},` + modernMeta + `}}`)
	if r := b.receive(); string(r.ID) != "5" || r.Result.Content[0].Text != "hi" {
		t.Fatalf("%+v", r)
	}
	if rest := b.end(); len(rest) > 0 {
		t.Fatalf("%+v", rest)
	}
	if n := s.http.Sessions(); n > 1 { // the stateless one ends by itself
		t.Errorf("%d sessions are left", n)
	}
}

// TestBridgeBreaks: connections break at any moment and the server forgets its sessions; each call is still carried out and answered once.
func TestBridgeBreaks(t *testing.T) {
	s := newSite(t, nil)
	var mu sync.Mutex
	made := map[string]int{}
	s.mcp.MCP.AddTool(mcp.NewTool("count"), func(_ context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		mu.Lock()
		defer mu.Unlock()
		made[r.GetString("text", "")]++
		time.Sleep(time.Millisecond)
		return mcp.NewToolResultText(r.GetString("text", "")), nil
	})
	b := newBridge(t, s, nil)
	b.hello()
	stop := make(chan struct{})
	var breaker sync.WaitGroup
	breaker.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(20*time.Millisecond +
				time.Duration(i%25/24)*time.Second): // long enough that a busy machine answers something too
				b.proxy.down.Store(i%5 == 0)
				b.proxy.breakAll()
			}
		}
	})
	const calls = 200
	go func() {
		for i := range calls {
			fmt.Fprintf(b.in, `{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"count","arguments":{"text":"%d"}}}`+"\n", i+
				10, i)
			time.Sleep(time.Millisecond)
		}
	}()
	answered := map[string]int{}
	for n := 0; n < calls; {
		r := b.receive()
		if r.Method != "" {
			continue
		}
		if r.Error != nil || len(r.Result.Content) == 0 {
			t.Errorf("%s: %+v", r.ID, r.Error)
		}
		answered[string(r.ID)]++
		n++
	}
	close(stop)
	breaker.Wait()
	b.proxy.down.Store(false)
	for i := range calls {
		if made[fmt.Sprint(i)] != 1 || answered[fmt.Sprint(i+10)] != 1 {
			t.Errorf("call %d was made %d times and answered %d times", i, made[fmt.Sprint(i)], answered[fmt.Sprint(i+10)])
		}
	}
}

// TestBridgeBeginsAnew: a server that has forgotten the session gets the handshake and the subscriptions again, and the client does not
// notice.
func TestBridgeBeginsAnew(t *testing.T) {
	s := newSite(t, func(o *mcpserver.HTTPOptions) { o.SessionIdle = 30 * time.Millisecond })
	b := newBridge(t, s, nil)
	b.send(`{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},` +
		`"clientInfo":{"name":"t","version":"1"}}}`)
	b.receive()
	b.send(`{"jsonrpc":"2.0","id":2,"method":"resources/subscribe","params":{"uri":"test://it"}}`)
	b.receive()
	for deadline := time.Now().Add(20 * time.Second); s.http.Sessions() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the session stays")
		}
	}
	s.changed.Store(nil)
	b.call(3, "echo", `{"text":"hi"}`)
	if r := b.receive(); r.Result.Content[0].Text != "hi" || s.changed.Load() == nil {
		t.Fatalf("%+v", r)
	}
}

// TestBridgeRefused: a wrong key, a wrong address and a redirect.
func TestBridgeRefused(t *testing.T) {
	s := newSite(t, func(o *mcpserver.HTTPOptions) {
		o.Admission.Required = func() bool { return true }
		o.Admission.Authenticate = func(_ context.Context, token string) (string, error) {
			if token != "right" {
				return "", mcpserver.ErrDenied
			}
			return "ann", nil
		}
	})
	ask := func(change func(*mcpserver.Bridge)) reply {
		b := newBridge(t, s, change)
		b.send(`{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":"whose","arguments":{},` + modernMeta + `}}`)
		return b.receive()
	}
	if r := ask(func(b *mcpserver.Bridge) { b.Key = "wrong" }); r.Error == nil || !strings.Contains(r.Error.Message, "key") ||
		strings.Contains(r.Error.Message, "wrong") {
		t.Errorf("%+v", r)
	}
	if r := ask(func(b *mcpserver.Bridge) { b.URL = "http://127.0.0.1:1"; b.SetPatience(time.Millisecond) }); r.Error == nil ||
		!strings.Contains(r.Error.Message, "not there") {
		t.Errorf("%+v", r)
	}
	key := make(chan string, 10)
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key <- r.Header.Get("Authorization")
		w.WriteHeader(http.StatusTeapot)
	}))
	defer elsewhere.Close()
	mux := http.NewServeMux()
	mux.Handle("/mcp", s.http)
	mux.Handle("/moved", http.RedirectHandler("/mcp", http.StatusMovedPermanently))
	mux.Handle("/away", http.RedirectHandler(elsewhere.URL, http.StatusTemporaryRedirect))
	moved := httptest.NewServer(mux)
	defer moved.Close()
	if r := ask(func(b *mcpserver.Bridge) { b.Key, b.URL = "right", moved.URL+"/moved" }); r.Error != nil ||
		r.Result.Content[0].Text != "ann" {
		t.Errorf("%+v", r.Error)
	}
	if r := ask(func(b *mcpserver.Bridge) { b.Key, b.URL = "right", moved.URL+"/away?token=secret" }); r.Error == nil ||
		strings.Contains(r.Error.Message, "secret") {
		t.Errorf("%+v", r)
	}
	if k := <-key; k != "" {
		t.Error("another server got the key")
	}
}

// TestBridgeServerDies: a call that was in a server that died is not repeated in the next server; the client gets an error.
func TestBridgeServerDies(t *testing.T) {
	first, second := newSite(t, nil), newSite(t, nil)
	b := newBridge(t, first, nil)
	b.hello()
	b.call(1, "block", "{}")
	<-first.started
	b.proxy.mu.Lock()
	b.proxy.to = second.Listener.Addr().String()
	b.proxy.mu.Unlock()
	b.proxy.breakAll()
	for {
		r := b.receive()
		if r.Method != "" {
			continue
		}
		if string(r.ID) != "1" || r.Error == nil || !strings.Contains(r.Error.Message, "may have been carried out") {
			t.Fatalf("%+v", r)
		}
		break
	}
	select {
	case <-second.started:
		t.Fatal("the call was made again")
	default:
	}
	b.call(2, "echo", `{"text":"hi"}`)
	if r := b.receive(); r.Result.Content[0].Text != "hi" {
		t.Fatalf("%+v", r)
	}
}

// TestBridgeUntrusted: the error for an untrusted certificate says so, and what to do; names below localhost mean this machine.
func TestBridgeUntrusted(t *testing.T) {
	web := httptest.NewUnstartedServer(http.NotFoundHandler())
	web.Config.ErrorLog = log.New(io.Discard, "", 0)
	web.StartTLS()
	defer web.Close()
	_, port, err := net.SplitHostPort(web.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	in := strings.NewReader(`{"jsonrpc":"2.0","id":0,"method":"ping"}` + "\n")
	var out bytes.Buffer
	if err := (mcpserver.Bridge{URL: "https://box.localhost:" + port + "/mcp"}).Serve(t.Context(), in, &out); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "is not trusted") || !strings.Contains(out.String(), "SSL_CERT_FILE") {
		t.Error(out.String())
	}
}
