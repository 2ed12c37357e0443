package mcpserver_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/mcpserver"
)

// site is an endpoint whose tools show what it does.
type site struct {
	*httptest.Server
	mcp     *mcpserver.Server
	http    *mcpserver.HTTP
	started chan string
	ended   chan error
	changed atomic.Pointer[func()] // notifies the watcher of test://it
}

// watched is one resource, test://it, which changes when the test says so.
type watched struct{ s *site }

func (w watched) List(context.Context, string) ([]mcp.Resource, string, error) {
	return []mcp.Resource{mcp.NewResource("test://it", "it")}, "", nil
}
func (w watched) Templates() []mcp.ResourceTemplate { return nil }
func (w watched) Read(_ context.Context, uri string) ([]mcp.ResourceContents, error) {
	if uri != "test://it" {
		return nil, mcpserver.ErrNoResource
	}
	return []mcp.ResourceContents{mcp.TextResourceContents{URI: uri, Text: "it"}}, nil
}
func (w watched) Watch(ctx context.Context, uri string, changed func()) error {
	if uri != "test://it" {
		return mcpserver.ErrNoResource
	}
	w.s.changed.Store(&changed)
	return nil
}
func (w watched) Complete(context.Context, string, string, string, map[string]string) ([]string, error) {
	return []string{"it"}, nil
}

func newTools(s *site) *server.MCPServer {
	m := server.NewMCPServer("test", "1", server.WithResourceCapabilities(true, true), server.WithToolCapabilities(true),
		server.WithElicitation())
	add := func(name string, do func(ctx context.Context, r mcp.CallToolRequest) (string, error)) {
		m.AddTool(mcp.NewTool(name), func(ctx context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
			text, err := do(ctx, r)
			return mcp.NewToolResultText(text), err
		})
	}
	add("echo", func(_ context.Context, r mcp.CallToolRequest) (string, error) { return r.GetString("text", ""), nil })
	add("block", func(ctx context.Context, _ mcp.CallToolRequest) (string, error) {
		s.started <- "block"
		<-ctx.Done()
		s.ended <- context.Cause(ctx)
		return "yielded", nil
	})
	add("slow", func(ctx context.Context, r mcp.CallToolRequest) (string, error) {
		s.started <- "slow"
		select {
		case <-time.After(time.Duration(r.GetInt("ms", 0)) * time.Millisecond):
		case <-ctx.Done():
			s.ended <- context.Cause(ctx)
		}
		return "done", nil
	})
	add("notes", func(ctx context.Context, r mcp.CallToolRequest) (string, error) {
		for i := range r.GetInt("count", 3) {
			params := map[string]any{"progressToken": r.Params.Meta.ProgressToken, "progress": i + 1}
			if session := mcpserver.SessionFrom(ctx); session != nil {
				if err := session.Notify("notifications/progress", params); err != nil {
					return "", err
				}
			} else if err := server.ServerFromContext(ctx).SendNotificationToClient(ctx, "notifications/progress", params); err != nil {
				return "", err
			}
		}
		return "done", nil
	})
	add("leave", func(ctx context.Context, _ mcp.CallToolRequest) (string, error) {
		mcpserver.SessionFrom(ctx).Disconnect()
		<-s.started
		return "came back", nil
	})
	add("whose", func(ctx context.Context, _ mcp.CallToolRequest) (string, error) {
		return mcpserver.SessionFrom(ctx).Owner(), nil
	})
	return m
}

func newSite(t *testing.T, change func(*mcpserver.HTTPOptions)) *site {
	t.Helper()
	s := &site{started: make(chan string, 1000), ended: make(chan error, 1000)}
	s.mcp = mcpserver.New(mcpserver.Options{MCP: newTools(s), Resources: watched{s}, Name: "test",
		Tasks: map[string]mcpserver.TaskRule{"slow": {After: 20 * time.Millisecond}}})
	o := mcpserver.HTTPOptions{Allowances: &access.Allowances{Rate: 1e6}}
	if change != nil {
		change(&o)
	}
	s.http = s.mcp.HTTP(o)
	s.Server = httptest.NewServer(s.http)
	t.Cleanup(func() {
		s.http.Close(0)
		s.Server.CloseClientConnections()
		s.Server.Close()
	})
	return s
}

