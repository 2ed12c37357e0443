package main

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"

	mcpgo "github.com/mark3labs/mcp-go/client"
	"github.com/mark3labs/mcp-go/client/transport"
	"github.com/mark3labs/mcp-go/mcp"
	gosdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestGoSDK: the official Go SDK's client works over both transports, with progress and subscriptions.
func TestGoSDK(t *testing.T) {
	w := serve(t, "")
	stdio := exec.Command(sandboxtest.Program(t, "soulbox-mcp"), "stdio", "--state-dir="+sandboxtest.Dir(t), "--log-level=error")
	stdio.Env = []string{sandboxtest.RuntimeEnv(), "PATH=/usr/bin:/bin"}
	for name, over := range map[string]gosdk.Transport{"http": &gosdk.StreamableClientTransport{Endpoint: w.url},
		"stdio": &gosdk.CommandTransport{Command: stdio}} {
		t.Run(name, func(t *testing.T) {
			progress, updated := make(chan string, 100), make(chan string, 100)
			c := gosdk.NewClient(&gosdk.Implementation{Name: "go-sdk", Version: "1"}, &gosdk.ClientOptions{
				ProgressNotificationHandler: func(_ context.Context,
					r *gosdk.ProgressNotificationClientRequest) {
					progress <- r.Params.Message
				},
				ResourceUpdatedHandler: func(_ context.Context, r *gosdk.ResourceUpdatedNotificationRequest) { updated <- r.Params.URI },
			})
			session, err := c.Connect(t.Context(), over, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer session.Close()
			params := &gosdk.CallToolParams{Name: "exec", Arguments: map[string]any{"command": "echo one; sleep 1; echo two"}}
			params.SetProgressToken("p")
			result, err := session.CallTool(t.Context(), params)
			if err != nil || result.IsError {
				t.Fatal(err, result)
			}
			structured, _ := result.StructuredContent.(map[string]any)
			if structured["output"] != "one\ntwo\n" {
				t.Fatalf("%+v", structured)
			}
			if p := <-progress; !strings.Contains(p, "one") {
				t.Error(p)
			}
			uri := "sandbox://" + structured["sandbox_id"].(string)
			if err := session.Subscribe(t.Context(), &gosdk.SubscribeParams{URI: uri}); err != nil {
				t.Fatal(err)
			}
			for told := false; !told; { // in 2026-07-28 Subscribe returns before the server has acknowledged it
				if _, err := session.CallTool(t.Context(),
					&gosdk.CallToolParams{Name: "sandbox_update", Arguments: map[string]any{"extend_ms": 1000}}); err != nil {
					t.Fatal(err)
				}
				select {
				case u := <-updated:
					if told = true; u != uri {
						t.Error(u)
					}
				case <-time.After(100 * time.Millisecond):
				}
			}
			read, err := session.ReadResource(t.Context(), &gosdk.ReadResourceParams{URI: uri})
			if err != nil || !strings.Contains(read.Contents[0].Text, "running") {
				t.Fatal(err, read)
			}
		})
	}
}

// TestMCPGoClient: mcp-go's client works over HTTP (the demo shows it over stdio).
func TestMCPGoClient(t *testing.T) {
	w := serve(t, "")
	over, err := transport.NewStreamableHTTP(w.url)
	if err != nil {
		t.Fatal(err)
	}
	c := mcpgo.NewClient(over)
	defer c.Close()
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	var hello mcp.InitializeRequest
	hello.Params.ProtocolVersion, hello.Params.ClientInfo = mcp.LATEST_LEGACY_PROTOCOL_VERSION,
		mcp.Implementation{Name: "mcp-go", Version: "1"}
	if _, err := c.Initialize(t.Context(), hello); err != nil {
		t.Fatal(err)
	}
	var call mcp.CallToolRequest
	call.Params.Name, call.Params.Arguments = "exec", map[string]any{"command": "echo hi"}
	result, err := c.CallTool(t.Context(), call)
	if err != nil || result.IsError {
		t.Fatal(err, result)
	}
	if text, ok := result.Content[0].(mcp.TextContent); !ok || !strings.HasPrefix(text.Text, "hi\n") {
		t.Fatalf("%+v", result)
	}
}
