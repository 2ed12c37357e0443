package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/mcpserver"
)

// benchHTTP compares the HTTP transport with that of bare mcp-go, and times commands through it.
func benchHTTP(b *testing.B, t *table) {
	echo := func() *server.MCPServer {
		m := server.NewMCPServer("echo", "1")
		m.AddTool(mcp.NewTool("echo", mcp.WithString("text")), func(_ context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
			return mcp.NewToolResultText(r.GetString("text", "")), nil
		})
		return m
	}
	ours := mcpserver.New(mcpserver.Options{MCP: echo()}).HTTP(mcpserver.HTTPOptions{Allowances: &access.Allowances{Rate: 1e9}})
	defer ours.Close(0)
	for _, modern := range []bool{false, true} {
		era := map[bool]string{false: "2025-11-25", true: "2026-07-28"}[modern]
		var times [2][]time.Duration
		var clients [2]*sandboxtest.MCP
		for i, h := range []http.Handler{ours, server.NewStreamableHTTPServer(echo())} {
			s := httptest.NewServer(h)
			defer s.Close()
			defer s.CloseClientConnections()
			clients[i] = (&sandboxtest.MCP{URL: s.URL, Modern: modern}).Open(b)
		}
		for range 2000 { // in turn, so that both see the same load of the machine
			for i, c := range clients {
				begin := time.Now()
				a, err := c.Call(b.Context(), "echo", map[string]any{"text": "hi"})
				if err != nil || a.Text() != "hi" {
					b.Fatal(err, a)
				}
				times[i] = append(times[i], time.Since(begin))
			}
		}
		for i, name := range []string{"echo over HTTP, " + era, "the same by bare mcp-go"} {
			slices.Sort(times[i])
			*t = append(*t, row{what: name, p50: times[i][1000], p99: times[i][1980]})
		}
		t.say("echo over HTTP compared with bare mcp-go, "+era,
			fmt.Sprintf("%.2f times, wanted at most 1.5", times[0][1000].Seconds()/times[1][1000].Seconds()))
	}
	w := serve(b, "", "--rate=1e6")
	for _, modern := range []bool{false, true} {
		c := w.client("", modern)
		t.measure(b, "exec /bin/true by MCP HTTP, "+map[bool]string{false: "2025-11-25", true: "2026-07-28"}[modern], 300, func() {
			a, err := c.Call(b.Context(), "exec", map[string]any{"command": "/bin/true"})
			must(b, a, err)
		})
	}
	const sessions = 2000
	before := rssOf(b, w.cmd.Process.Pid)
	for range sessions {
		w.client("", false)
	}
	t.say(fmt.Sprintf("memory of an idle session, %d at once", sessions),
		fmt.Sprintf("%.1f KB, wanted under 100", float64(rssOf(b, w.cmd.Process.Pid)-before)/1024/sessions))
	w.stop()
}
