package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/mark3labs/mcp-go/mcp"

	"soulbox.dev/soulbox/mcpserver"
)

// resources implements mcpserver.Resources. None of them ever changes.
type resources struct{}

const (
	staticText   = "test://static-text"
	staticBinary = "test://static-binary"
	watched      = "test://watched-resource"
)

// List implements mcpserver.Resources.
func (resources) List(context.Context, string) (page []mcp.Resource, next string, err error) {
	for _, uri := range []string{staticText, staticBinary, watched} {
		page = append(page, mcp.NewResource(uri, uri, mcp.WithResourceDescription(description)))
	}
	return page, "", nil
}

// Templates implements mcpserver.Resources.
func (resources) Templates() []mcp.ResourceTemplate {
	return []mcp.ResourceTemplate{mcp.NewResourceTemplate("test://template/{id}/data", "test", mcp.WithTemplateDescription(description))}
}

// Read implements mcpserver.Resources.
func (resources) Read(_ context.Context, uri string) ([]mcp.ResourceContents, error) {
	text := func(kind, body string) ([]mcp.ResourceContents, error) {
		return []mcp.ResourceContents{mcp.TextResourceContents{URI: uri, MIMEType: kind, Text: body}}, nil
	}
	switch uri {
	case staticText:
		return text("text/plain", "This is the content of the static text resource.")
	case staticBinary:
		return []mcp.ResourceContents{mcp.BlobResourceContents{URI: uri, MIMEType: "image/png", Blob: pngPixel}}, nil
	case watched:
		return text("text/plain", "It can be watched.")
	}
	id, isTemplate := strings.CutPrefix(uri, "test://template/")
	id, isData := strings.CutSuffix(id, "/data")
	if !isTemplate || !isData {
		return nil, fmt.Errorf("%s: %w", uri, mcpserver.ErrNoResource)
	}
	body, err := json.Marshal(map[string]any{"id": id, "templateTest": true, "data": "Data for ID: " + id})
	if err != nil {
		return nil, err
	}
	return text("application/json", string(body))
}

// Watch implements mcpserver.Resources.
func (resources) Watch(context.Context, string, func()) error { return nil }

// Complete implements mcpserver.Resources.
func (resources) Complete(context.Context, string, string, string, map[string]string) ([]string, error) {
	return nil, nil
}
