// Package mcpserver carries MCP between clients and an mcp-go server, in both eras of the protocol: the revisions with sessions (2024-11-05
// to 2025-11-25) and the stateless one (2026-07-28). Server is the engine: it answers one request of one conversation. mcp-go answers what
// it knows; what it gets wrong is answered here (docs/protocol.md has the list). Stdio and HTTP are the transports; Bridge connects a stdio
// client to an HTTP server. The package knows JSON-RPC, sessions, streams and owners; it does not know sandboxes.
//
// Lock order: stream.mu, conversation.mu; HTTP.mu, conversation.mu; Server.mu, feed.mu.
package mcpserver
