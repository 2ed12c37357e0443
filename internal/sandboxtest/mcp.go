package sandboxtest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
)

// MCP is a client of an MCP endpoint over HTTP that shows what is on the wire. It speaks the revision with sessions or, if Modern,
// 2026-07-28.
type MCP struct {
	URL, Key     string
	Modern       bool
	Name         string         // of the client; default "test"
	Capabilities map[string]any // of the client
	Session      string         // set by Open
	ID           atomic.Int64   // ID of the last request
	Header       http.Header    // added to every request
}

// The revisions that MCP speaks.
const (
	ModernVersion = "2026-07-28"
	legacyVersion = "2025-11-25"
)

// Message is a message from a server.
type Message struct {
	ID     json.RawMessage `json:"id"`
	Method string          `json:"method"`
	Params map[string]any  `json:"params"`
	Result json.RawMessage `json:"result"`
	Error  *struct {
		Code    int             `json:"code"`
		Message string          `json:"message"`
		Data    json.RawMessage `json:"data"`
	} `json:"error"`
}

// Answer is the response to one request, with everything around it.
type Answer struct {
	Message
	Status int
	Header http.Header
	Notes  []Message // what came before the response
	Late   []Message // what came after the response; nothing may
	Events []string  // IDs of the events
}

// Text returns the text of a tool's result, or the error.
func (a Answer) Text() string {
	if a.Error != nil {
		return a.Error.Message
	}
	var r struct{ Content []struct{ Text string } }
	if err := json.Unmarshal(a.Result, &r); err != nil || len(r.Content) == 0 {
		return string(a.Result)
	}
	return r.Content[0].Text
}

// Field returns a field of a tool's structured result.
func (a Answer) Field(name string) string {
	var r struct{ StructuredContent map[string]any }
	if json.Unmarshal(a.Result, &r) != nil || r.StructuredContent[name] == nil {
		return ""
	}
	return fmt.Sprint(r.StructuredContent[name])
}

// Open starts a session, unless the client is Modern, which has none.
func (c *MCP) Open(t testing.TB) *MCP {
	t.Helper()
	if c.Modern {
		return c
	}
	capabilities := c.Capabilities
	if capabilities == nil {
		capabilities = map[string]any{}
	}
	a, err := c.Do(t.Context(), "initialize", map[string]any{"protocolVersion": legacyVersion, "capabilities": capabilities,
		"clientInfo": map[string]any{"name": "test", "version": "1"}})
	if err != nil || a.Error != nil {
		t.Fatalf("initialize: %v %+v", err, a)
	}
	c.Session = a.Header.Get("Mcp-Session-Id")
	if err := c.Tell(t.Context(), map[string]any{"jsonrpc": "2.0", "method": "notifications/initialized"}); err != nil {
		t.Fatal(err)
	}
	return c
}

// Request makes an HTTP request with the given body.
func (c *MCP) Request(ctx context.Context, httpMethod string, body []byte) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, httpMethod, c.URL, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "application/json, text/event-stream")
	if httpMethod == http.MethodPost {
		r.Header.Set("Content-Type", "application/json")
	}
	if c.Key != "" {
		r.Header.Set("Authorization", "Bearer "+c.Key)
	}
	if c.Session != "" {
		r.Header.Set("Mcp-Session-Id", c.Session)
		r.Header.Set("MCP-Protocol-Version", legacyVersion)
	}
	for k, v := range c.Header {
		r.Header[k] = v
	}
	return r, nil
}

// Prepare makes the HTTP request for a method call, and returns its ID.
func (c *MCP) Prepare(ctx context.Context, method string, params map[string]any) (*http.Request, int64, error) {
	id := c.ID.Add(1)
	message := map[string]any{"jsonrpc": "2.0", "id": id, "method": method}
	all := map[string]any{}
	for k, v := range params {
		all[k] = v
	}
	if c.Modern {
		meta := map[string]any{}
		if given, ok := all["_meta"].(map[string]any); ok {
			for k, v := range given {
				meta[k] = v
			}
		}
		name, capabilities := c.Name, c.Capabilities
		if name == "" {
			name = "test"
		}
		if capabilities == nil {
			capabilities = map[string]any{}
		}
		meta["io.modelcontextprotocol/protocolVersion"] = ModernVersion
		meta["io.modelcontextprotocol/clientInfo"] = map[string]any{"name": name, "version": "1"}
		meta["io.modelcontextprotocol/clientCapabilities"] = capabilities
		all["_meta"] = meta
	}
	if len(all) > 0 {
		message["params"] = all
	}
	body, err := json.Marshal(message)
	if err != nil {
		return nil, 0, err
	}
	r, err := c.Request(ctx, http.MethodPost, body)
	if err != nil {
		return nil, 0, err
	}
	if c.Modern {
		r.Header.Set("MCP-Protocol-Version", ModernVersion)
		r.Header.Set("Mcp-Method", method)
		for _, key := range []string{"name", "uri", "taskId"} {
			if v, ok := all[key].(string); ok {
				r.Header.Set("Mcp-Name", v)
			}
		}
		if args, ok := all["arguments"].(map[string]any); ok {
			if sb, ok := args["sandbox_id"].(string); ok {
				r.Header.Set("Mcp-Param-Sandbox-Id", sb)
			}
		}
	}
	return r, id, nil
}