func (s *site) client(modern bool) *sandboxtest.MCP {
	return &sandboxtest.MCP{URL: s.URL, Modern: modern}
}

func eras(t *testing.T, do func(t *testing.T, modern bool)) {
	for _, modern := range []bool{false, true} {
		t.Run(map[bool]string{false: "sessions", true: "stateless"}[modern], func(t *testing.T) { do(t, modern) })
	}
}

// TestNotesOverHTTP: 1,000 calls with three notifications each, 16 at once: each notification arrives, in order, before its answer, at its
// own caller.
func TestNotesOverHTTP(t *testing.T) {
	eras(t, func(t *testing.T, modern bool) {
		s := newSite(t, nil)
		shared := s.client(modern).Open(t)
		var calls sync.WaitGroup
		var bad atomic.Int64
		for range 16 {
			calls.Go(func() {
				for range 1000/16 + 1 {
					token := fmt.Sprint("tok-", shared.ID.Load())
					a, err := shared.Do(t.Context(), "tools/call",
						map[string]any{"name": "notes", "arguments": map[string]any{}, "_meta": map[string]any{"progressToken": token}})
					notes := a.Notes
					if len(notes) > 0 && notes[0].Method == "" { // the empty event that only carries an id
						notes = notes[1:]
					}
					if err != nil || a.Text() != "done" || len(notes) != 3 || len(a.Late) > 0 {
						t.Errorf("%v %+v", err, a)
						bad.Add(1)
						return
					}
					for i, n := range notes {
						if n.Params["progressToken"] != token || n.Params["progress"] != float64(i+1) {
							t.Errorf("note %d: %+v", i, n)
						}
					}
				}
			})
		}
		calls.Wait()
	})
}

