package tools

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// group is a group of tools, which are offered together or not at all.
type group struct {
	set   string
	tools func(*Toolbox) []tool
}

// groups are the groups of all tools.
func groups() []group {
	return []group{
		{"core", (*Toolbox).execTools}, {"core", (*Toolbox).processTools}, {"core", (*Toolbox).sandboxTools},
		{"files", (*Toolbox).fileTools}, {"files", (*Toolbox).urlTools}, {"watch", (*Toolbox).watchTools},
		{"lifecycle", (*Toolbox).lifecycleTools}, {"net", (*Toolbox).portTools}, {"templates", (*Toolbox).templateTools},
		{"observe", (*Toolbox).observeTools},
	}
}

// Toolsets are the names of the groups of tools.
func Toolsets() (sets []string) {
	for _, g := range groups() {
		if !slices.Contains(sets, g.set) {
			sets = append(sets, g.set)
		}
	}
	return sets
}

// Slow returns the names of the tools whose calls may take long, so that a client that knows tasks gets one.
func (s *Toolbox) Slow() (names []string) {
	for _, g := range groups() {
		for _, t := range g.tools(s) {
			if t.slow {
				names = append(names, t.Tool.Name)
			}
		}
	}
	return names
}

// CheckToolsets rejects unknown toolset names.
func CheckToolsets(names []string) error {
	for _, name := range names {
		if !slices.Contains(Toolsets(), name) {
			return fmt.Errorf("there is no toolset %q; there are %s", name, strings.Join(Toolsets(), ", "))
		}
	}
	return nil
}

// Register adds the offered tools to a server, and the prompts that use them. The others are in no list; a call of one is told why.
func (s *Toolbox) Register(m *server.MCPServer) {
	if !s.ReadOnly && len(s.Toolsets) == 0 { // prompts name tools of all sets
		registerPrompts(m)
	}
	hidden := map[string]bool{}
	for _, g := range groups() {
		for _, t := range g.tools(s) {
			if why := s.leftOut(g.set, t.Tool); why != "" {
				hidden[t.Tool.Name] = true
				t.Handler = func(context.Context, mcp.CallToolRequest) (*mcp.CallToolResult, error) {
					return nil, &protocolError{fmt.Sprintf("the tool %q is not offered: %s", t.Tool.Name, why)}
				}
			}
			m.AddTools(t.ServerTool)
		}
	}
	server.WithToolFilter(func(_ context.Context, list []mcp.Tool) []mcp.Tool {
		if len(list) == 1 { // for a call, mcp-go asks about its tool alone
			return list
		}
		return slices.DeleteFunc(list, func(t mcp.Tool) bool { return hidden[t.Name] })
	})(m)
}

// leftOut says why a tool is not offered, and what helps; "" if it is.
func (s *Toolbox) leftOut(set string, t mcp.Tool) string {
	switch {
	case len(s.Toolsets) > 0 && !slices.Contains(s.Toolsets, set):
		return fmt.Sprintf("it is in the toolset %q, and this server was started with --toolsets %s", set, strings.Join(s.Toolsets, ","))
	case s.ReadOnly && !*t.Annotations.ReadOnlyHint:
		return "this server was started with --read-only, and only reads"
	case t.Name == urlTool && s.FileURL == nil:
		return "over stdio the server has no URL. Read a large file in parts, by file_read with encoding base64, or serve it in the " +
			"sandbox and call port_expose; \"soulbox-mcp http\" has the tool"
	}
	return ""
}
