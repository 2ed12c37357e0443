// Package agent is the protocol between the host and the first process of a sandbox, and both its ends: Client on the
// host, Server in the guest. It knows processes, output, files and sockets of one machine, the one it runs in; it does
// not know sandboxes, templates, runsc or MCP. PROTOCOL.md is the contract.
//
// Server side: every process that a user asked for is a child of the Server, in its own session and its own guest
// cgroup; its output goes to a bounded spool that can be replayed from any offset.
//
// Lock order in the Server: Server.mu, then process.mu, then spool.mu.
package agent
