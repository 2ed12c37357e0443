// Package api is the HTTP face of the domain: Control serves E2B's REST API and what is below /v1, Gateway the ports of sandboxes, by host
// name or by headers. It translates HTTP into calls of the domain; it does not know how a sandbox is run, nor MCP.
package api
