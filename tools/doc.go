// Package tools implements the MCP tools: one file per noun, each tool a typed input, a typed output and a method that translates to the
// domain and back. It knows MCP's tools and how models use them; what a sandbox is, package sandbox knows.
package tools
