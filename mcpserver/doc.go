// Package mcpserver carries MCP between a client and an mcp-go server: our own stdio loop, whose answers, notes and cancellations keep
// their order (shared/MCP.md, traps 1 to 5). It knows JSON-RPC and sessions; it does not know sandboxes.
package mcpserver
