// Command server is what the official conformance suite is run against: the engine and the HTTP transport of soulbox-mcp (package
// mcpserver) with the tools, prompts and resources that the suite asks for. It is not shipped; 'make conformance' builds and starts it.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/mcpserver"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := serve(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "conformance server:", err)
		os.Exit(1)
	}
}

// serve serves on a free port of loopback until ctx ends. It prints its URL once it listens.
func serve(ctx context.Context) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	endpoint := newServer().HTTP(mcpserver.HTTPOptions{})
	mux := http.NewServeMux()
	mux.Handle("/mcp", endpoint)
	web := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan error, 1)
	go func() { ended <- web.Serve(listener) }()
	if _, err := fmt.Printf("http://%s/mcp\n", listener.Addr()); err != nil {
		return errors.Join(err, web.Close())
	}
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	endpoint.Close(0)
	return web.Close()
}

// fixtures are the tools, prompts and resources that the suite asks for.
type fixtures struct {
	server *mcpserver.Server
	secret []byte
}

// newServer makes a server that offers the fixtures.
func newServer() *mcpserver.Server {
	m := server.NewMCPServer("soulbox-conformance", "1", server.WithToolCapabilities(true), server.WithResourceCapabilities(true, true),
		server.WithPromptCapabilities(true), server.WithLogging(), server.WithCompletions(),
		server.WithExtensions(map[string]any{mcpserver.TasksExtension: map[string]any{}}))
	f := &fixtures{secret: make([]byte, 32)}
	rand.Read(f.secret)
	f.contents(m)
	f.notifications(m)
	f.headers(m)
	f.changes(m)
	f.questions(m)
	f.schemas(m)
	f.inputs(m)
	f.rounds(m)
	f.tasks(m)
	f.prompts(m)
	f.server = mcpserver.New(mcpserver.Options{MCP: m, Name: "soulbox-conformance", Version: "1", Resources: resources{},
		Tasks: map[string]mcpserver.TaskRule{"slow_compute": {}, "failing_job": {Required: true}, "protocol_error_job": {},
			"confirm_delete": {}, "multi_input": {}, "test_tool_with_task": {Required: true, AskFirst: true}}})
	return f.server
}

// description is that of every tool, prompt and resource.
const description = "For the conformance suite."
