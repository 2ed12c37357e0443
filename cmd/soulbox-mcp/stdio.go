package main

import (
	"context"
	"errors"
	"io"

	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/mcpserver"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/tools"
)

// runStdio serves one client until it closes stdin or a signal comes; its sandboxes end with it.
func runStdio(ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer) (err error) {
	c, err := parseConfig("stdio", args, getenv, stderr)
	if err != nil {
		return err
	}
	log, closeLog, err := c.openLog(stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeLog()) }()
	manager, err := c.newManager(log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, manager.Close()) }()
	log.Info("serving", "version", version, "state_dir", c.stateDir, "runsc", c.runsc)
	return mcpserver.Stdio{Server: newServer(manager), Log: log}.Serve(ctx, stdin, stdout)
}

// newServer is the MCP server with everything it offers.
func newServer(manager *sandbox.Manager) *server.MCPServer {
	m := server.NewMCPServer("soulbox", version, server.WithToolCapabilities(false), server.WithInstructions(tools.Instructions), server.WithTitle("SoulBox"))
	tools.New(manager).Register(m)
	return m
}
