// Package agent is the protocol between the host and the first process of a sandbox, and the host's end of it: the types that cross the
// pipe, their bounds, and Client. The other end is package guest. It knows processes, output, files and sockets of one machine; it does not
// know sandboxes, templates, runsc or MCP. PROTOCOL.md is the contract.
package agent