// Tell sends a message that gets no response.
func (c *MCP) Tell(ctx context.Context, message any) error {
	body, err := json.Marshal(message)
	if err != nil {
		return err
	}
	r, err := c.Request(ctx, http.MethodPost, body)
	if err != nil {
		return err
	}
	if c.Modern {
		r.Header.Set("MCP-Protocol-Version", ModernVersion)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusAccepted {
		return fmt.Errorf("status %d", res.StatusCode)
	}
	return nil
}

// Do makes a request and reads its response with everything around it.
func (c *MCP) Do(ctx context.Context, method string, params map[string]any) (Answer, error) {
	r, id, err := c.Prepare(ctx, method, params)
	if err != nil {
		return Answer{}, err
	}
	return Send(r, id)
}

// Call calls a tool.
func (c *MCP) Call(ctx context.Context, tool string, args map[string]any) (Answer, error) {
	return c.Do(ctx, "tools/call", map[string]any{"name": tool, "arguments": args})
}

// Send sends a request and reads everything that comes back.
func Send(r *http.Request, id int64) (a Answer, err error) {
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		return a, err
	}
	defer res.Body.Close()
	a.Status, a.Header = res.StatusCode, res.Header
	if !strings.HasPrefix(res.Header.Get("Content-Type"), "text/event-stream") {
		body, err := io.ReadAll(res.Body)
		if err == nil && len(body) > 0 {
			err = json.Unmarshal(body, &a.Message)
		}
		return a, err
	}
	answered := false
	err = Events(res.Body, func(event string, m Message) error {
		a.Events = append(a.Events, event)
		switch {
		case answered:
			a.Late = append(a.Late, m)
		case m.Method == "" && string(m.ID) == fmt.Sprint(id):
			a.Message, answered = m, true
		case m.Method != "" || m.ID != nil:
			a.Notes = append(a.Notes, m)
		}
		return nil
	})
	return a, err
}

// Events reads a stream of events, and calls each with the ID and the message of every event.
func Events(body io.Reader, each func(id string, m Message) error) error {
	r := bufio.NewReaderSize(body, 1<<20)
	id, data := "", ""
	for {
		line, err := r.ReadString('\n')
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "id:"):
			id = strings.TrimSpace(line[3:])
		case strings.HasPrefix(line, "data:"):
			data += strings.TrimSpace(line[5:])
		case line == "" && (id != "" || data != ""):
			var m Message
			if data != "" {
				if err := json.Unmarshal([]byte(data), &m); err != nil {
					return fmt.Errorf("%q: %w", data, err)
				}
			}
			if err := each(id, m); err != nil {
				return err
			}
			id, data = "", ""
		}
	}
}

// Listen opens a stream, by GET or by subscriptions/listen, and returns a channel of its messages, which is closed at the stream's end.
func (c *MCP) Listen(ctx context.Context, filter map[string]any) (<-chan Message, error) {
	r, err := c.Request(ctx, http.MethodGet, nil)
	if c.Modern {
		r, _, err = c.Prepare(ctx, "subscriptions/listen", map[string]any{"notifications": filter})
	}
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		_ = res.Body.Close()
		return nil, fmt.Errorf("status %d", res.StatusCode)
	}
	messages := make(chan Message, 1000)
	go func() {
		defer close(messages)
		defer res.Body.Close()
		_ = Events(res.Body, func(_ string, m Message) error { // ends with ctx
			messages <- m
			return nil
		})
	}()
	return messages, nil
}
