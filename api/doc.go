// Package api is the HTTP face of the domain: Control serves E2B's REST API and the paths below /v1; Gateway serves the ports of sandboxes,
// by host name or by headers. It translates HTTP into calls of the domain. It knows nothing of how a sandbox runs, nor of MCP.
package api