// traps are what bare mcp-go gets wrong, as checks that run on any endpoint.
var traps = []struct {
	name  string
	check func(t *testing.T, s *site, url string) error
}{
	{"7: a client cannot cancel another's call", func(t *testing.T, s *site, url string) error {
		ann, bob := &sandboxtest.MCP{URL: url, Modern: true, Name: "ann"}, &sandboxtest.MCP{URL: url, Modern: true, Name: "bob"}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		answered := make(chan error, 1)
		go func() {
			_, err := ann.Call(ctx, "block", nil)
			answered <- err
		}()
		<-s.started
		for id := range 20 {
			_ = bob.Tell(ctx, map[string]any{"jsonrpc": "2.0", "method": "notifications/cancelled",
				"params": map[string]any{"requestId": id, "_meta": map[string]any{
					"io.modelcontextprotocol/protocolVersion":    sandboxtest.ModernVersion,
					"io.modelcontextprotocol/clientCapabilities": map[string]any{}}}})
		}
		select {
		case err := <-s.ended:
			<-answered
			return fmt.Errorf("the call was ended: %w", err)
		case <-time.After(100 * time.Millisecond):
		}
		cancel() // a client cancels by leaving
		if err := <-s.ended; !errors.Is(err, mcpserver.ErrCancelled) && !errors.Is(err, context.Canceled) {
			return err
		}
		<-answered
		return nil
	}},
	{"8: a foreign web page is refused", func(t *testing.T, _ *site, url string) error {
		c := &sandboxtest.MCP{URL: url, Modern: true, Header: http.Header{"Origin": {"https://evil.example"}}}
		return wantStatus(c, t, http.StatusForbidden)
	}},
	{"8: a body of 5 MiB is refused", func(t *testing.T, _ *site, url string) error {
		c := &sandboxtest.MCP{URL: url, Modern: true}
		a, err := c.Call(t.Context(), "echo", map[string]any{"text": strings.Repeat("x", 5<<20)})
		if err != nil || a.Status != http.StatusRequestEntityTooLarge {
			return fmt.Errorf("status %d, %w", a.Status, err)
		}
		return nil
	}},
	{"8: a forged session is not there", func(t *testing.T, _ *site, url string) error {
		return wantStatus(&sandboxtest.MCP{URL: url, Session: "mcp-session-00000000-0000-4000-8000-000000000000"}, t, http.StatusNotFound)
	}},
	{"11: a listener of 2026-07-28 is told of changed resources", func(t *testing.T, s *site, url string) error {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		c := &sandboxtest.MCP{URL: url, Modern: true}
		messages, err := c.Listen(ctx, map[string]any{"resourceSubscriptions": []string{"test://it"}})
		if err != nil {
			return err
		}
		if m := <-messages; m.Method != "notifications/subscriptions/acknowledged" {
			return fmt.Errorf("first %+v", m)
		}
		changed := s.changed.Load()
		if changed == nil {
			return errors.New("nothing watches the resource")
		}
		(*changed)()
		m := <-messages
		meta, _ := m.Params["_meta"].(map[string]any)
		if m.Method != "notifications/resources/updated" || m.Params["uri"] != "test://it" ||
			meta["io.modelcontextprotocol/subscriptionId"] != float64(c.ID.Load()) {
			return fmt.Errorf("%+v", m)
		}
		return nil
	}},
	{"12: a call that lasts becomes a task", func(t *testing.T, _ *site, url string) error {
		c := &sandboxtest.MCP{URL: url, Modern: true,
			Capabilities: map[string]any{"extensions": map[string]any{mcpserver.TasksExtension: map[string]any{}}}}
		a, err := c.Call(t.Context(), "slow", map[string]any{"ms": 200})
		if err != nil {
			return err
		}
		var task struct{ ResultType, TaskID, Status string }
		if err := json.Unmarshal(a.Result, &task); err != nil || task.ResultType != "task" {
			return fmt.Errorf("%s %w", a.Result, err)
		}
		for {
			a, err := c.Do(t.Context(), "tasks/get", map[string]any{"taskId": task.TaskID})
			if err != nil || a.Error != nil {
				return fmt.Errorf("%+v %w", a, err)
			}
			if strings.Contains(string(a.Result), `"completed"`) && strings.Contains(string(a.Result), `"done"`) {
				return nil
			}
			time.Sleep(10 * time.Millisecond)
		}
	}},
}

func wantStatus(c *sandboxtest.MCP, t *testing.T, want int) error {
	a, err := c.Do(t.Context(), "tools/list", nil)
	if err == nil && a.Status != want {
		err = fmt.Errorf("status %d, want %d", a.Status, want)
	}
	return err
}

