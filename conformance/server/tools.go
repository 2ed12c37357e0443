package main

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/mcpserver"
)

type (
	callRequest = mcp.CallToolRequest
	callResult  = mcp.CallToolResult
)

// pngPixel and wavSilent are the smallest PNG and WAV.
const (
	pngPixel  = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg=="
	wavSilent = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAIA+AAACABAAZGF0YQAAAAA="
)

// pause is how long the suite wants a fixture to wait between two steps.
const pause = 50 * time.Millisecond

func addTool(m *server.MCPServer, name string, do func(context.Context, callRequest) (*callResult, error), args ...mcp.ToolOption) {
	m.AddTool(mcp.NewTool(name, append([]mcp.ToolOption{mcp.WithDescription(description)}, args...)...), do)
}

func says(text string) *callResult { return mcp.NewToolResultText(text) }

// contents adds tools that return each kind of content.
func (f *fixtures) contents(m *server.MCPServer) {
	fixed := func(name string, content ...mcp.Content) {
		addTool(m, name, func(context.Context, callRequest) (*callResult, error) { return &callResult{Content: content}, nil })
	}
	image := mcp.NewImageContent(pngPixel, "image/png")
	resource := func(uri, kind, text string) mcp.Content {
		return mcp.NewEmbeddedResource(mcp.TextResourceContents{URI: uri, MIMEType: kind, Text: text})
	}
	fixed("test_simple_text", mcp.NewTextContent("This is a simple text response for testing."))
	fixed("test_image_content", image)
	fixed("test_audio_content", mcp.NewAudioContent(wavSilent, "audio/wav"))
	fixed("test_embedded_resource", resource("test://embedded-resource", "text/plain", "This is an embedded resource content."))
	fixed("test_multiple_content_types", mcp.NewTextContent("Multiple content types test:"), image,
		resource("test://mixed-content-resource", "application/json", `{"test":"data","value":123}`))
	addTool(m, "test_error_handling", func(context.Context, callRequest) (*callResult, error) {
		return mcp.NewToolResultError("This tool intentionally returns an error for testing"), nil
	})
	m.AddTool(mcp.NewToolWithRawSchema("json_schema_2020_12_tool", "Tool with JSON Schema 2020-12 features", json.RawMessage(`{
		"$schema":"https://json-schema.org/draft/2020-12/schema","type":"object",
		"$defs":{"address":{"$anchor":"addressDef","type":"object","properties":{"street":{"type":"string"},"city":{"type":"string"}}}},
		"properties":{"name":{"type":"string"},"address":{"$ref":"#/$defs/address"},"contactMethod":{"type":"string","enum":["phone","email"]},
			"phone":{"type":"string"},"email":{"type":"string"}},
		"allOf":[{"anyOf":[{"required":["phone"]},{"required":["email"]}]}],
		"if":{"properties":{"contactMethod":{"const":"phone"}},"required":["contactMethod"]},
		"then":{"required":["phone"]},"else":{"required":["email"]},"additionalProperties":false}`)),
		func(context.Context, callRequest) (*callResult, error) { return says("ok"), nil })
}

