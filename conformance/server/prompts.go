package main

import (
	"context"
	"fmt"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// prompts adds the prompts.
func (f *fixtures) prompts(m *server.MCPServer) {
	add := func(name string, do func(args map[string]string) []mcp.Content, args ...string) {
		options := []mcp.PromptOption{mcp.WithPromptDescription(description)}
		for _, a := range args {
			options = append(options, mcp.WithArgument(a, mcp.RequiredArgument()))
		}
		m.AddPrompt(mcp.NewPrompt(name, options...), func(_ context.Context, r mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
			result := &mcp.GetPromptResult{}
			for _, c := range do(r.Params.Arguments) {
				result.Messages = append(result.Messages, mcp.NewPromptMessage(mcp.RoleUser, c))
			}
			return result, nil
		})
	}
	text := func(s string) mcp.Content { return mcp.NewTextContent(s) }
	add("test_simple_prompt", func(map[string]string) []mcp.Content {
		return []mcp.Content{text("This is a simple prompt for testing.")}
	})
	add("test_prompt_with_arguments", func(a map[string]string) []mcp.Content {
		return []mcp.Content{text(fmt.Sprintf("Prompt with arguments: arg1='%s', arg2='%s'", a["arg1"], a["arg2"]))}
	}, "arg1", "arg2")
	add("test_prompt_with_embedded_resource", func(a map[string]string) []mcp.Content {
		return []mcp.Content{mcp.NewEmbeddedResource(mcp.TextResourceContents{URI: a["resourceUri"], MIMEType: "text/plain",
			Text: "Embedded resource content for testing."}),
			text("Please process the embedded resource above.")}
	}, "resourceUri")
	add("test_prompt_with_image", func(map[string]string) []mcp.Content {
		return []mcp.Content{mcp.NewImageContent(pngPixel, "image/png"), text("Please analyze the image above.")}
	})
	m.AddPrompt(mcp.NewPrompt("test_input_required_result_prompt", mcp.WithPromptDescription(description)),
		func(_ context.Context, r mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
			if a := server.ElicitationResponse(r.Params.InputResponses, "user_context"); a != nil {
				return &mcp.GetPromptResult{Messages: []mcp.PromptMessage{mcp.NewPromptMessage(mcp.RoleUser,
					text("Context: "+field(a.Content, "context")))}}, nil
			}
			return server.NewInputRequestBuilder("").Elicit("user_context",
				mcp.ElicitationParams{Message: "What context should the prompt use?",
					RequestedSchema: object("context", "string")}).PromptResult(), nil
		})
}
