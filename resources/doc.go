// Package resources is the MCP face of what can be read and watched: sandboxes, their files, the output of their processes, their logs and
// metrics, and templates. It turns URIs into calls of the domain and of the agent. It does not know how a sandbox is run, nor about
// transports.
package resources