// notifications adds tools that tell the client something before they answer.
func (f *fixtures) notifications(m *server.MCPServer) {
	addTool(m, "test_tool_with_logging", func(ctx context.Context, _ callRequest) (*callResult, error) {
		s := mcpserver.SessionFrom(ctx)
		for _, text := range []string{"Tool execution started", "Tool processing data", "Tool execution completed"} {
			if err := s.Log(ctx, mcp.LoggingLevelInfo, "conformance", text); err != nil {
				return nil, err
			}
			time.Sleep(pause)
		}
		return says("logged"), nil
	})
	addTool(m, "test_logging_tool", func(ctx context.Context, _ callRequest) (*callResult, error) {
		return says("logged"), mcpserver.SessionFrom(ctx).Log(ctx, mcp.LoggingLevelInfo, "conformance", "a message")
	})
	addTool(m, "test_tool_with_progress", func(ctx context.Context, r callRequest) (*callResult, error) {
		for i := 0; i <= 100; i += 50 {
			if r.Params.Meta != nil && r.Params.Meta.ProgressToken != nil {
				if err := mcpserver.SessionFrom(ctx).Notify("notifications/progress",
					map[string]any{"progressToken": r.Params.Meta.ProgressToken, "progress": i, "total": 100}); err != nil {
					return nil, err
				}
			}
			time.Sleep(pause)
		}
		return says("done"), nil
	})
	addTool(m, "test_reconnection", func(ctx context.Context, _ callRequest) (*callResult, error) {
		mcpserver.SessionFrom(ctx).Disconnect()
		time.Sleep(2 * pause)
		return says("Reconnection test completed successfully."), nil
	})
}

// headers adds a tool that has an argument which HTTP clients must also send as a header (SEP-2243).
func (f *fixtures) headers(m *server.MCPServer) {
	addTool(m, "test_header_argument", func(_ context.Context, r callRequest) (*callResult, error) {
		return says(r.GetString("region", "")), nil
	}, mcp.WithString("region", func(schema map[string]any) { schema["x-mcp-header"] = "Region" }))
}

// changes adds tools that change lists.
func (f *fixtures) changes(m *server.MCPServer) {
	addTool(m, "test_trigger_tool_change", func(context.Context, callRequest) (*callResult, error) {
		f.server.Changed(mcpserver.NoteToolsChanged, nil)
		return says("changed"), nil
	})
	addTool(m, "test_trigger_prompt_change", func(context.Context, callRequest) (*callResult, error) {
		f.server.Changed(mcpserver.NotePromptsChanged, nil)
		return says("changed"), nil
	})
}

// tasks adds tools of the tasks extension (SEP-2663).
func (f *fixtures) tasks(m *server.MCPServer) {
	addTool(m, "greet", func(_ context.Context, r callRequest) (*callResult, error) {
		return says("Hello, " + r.GetString("name", "") + "!"), nil
	}, mcp.WithString("name"))
	addTool(m, "slow_compute", func(ctx context.Context, r callRequest) (*callResult, error) {
		select {
		case <-time.After(time.Duration(r.GetFloat("seconds", 0) * float64(time.Second))):
			return says("computed " + r.GetString("label", "")), nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}, mcp.WithNumber("seconds"), mcp.WithString("label"))
	addTool(m, "failing_job", func(context.Context, callRequest) (*callResult, error) {
		time.Sleep(20 * pause)
		return mcp.NewToolResultError("the job has failed, as it always does"), nil
	})
	addTool(m, "protocol_error_job", func(context.Context, callRequest) (*callResult, error) {
		return nil, errors.New("a fault of the protocol")
	})
	addTool(m, "confirm_delete", func(_ context.Context, r callRequest) (*callResult, error) {
		return elicit(r, "confirm", "", "Delete "+r.GetString("filename", "")+"?", object("confirm", "boolean"),
			func(any) (*callResult, error) { return says("deleted"), nil })
	}, mcp.WithString("filename"))
	addTool(m, "multi_input", func(_ context.Context, r callRequest) (*callResult, error) {
		if len(r.Params.InputResponses) >= 2 {
			return says("both are there"), nil
		}
		b := server.NewInputRequestBuilder("")
		for _, id := range []string{"first", "second"} {
			b.Elicit(id, mcp.ElicitationParams{Message: "The " + id, RequestedSchema: object("name", "string")})
		}
		return b.ToolResult(), nil
	})
	addTool(m, "test_tool_with_task", func(_ context.Context, r callRequest) (*callResult, error) {
		return elicit(r, "user_name", "", "What is your name?", object("name", "string"),
			func(c any) (*callResult, error) { return says("Hello, " + field(c, "name") + "!"), nil })
	})
}
