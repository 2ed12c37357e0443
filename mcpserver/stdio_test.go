package mcpserver_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/mcpserver"
)

// newServer makes a server whose tools show what the loop does.
func newServer(started chan<- string, ended chan<- error, limits ...int) *mcpserver.Server {
	m := server.NewMCPServer("test", "1")
	text := func(s string) *mcp.CallToolResult { return mcp.NewToolResultText(s) }
	m.AddTool(mcp.NewTool("echo", mcp.WithString("text")), func(_ context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		return text(r.GetString("text", "")), nil
	})
	m.AddTool(mcp.NewTool("block"), func(ctx context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		if started != nil {
			started <- "block"
		}
		<-ctx.Done()
		if ended != nil {
			ended <- context.Cause(ctx)
		}
		return text("yielded"), nil
	})
	m.AddTool(mcp.NewTool("notes", mcp.WithNumber("count")), func(ctx context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		session := mcpserver.SessionFrom(ctx)
		if session == nil {
			return nil, errors.New("no session")
		}
		for i := range r.GetInt("count", 0) {
			if err := session.Notify("notifications/progress", map[string]any{"progress": i + 1}); err != nil {
				return nil, err
			}
		}
		return text("done"), nil
	})
	m.AddTool(mcp.NewTool("panic"), func(context.Context, mcp.CallToolRequest) (*mcp.CallToolResult, error) { panic("oh") })
	o := mcpserver.Options{MCP: m}
	if len(limits) > 0 {
		o.SetCalls(limits[0], limits[1])
	}
	return mcpserver.New(o)
}

// client is the other end of a conversation.
type client struct {
	t    *testing.T
	in   *io.PipeWriter
	out  *bufio.Reader
	done chan error
	stop context.CancelFunc
}

func connect(t *testing.T, s mcpserver.Stdio) *client {
	t.Helper()
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	c := &client{t: t, in: inW, out: bufio.NewReaderSize(outR, 1<<20), done: make(chan error, 1), stop: cancel}
	go func() {
		err := s.Serve(ctx, inR, outW)
		_ = outW.Close()
		c.done <- err
	}()
	t.Cleanup(func() {
		cancel()
		_ = inW.Close()
		_ = outR.Close()
	})
	return c
}

func (c *client) send(line string) {
	c.t.Helper()
	if _, err := io.WriteString(c.in, line+"\n"); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) call(id any, tool string, arguments string) {
	c.t.Helper()
	key, err := json.Marshal(id)
	if err != nil {
		c.t.Fatal(err)
	}
	c.send(fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"method":"tools/call","params":{"name":%q,"arguments":%s}}`, key, tool, arguments))
}

// reply is a message of the server.
type reply struct {
	ID     json.RawMessage `json:"id"`
	Method string          `json:"method"`
	Params struct {
		Progress int `json:"progress"`
	} `json:"params"`
	Result struct {
		Content []struct {
			Text string `json:"text"`
		} `json:"content"`
	} `json:"result"`
	Error *struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	} `json:"error"`
}

func (c *client) receive() reply {
	c.t.Helper()
	line, err := c.out.ReadBytes('\n')
	if err != nil {
		c.t.Fatalf("the conversation ended: %v", err)
	}
	var r reply
	if err := json.Unmarshal(line, &r); err != nil {
		c.t.Fatalf("%q: %v", line, err)
	}
	return r
}

// end closes the client's half and collects what the server still sends.
func (c *client) end() []reply {
	c.t.Helper()
	_ = c.in.Close()
	var rest []reply
	for {
		line, err := c.out.ReadBytes('\n')
		if len(line) > 0 {
			var r reply
			if err := json.Unmarshal(line, &r); err != nil {
				c.t.Fatal(err)
			}
			rest = append(rest, r)
		}
		if err != nil {
			break
		}
	}
	if err := <-c.done; err != nil {
		c.t.Fatal(err)
	}
	return rest
}

// TestManySlowCalls: slow calls hold up neither other calls nor cancellations.
func TestManySlowCalls(t *testing.T) {
	started, ended := make(chan string, 200), make(chan error, 200)
	c := connect(t, mcpserver.Stdio{Server: newServer(started, ended, 100, 0)})
	for i := range 60 {
		c.call(i, "block", "{}")
	}
	for range 60 {
		<-started
	}
	c.call("quick", "echo", `{"text":"hi"}`)
	if r := c.receive(); string(r.ID) != `"quick"` || r.Result.Content[0].Text != "hi" {
		t.Fatalf("%+v", r)
	}
	c.send(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":30}}`)
	if err := <-ended; !errors.Is(err, mcpserver.ErrCancelled) {
		t.Fatal(err)
	}
}