func TestTraps(t *testing.T) {
	for _, trap := range traps {
		t.Run(trap.name, func(t *testing.T) {
			s := newSite(t, nil)
			if err := trap.check(t, s, s.URL); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestTrapsAreThere: each check fails on bare mcp-go. A check that passes is a reason to use mcp-go's own transport for it.
func TestTrapsAreThere(t *testing.T) {
	for _, trap := range traps {
		t.Run(trap.name, func(t *testing.T) {
			s := newSite(t, nil)
			bare := httptest.NewServer(server.NewStreamableHTTPServer(newTools(s), server.WithStateful(false)))
			defer bare.Close()
			defer bare.CloseClientConnections()
			if err := trap.check(t, s, bare.URL); err == nil {
				t.Error("bare mcp-go passes")
			} else {
				t.Log(err)
			}
		})
	}
}

// TestLeaving: a client with a session cancels nothing by leaving; a client of 2026-07-28 does.
func TestLeaving(t *testing.T) {
	eras(t, func(t *testing.T, modern bool) {
		s := newSite(t, nil)
		c := s.client(modern).Open(t)
		ctx, cancel := context.WithCancel(t.Context())
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			_, _ = c.Call(ctx, "block", nil) // an error means that it left
		}()
		<-s.started
		id := c.ID.Load()
		cancel()
		<-gone
		if !modern {
			select {
			case err := <-s.ended:
				t.Fatalf("leaving ended the call: %v", err)
			case <-time.After(50 * time.Millisecond):
			}
			if err := c.Tell(t.Context(), map[string]any{"jsonrpc": "2.0", "method": "notifications/cancelled",
				"params": map[string]any{"requestId": id}}); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-s.ended; !errors.Is(err, mcpserver.ErrCancelled) {
			t.Fatal(err)
		}
	})
}

// TestComingBack: a client whose stream broke gets what it has missed, exactly once.
func TestComingBack(t *testing.T) {
	s := newSite(t, nil)
	c := s.client(false).Open(t)
	a, err := c.Call(t.Context(), "leave", nil)
	if err != nil || len(a.Events) != 1 || a.Result != nil {
		t.Fatalf("%v %+v", err, a)
	}
	s.started <- "go on"
	r, err := c.Request(t.Context(), http.MethodGet, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Last-Event-ID", a.Events[0])
	again, err := sandboxtest.Send(r, c.ID.Load())
	if err != nil || again.Text() != "came back" || len(again.Notes)+len(again.Late) > 0 {
		t.Fatalf("%v %+v", err, again)
	}
}

// TestKeepAlive: the stream of a slow answer carries keep-alives.
func TestKeepAlive(t *testing.T) {
	eras(t, func(t *testing.T, modern bool) {
		s := newSite(t, func(o *mcpserver.HTTPOptions) { o.SetBeat(30 * time.Millisecond) })
		a, err := s.client(modern).Open(t).Call(t.Context(), "slow", map[string]any{"ms": 200})
		if err != nil || a.Text() != "done" || !strings.HasPrefix(a.Header.Get("Content-Type"), "text/event-stream") ||
			a.Header.Get("X-Accel-Buffering") != "no" {
			t.Fatalf("%v %+v", err, a)
		}
	})
}

func TestSessionsEnd(t *testing.T) {
	s := newSite(t, func(o *mcpserver.HTTPOptions) { o.SessionIdle = 2 * time.Second })
	c := s.client(false).Open(t)
	for deadline := time.Now().Add(20 * time.Second); s.http.Sessions() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("an idle session stays")
		}
	}
	if err := wantStatus(c, t, http.StatusNotFound); err != nil {
		t.Fatal(err)
	}
	s = newSite(t, nil)
	c = s.client(false).Open(t)
	r, err := c.Request(t.Context(), http.MethodDelete, nil)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := sandboxtest.Send(r, 0); err != nil || a.Status != http.StatusNoContent {
		t.Fatal(a.Status, err)
	}
	if err := wantStatus(c, t, http.StatusNotFound); err != nil {
		t.Fatal(err)
	}
}

// TestBadHTTP: bad requests get the status that the specification demands, and disturb nothing.
func TestBadHTTP(t *testing.T) {
	s := newSite(t, nil)
	legacy, modern := s.client(false).Open(t), s.client(true)
	raw := func(c *sandboxtest.MCP, method, body string, headers ...string) func(t *testing.T) sandboxtest.Answer {
		return func(t *testing.T) sandboxtest.Answer {
			r, err := c.Request(t.Context(), method, []byte(body))
			if err != nil {
				t.Fatal(err)
			}
			for i := 0; i < len(headers); i += 2 {
				r.Header.Set(headers[i], headers[i+1])
				if headers[i] == "Host" {
					r.Host = headers[i+1]
				}
			}
			a, err := sandboxtest.Send(r, 1)
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
	}
	changed := func(method string, params map[string]any, change func(http.Header)) func(t *testing.T) sandboxtest.Answer {
		return func(t *testing.T) sandboxtest.Answer {
			r, id, err := modern.Prepare(t.Context(), method, params)
			if err != nil {
				t.Fatal(err)
			}
			change(r.Header)
			a, err := sandboxtest.Send(r, id)
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
	}
	const list = `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`
	none := &sandboxtest.MCP{URL: s.URL}
	for _, c := range []struct {
		name         string
		do           func(t *testing.T) sandboxtest.Answer
		status, code int
	}{
		{"no session", raw(none, "POST", list), 400, -32600},
		{"malformed", raw(legacy, "POST", `{"jsonrpc":`), 400, -32700},
		{"empty", raw(legacy, "POST", " "), 400, -32700},
		{"batch", raw(legacy, "POST", "["+list+"]"), 400, -32600},
		{"deep", raw(legacy, "POST", `{"jsonrpc":"2.0","id":1,"method":"x","params":`+strings.Repeat("[", 100)+strings.Repeat("]", 100)+
			"}"), 400, -32600},
		{"no method", raw(legacy, "POST", `{"jsonrpc":"2.0","id":1}`), 400, -32600},
		{"id is an object", raw(legacy, "POST", `{"jsonrpc":"2.0","id":{},"method":"ping"}`), 400, -32600},
		{"content type", raw(legacy, "POST", list, "Content-Type", "text/plain"), 415, -32600},
		{"accept", raw(legacy, "POST", list, "Accept", "image/png"), 406, -32600},
		{"accept of a GET", raw(legacy, "GET", "", "Accept", "application/json"), 406, -32600},
		{"unknown revision", raw(legacy, "POST", list, "MCP-Protocol-Version", "1999-01-01"), 400, -32600},
		{"verb", raw(legacy, "PUT", list), 405, -32600},
		{"GET of 2026-07-28", raw(none, "GET", "", "MCP-Protocol-Version", sandboxtest.ModernVersion), 405, -32600},
		{"foreign host", raw(legacy, "POST", list, "Host", "evil.example"), 403, -32600},
		{"foreign host with our name in front", raw(legacy, "POST", list, "Host", "localhost.evil.example"), 403, -32600},
		{"origin null", raw(legacy, "POST", list, "Origin", "null"), 403, -32600},
		{"origin with our name as user", raw(legacy, "POST", list, "Origin", "http://localhost@evil.example"), 403, -32600},
		{"origin on another port of loopback", raw(legacy, "POST", list, "Origin", "http://localhost:5173"), 403, -32600},
		{"our own origin", raw(legacy, "POST", list, "Origin", strings.TrimSuffix(legacy.URL, "/mcp")), 200, 0},
		{"method header", changed("tools/list", nil, func(h http.Header) { h.Set("Mcp-Method", "ping") }), 400, -32020},
		{"no method header", changed("tools/list", nil, func(h http.Header) { h.Del("Mcp-Method") }), 400, -32020},
		{"name header", changed("tools/call", map[string]any{"name": "echo"}, func(h http.Header) { h.Set("Mcp-Name", "block") }), 400,
			-32020},
		{"version header", changed("tools/list", nil, func(h http.Header) { h.Set("MCP-Protocol-Version", "2025-11-25") }), 400, -32020},
		{"unknown task", changed("tasks/get", map[string]any{"taskId": "x"}, func(http.Header) {}), 400, -32021},
		{"unknown method", changed("no/such", nil, func(http.Header) {}), 404, -32601},
		{"unknown resource", changed("resources/read", map[string]any{"uri": "file:///etc/passwd"}, func(http.Header) {}), 400, -32602},
		{"right", raw(legacy, "POST", list), 200, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := c.do(t)
			code := 0
			if a.Error != nil {
				code = a.Error.Code
			}
			if a.Status != c.status || code != c.code {
				t.Errorf("status %d, code %d; want %d, %d: %+v", a.Status, code, c.status, c.code, a)
			}
		})
	}
}

// TestHTTPOwners: a key opens its owner's sessions and no others; once revoked, it opens none.
func TestHTTPOwners(t *testing.T) {
	var revoked atomic.Bool
	s := newSite(t, func(o *mcpserver.HTTPOptions) {
		o.SetBeat(15 * time.Millisecond)
		o.Admission.Required = func() bool { return true }
		o.Admission.Authenticate = func(_ context.Context, token string) (string, error) {
			if token == "key-ann" && !revoked.Load() || token == "key-bob" {
				return strings.TrimPrefix(token, "key-"), nil
			}
			return "", mcpserver.ErrDenied
		}
	})
	for _, key := range []string{"", "nope", "key-", "key-ann x"} {
		c := s.client(true)
		c.Key = key
		a, err := c.Do(t.Context(), "tools/list", nil)
		if err != nil || a.Status != http.StatusUnauthorized || !strings.HasPrefix(a.Header.Get("WWW-Authenticate"), "Bearer") {
			t.Errorf("%q: %d %v", key, a.Status, err)
		}
	}
	ann := s.client(false)
	ann.Key = "key-ann"
	ann.Open(t)
	if a, err := ann.Call(t.Context(), "whose", nil); err != nil || a.Text() != "ann" {
		t.Fatal(a.Text(), err)
	}
	thief := &sandboxtest.MCP{URL: s.URL, Key: "key-bob", Session: ann.Session}
	if err := wantStatus(thief, t, http.StatusNotFound); err != nil {
		t.Fatal("bob is in ann's session: ", err)
	}
	messages, err := ann.Listen(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	revoked.Store(true)
	if err := wantStatus(ann, t, http.StatusUnauthorized); err != nil {
		t.Fatal("a revoked key admits: ", err)
	}
	for range messages { // ends: nothing goes to a key that is revoked
	}
}

// TestLimits: an owner that asks for too much gets an error, and others are not disturbed.
func TestLimits(t *testing.T) {
	s := newSite(t, func(o *mcpserver.HTTPOptions) {
		o.Allowances = &access.Allowances{Rate: 1, Calls: 2}
		o.Admission.Authenticate = func(_ context.Context, token string) (string, error) { return token, nil }
	})
	ann, bob := s.client(true), s.client(true)
	ann.Key, bob.Key = "ann", "bob"
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 2 {
		go func() { _, _ = ann.Call(ctx, "block", nil) }() // ends with ctx
		<-s.started
	}
	a, err := ann.Call(t.Context(), "echo", nil)
	if err != nil || a.Status != http.StatusTooManyRequests || a.Header.Get("Retry-After") == "" {
		t.Fatal(a.Status, err)
	}
	if a, err := bob.Call(t.Context(), "echo", map[string]any{"text": "hi"}); err != nil || a.Text() != "hi" {
		t.Fatal(a, err)
	}
	for range 1100 {
		if a, err = bob.Call(t.Context(), "echo", nil); err != nil {
			t.Fatal(err)
		}
	}
	if a.Status != http.StatusTooManyRequests {
		t.Fatal("the rate is not bounded")
	}
}

// TestSlowListener: a listener that stops reading costs bounded memory and disturbs no other; it gets what is due when it reads again.
func TestSlowListener(t *testing.T) {
	s := newSite(t, nil)
	c := s.client(false).Open(t)
	if a, err := c.Do(t.Context(), "resources/subscribe", map[string]any{"uri": "test://it"}); err != nil || a.Error != nil {
		t.Fatal(a, err)
	}
	conn, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\nMcp-Session-Id: %s\r\n\r\n", c.Session)
	changed := *s.changed.Load()
	for range 200_000 {
		changed()
	}
	if a, err := c.Call(t.Context(), "echo", map[string]any{"text": "hi"}); err != nil || a.Text() != "hi" {
		t.Fatal(a, err)
	}
	messages, err := c.Listen(t.Context(), nil) // a second listener takes over
	if err != nil {
		t.Fatal(err)
	}
	changed()
	if m := <-messages; m.Method != "notifications/resources/updated" {
		t.Fatalf("%+v", m)
	}
}

// TestShutdown: calls in flight are asked to yield and are answered; no new call begins.
func TestShutdown(t *testing.T) {
	eras(t, func(t *testing.T, modern bool) {
		s := newSite(t, nil)
		c := s.client(modern).Open(t)
		answered := make(chan sandboxtest.Answer, 1)
		go func() {
			a, err := c.Call(t.Context(), "block", nil)
			if err != nil {
				t.Error(err)
			}
			answered <- a
		}()
		<-s.started
		s.http.Close(10 * time.Millisecond)
		if a := <-answered; a.Text() != "yielded" {
			t.Fatalf("%+v", a)
		}
		if a, err := c.Call(t.Context(), "echo", nil); err == nil && a.Error == nil {
			t.Fatal("a call was begun after the end")
		}
	})
}