// TestWaitingCalls: calls beyond those that run at once wait, and can be cancelled while they wait.
func TestWaitingCalls(t *testing.T) {
	started := make(chan string, 10)
	c := connect(t, mcpserver.Stdio{Server: newServer(started, nil, 2, 4)})
	for i := range 4 {
		c.call(i, "block", "{}")
		if i < 2 {
			<-started
		}
	}
	c.call(4, "echo", "{}")
	if r := c.receive(); r.Error == nil || !strings.Contains(r.Error.Message, "in flight") {
		t.Fatalf("the fifth call: %+v", r)
	}
	c.call(2, "echo", "{}")
	if r := c.receive(); r.Error == nil || !strings.Contains(r.Error.Message, "id") {
		t.Fatalf("an id in use: %+v", r)
	}
	for i := range 4 {
		c.send(fmt.Sprintf(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":%d}}`, 3-i)) // the waiting ones first
	}
	c.call("last", "echo", `{"text":"hi"}`)
	for {
		// A slot is free only when a cancelled call has ended; until then this call may be refused.
		r := c.receive()
		if r.Error == nil {
			if string(r.ID) != `"last"` {
				t.Fatalf("%+v", r)
			}
			if len(started) > 0 {
				t.Fatal("a call that was cancelled while it waited was begun")
			}
			return
		}
		time.Sleep(time.Millisecond)
		c.call("last", "echo", `{"text":"hi"}`)
	}
}

// TestNotesPrecedeTheirResponse: 5,000 notifications arrive, in order, before the response.
func TestNotesPrecedeTheirResponse(t *testing.T) {
	c := connect(t, mcpserver.Stdio{Server: newServer(nil, nil)})
	c.call(1, "notes", `{"count":5000}`)
	for i := range 5000 {
		if r := c.receive(); r.Method != "notifications/progress" || r.Params.Progress != i+1 {
			t.Fatalf("note %d: %+v", i, r)
		}
	}
	if r := c.receive(); string(r.ID) != "1" || r.Result.Content[0].Text != "done" {
		t.Fatalf("%+v", r)
	}
}

// TestCancelledIsNotAnswered: a cancelled call gets no answer.
func TestCancelledIsNotAnswered(t *testing.T) {
	started, ended := make(chan string), make(chan error)
	c := connect(t, mcpserver.Stdio{Server: newServer(started, ended)})
	c.call("a", "block", "{}")
	<-started
	c.send(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":"a"}}`)
	<-ended
	c.send(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":"never was"}}`)
	c.send(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":7}`)
	c.call("b", "echo", `{}`)
	if rest := c.end(); len(rest) != 1 || string(rest[0].ID) != `"b"` {
		t.Fatalf("%+v", rest)
	}
}

// TestEndOfInputDrains: every request before the end of stdin is answered.
func TestEndOfInputDrains(t *testing.T) {
	for range 100 {
		c := connect(t, mcpserver.Stdio{Server: newServer(nil, nil)})
		for i := range 5 {
			c.call(i, "notes", `{"count":3}`)
		}
		answers := 0
		for _, r := range c.end() {
			if r.Method == "" {
				answers++
			}
		}
		if answers != 5 {
			t.Fatalf("%d answers", answers)
		}
	}
}

// TestEndOfInputYields: at the end of stdin a long call is asked to yield, not cancelled, and its answer is sent.
func TestEndOfInputYields(t *testing.T) {
	started, ended := make(chan string, 1), make(chan error, 1)
	c := connect(t, mcpserver.Stdio{Server: newServer(started, ended)}.WithDrain(10*time.Millisecond))
	c.call(1, "block", "{}")
	<-started
	if rest := c.end(); len(rest) != 1 || rest[0].Result.Content[0].Text != "yielded" {
		t.Fatalf("%+v", rest)
	}
	cause := <-ended
	var yield interface{ Yield() bool }
	if errors.Is(cause, mcpserver.ErrCancelled) || !errors.As(cause, &yield) || !yield.Yield() {
		t.Fatal(cause)
	}
}

// TestTwoConversations: two conversations in one process have two sessions.
func TestTwoConversations(t *testing.T) {
	var mu sync.Mutex
	ids := map[string]bool{}
	m := newServer(nil, nil)
	m.MCP.AddTool(mcp.NewTool("id"), func(ctx context.Context, _ mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		mu.Lock()
		defer mu.Unlock()
		ids[server.ClientSessionFromContext(ctx).SessionID()] = true
		return mcp.NewToolResultText(""), nil
	})
	a, b := connect(t, mcpserver.Stdio{Server: m}), connect(t, mcpserver.Stdio{Server: m})
	for _, c := range []*client{a, b, a} {
		c.call(1, "id", "{}")
		c.receive()
	}
	if len(ids) != 2 {
		t.Fatal(ids)
	}
}

func TestSignalEndsServing(t *testing.T) {
	started := make(chan string, 1)
	c := connect(t, mcpserver.Stdio{Server: newServer(started, nil)})
	c.call(1, "block", "{}")
	<-started
	c.stop()
	if r := c.receive(); r.Result.Content[0].Text != "yielded" {
		t.Fatalf("%+v", r)
	}
	if err := <-c.done; err != nil {
		t.Fatal(err)
	}
}

// TestBadInput: each bad message gets one error, and the server continues.
func TestBadInput(t *testing.T) {
	c := connect(t, mcpserver.Stdio{Server: newServer(nil, nil)})
	for name, test := range map[string]struct {
		line string
		code int
	}{
		"not JSON":     {`{"jsonrpc": "2.0", "id": 1, "method": `, -32700},
		"not UTF-8":    {"\xff\xfe", -32700},
		"a batch":      {`[{"jsonrpc":"2.0","id":1,"method":"ping"}]`, -32600},
		"no method":    {`{"jsonrpc":"2.0","id":1}`, -32600},
		"a number":     {`5`, -32600},
		"a strange id": {`{"jsonrpc":"2.0","id":{"a":1},"method":"ping"}`, -32600},
		"another RPC":  {`{"jsonrpc":"1.0","id":1,"method":"ping"}`, -32600},
		"deep": {`{"jsonrpc":"2.0","id":1,"method":"ping","params":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}`,
			-32600},
		"long":           {`{"jsonrpc":"2.0","id":1,"method":"ping","params":"` + strings.Repeat("x", mcpserver.MaxMessage) + `"}`, -32600},
		"a wrong type":   {`{"jsonrpc":"2.0","id":1,"method":5}`, -32600},
		"no such method": {`{"jsonrpc":"2.0","id":1,"method":"no/such"}`, -32601},
		"no such tool":   {`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"no_such"}}`, -32602},
		"a panic":        {`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"panic"}}`, -32603},
	} {
		c.send(test.line)
		if r := c.receive(); r.Error == nil || r.Error.Code != test.code || r.Error.Message == "" {
			t.Errorf("%s: %+v %+v", name, r, r.Error)
		}
	}
	c.send("")
	c.send(`{"jsonrpc":"2.0","method":"notifications/unknown"}`)
	c.send(`{"jsonrpc":"2.0","id":7,"result":{}}`) // an answer to no question
	c.call(1, "echo", `{"text":"still here"}`)
	if r := c.receive(); r.Result.Content[0].Text != "still here" {
		t.Fatalf("%+v", r)
	}
}

// TestIDs: ids come back as they were sent: large numbers, floats, strings.
func TestIDs(t *testing.T) {
	c := connect(t, mcpserver.Stdio{Server: newServer(nil, nil)})
	for _, id := range []string{"0", "-1", "9007199254740993", "12345678901234567890", "1.5", `"a"`, `"\u0000"`, `""`} {
		c.send(`{"jsonrpc":"2.0","id":` + id + `,"method":"ping"}`)
		if r := c.receive(); string(r.ID) != id {
			t.Errorf("%s came back as %s", id, r.ID)
		}
	}
}

// TestNegotiation: the server speaks every revision up to the newest.
func TestNegotiation(t *testing.T) {
	for _, revision := range []string{"2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"} {
		c := connect(t, mcpserver.Stdio{Server: newServer(nil, nil)})
		c.send(`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"` + revision +
			`","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`)
		line, err := c.out.ReadString('\n')
		if err != nil || !strings.Contains(line, `"protocolVersion":"`+revision+`"`) {
			t.Errorf("%s: %s %v", revision, line, err)
		}
		c.send(`{"jsonrpc":"2.0","method":"notifications/initialized"}`)
		c.call(2, "echo", `{"text":"hi"}`)
		if r := c.receive(); r.Result.Content[0].Text != "hi" {
			t.Errorf("%s: %+v", revision, r)
		}
	}
	// 2026-07-28 has no handshake: each request carries its version.
	c := connect(t, mcpserver.Stdio{Server: newServer(nil, nil)})
	c.send(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"text":"hi"},` +
		`"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"t",` +
		`"version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}}}`)
	if r := c.receive(); r.Error != nil || len(r.Result.Content) != 1 || r.Result.Content[0].Text != "hi" {
		t.Errorf("2026-07-28: %+v %+v", r, r.Error)
	}
}

// TestBrokenOutput: a client that is gone ends the conversation with an error.
func TestBrokenOutput(t *testing.T) {
	inR, inW := io.Pipe()
	defer inW.Close()
	done := make(chan error, 1)
	go func() {
		done <- mcpserver.Stdio{Server: newServer(nil, nil)}.Serve(context.Background(), inR, brokenWriter{})
	}()
	if _, err := io.WriteString(inW, `{"jsonrpc":"2.0","id":1,"method":"ping"}`+"\n"); err != nil {
		t.Fatal(err)
	}
	_ = inW.Close()
	if err := <-done; err == nil || !strings.Contains(err.Error(), "broken") {
		t.Fatal(err)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("broken") }

// TestNotesOnStdio: 1,000 calls with three notifications each, 16 at once, in both eras: each notification arrives, in order, before its
// answer.
func TestNotesOnStdio(t *testing.T) {
	eras(t, func(t *testing.T, modern bool) {
		s := &site{started: make(chan string, 1), ended: make(chan error, 1)}
		c := connect(t, mcpserver.Stdio{Server: mcpserver.New(mcpserver.Options{MCP: newTools(s)})})
		meta := ""
		if modern {
			meta = `"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},`
		}
		const calls = 1000
		free := make(chan struct{}, 16)
		go func() {
			for i := range calls {
				free <- struct{}{}
				fmt.Fprintf(c.in,
					`{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"notes","arguments":{},`+
						`"_meta":{%s"progressToken":"t%d"}}}`+"\n", i, meta, i)
			}
		}()
		told := map[string]int{}
		for answered := 0; answered < calls; {
			line, err := c.out.ReadBytes('\n')
			if err != nil {
				t.Fatal(err)
			}
			var m sandboxtest.Message
			if err := json.Unmarshal(line, &m); err != nil {
				t.Fatal(err)
			}
			if m.Method == "" {
				if told["t"+string(m.ID)] != 3 || m.Error != nil {
					t.Fatalf("%s after %d notes", line, told["t"+string(m.ID)])
				}
				answered++
				<-free
				continue
			}
			token := fmt.Sprint(m.Params["progressToken"])
			if told[token]++; m.Params["progress"] != float64(told[token]) {
				t.Fatalf("%s is the %dth", line, told[token])
			}
		}
	})
}

// TestUnreadStdout: a client that has closed its end and reads nothing does not block the server, neither by calls nor by requests that are
// answered at once.
func TestUnreadStdout(t *testing.T) {
	for name, line := range map[string]string{
		"answered at once": `{"jsonrpc":"2.0","id":1,"method":"ping"}`,
		"calls":            `{"jsonrpc":"2.0","id":%d,"method":"tools/list"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in, feed, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			unread, out, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer in.Close()
			defer unread.Close()
			served := make(chan error, 1)
			go func() {
				served <- mcpserver.Stdio{Server: newServer(nil, nil)}.WithDrain(time.Second).Serve(t.Context(), in, out)
			}()
			go func() {
				defer feed.Close()
				for i := range 2000 {
					text := line
					if strings.Contains(line, "%d") {
						text = fmt.Sprintf(line, i)
					}
					_ = feed.SetWriteDeadline(time.Now().Add(time.Second)) // once the pipe is full, close it
					if _, err := io.WriteString(feed, text+"\n"); err != nil {
						return
					}
				}
			}()
			select {
			case <-served:
			case <-time.After(time.Minute):
				t.Error("it is still there")
			}
			_ = unread.Close() // unblocks a writer
		})
	}
}
