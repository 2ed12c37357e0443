package main

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/mcpserver"
)

// fixtures are the tools, prompts and resources that the official conformance suite needs, on our transports. They exist only with
// --conformance.
type fixtures struct {
	server *mcpserver.Server
	secret []byte
}

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

// withFixtures makes a server that offers the fixtures in addition to o.
func withFixtures(o mcpserver.Options) *mcpserver.Server {
	f := &fixtures{secret: make([]byte, 32)}
	rand.Read(f.secret)
	f.contents(o.MCP)
	f.conversations(o.MCP)
	f.inputs(o.MCP)
	f.changes(o.MCP)
	f.tasks(o.MCP)
	f.prompts(o.MCP)
	for name, rule := range map[string]mcpserver.TaskRule{"slow_compute": {}, "failing_job": {Required: true}, "protocol_error_job": {},
		"confirm_delete": {},
		"multi_input":    {}, "test_tool_with_task": {Required: true, AskFirst: true}} {
		o.Tasks[name] = rule
	}
	o.Resources = fixtureResources{o.Resources}
	f.server = mcpserver.New(o)
	return f.server
}

func addTool(m *server.MCPServer, name string, do func(context.Context, callRequest) (*callResult, error), args ...mcp.ToolOption) {
	m.AddTool(mcp.NewTool(name, append([]mcp.ToolOption{mcp.WithDescription("For the conformance suite.")}, args...)...), do)
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
		"properties":{"name":{"type":"string"},"address":{"$ref":"#/$defs/address"},"contactMethod":{"type":"string","enum":["phone","email"]},"phone":{"type":"string"},"email":{"type":"string"}},
		"allOf":[{"anyOf":[{"required":["phone"]},{"required":["email"]}]}],
		"if":{"properties":{"contactMethod":{"const":"phone"}},"required":["contactMethod"]},"then":{"required":["phone"]},"else":{"required":["email"]},"additionalProperties":false}`)),
		func(context.Context, callRequest) (*callResult, error) { return says("ok"), nil })
}

// conversations adds tools that send messages to the client before they answer.
func (f *fixtures) conversations(m *server.MCPServer) {
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
	addTool(m, "test_streaming_elicitation", func(_ context.Context, r callRequest) (*callResult, error) {
		return elicit(r, "answer", "", "Please answer", object("answer", "string"),
			func(any) (*callResult, error) { return says("answered"), nil })
	})
	addTool(m, "test_missing_capability", func(ctx context.Context, _ callRequest) (*callResult, error) {
		if mcpserver.SessionFrom(ctx).GetClientCapabilities().Sampling == nil {
			return nil, &mcpserver.Error{Code: mcp.MISSING_REQUIRED_CLIENT_CAPABILITY, Message: "this tool needs a client that can sample",
				Data: map[string]any{"requiredCapabilities": map[string]any{"sampling": map[string]any{}}}}
		}
		return says("sampling is there"), nil
	})
	addTool(m, "test_sampling", func(_ context.Context, r callRequest) (*callResult, error) {
		if a := server.SamplingResponse(r.Params.InputResponses, "sample"); a != nil {
			return says("LLM response: " + textOf(a.Content)), nil
		}
		return server.NewInputRequestBuilder("").Sample("sample", sampling(r.GetString("prompt", ""), 100)).ToolResult(), nil
	}, mcp.WithString("prompt", mcp.Required()))
	asks := func(name, format string, schema func() map[string]any, args ...mcp.ToolOption) {
		addTool(m, name, func(_ context.Context, r callRequest) (*callResult, error) {
			if a := server.ElicitationResponse(r.Params.InputResponses, "ask"); a != nil {
				content, err := json.Marshal(a.Content)
				return says(fmt.Sprintf(format, a.Action, content)), err
			}
			return server.NewInputRequestBuilder("").Elicit("ask",
				mcp.ElicitationParams{Message: r.GetString("message", "Please answer"), RequestedSchema: schema()}).ToolResult(), nil
		}, args...)
	}
	asks("test_elicitation", "User response: action=%s, content=%s", func() map[string]any {
		return map[string]any{"type": "object", "required": []string{"username", "email"}, "properties": map[string]any{
			"username": map[string]any{"type": "string", "description": "User's response"},
			"email":    map[string]any{"type": "string", "description": "User's email address"}}}
	}, mcp.WithString("message", mcp.Required()))
	asks("test_elicitation_sep1034_defaults", "Elicitation completed: action=%s, content=%s", func() map[string]any {
		return map[string]any{"type": "object", "properties": map[string]any{
			"name": map[string]any{"type": "string", "default": "John Doe"}, "age": map[string]any{"type": "integer", "default": 30},
			"score": map[string]any{"type": "number", "default": 95.5}, "verified": map[string]any{"type": "boolean", "default": true},
			"status": map[string]any{"type": "string", "enum": []string{"active", "inactive", "pending"}, "default": "active"}}}
	})
	asks("test_elicitation_sep1330_enums", "Elicitation completed: action=%s, content=%s", func() map[string]any {
		titled := func(titles ...string) (list []map[string]any) {
			for i, t := range titles {
				list = append(list, map[string]any{"const": fmt.Sprintf("value%d", i+1), "title": t})
			}
			return list
		}
		options := []string{"option1", "option2", "option3"}
		return map[string]any{"type": "object", "properties": map[string]any{
			"untitledSingle": map[string]any{"type": "string", "enum": options},
			"titledSingle":   map[string]any{"type": "string", "oneOf": titled("First Option", "Second Option", "Third Option")},
			"legacyEnum": map[string]any{"type": "string", "enum": []string{"opt1", "opt2", "opt3"},
				"enumNames": []string{"Option One", "Option Two", "Option Three"}},
			"untitledMulti": map[string]any{"type": "array", "items": map[string]any{"type": "string", "enum": options}},
			"titledMulti": map[string]any{"type": "array",
				"items": map[string]any{"anyOf": titled("First Choice", "Second Choice", "Third Choice")}},
		}}
	})
}

func object(field, kind string) map[string]any {
	return map[string]any{"type": "object", "required": []string{field}, "properties": map[string]any{field: map[string]any{"type": kind}}}
}

func sampling(prompt string, tokens int) mcp.CreateMessageParams {
	return mcp.CreateMessageParams{MaxTokens: tokens, Messages: []mcp.SamplingMessage{{Role: mcp.RoleUser,
		Content: mcp.NewTextContent(prompt)}}}
}

func textOf(content any) string {
	if t, ok := content.(mcp.TextContent); ok {
		return t.Text
	}
	if m, ok := content.(map[string]any); ok {
		text, _ := m["text"].(string)
		return text
	}
	return ""
}

// elicit asks once, and continues with then when the client has answered.
func elicit(r callRequest, id, state, message string, schema map[string]any, then func(content any) (*callResult, error)) (*callResult,
	error) {
	if a := server.ElicitationResponse(r.Params.InputResponses, id); a != nil && a.Action != "" {
		return then(a.Content)
	}
	return server.NewInputRequestBuilder(state).Elicit(id, mcp.ElicitationParams{Message: message, RequestedSchema: schema}).ToolResult(),
		nil
}

func field(content any, name string) string {
	m, _ := content.(map[string]any)
	return fmt.Sprint(m[name])
}

// sign makes a state that cannot be forged.
func (f *fixtures) sign(text string) string {
	h := hmac.New(sha256.New, f.secret)
	h.Write([]byte(text))
	return text + "." + hex.EncodeToString(h.Sum(nil))
}

func (f *fixtures) check(state, text string) error {
	if !hmac.Equal([]byte(state), []byte(f.sign(text))) {
		return &mcpserver.Error{Code: mcp.INVALID_PARAMS, Message: "the request state is not ours"}
	}
	return nil
}

// inputs adds tools of multi round-trip requests (SEP-2322).
func (f *fixtures) inputs(m *server.MCPServer) {
	const prefix = "test_input_required_result_"
	addTool(m, prefix+"elicitation", func(_ context.Context, r callRequest) (*callResult, error) {
		return elicit(r, "user_name", "", "What is your name?", object("name", "string"),
			func(c any) (*callResult, error) { return says("Hello, " + field(c, "name") + "!"), nil })
	})
	addTool(m, prefix+"sampling", func(_ context.Context, r callRequest) (*callResult, error) {
		if a := server.SamplingResponse(r.Params.InputResponses, "capital_question"); a != nil {
			return says(textOf(a.Content)), nil
		}
		return server.NewInputRequestBuilder("").Sample("capital_question", sampling("What is the capital of France?", 100)).ToolResult(),
			nil
	})
	addTool(m, prefix+"list_roots", func(_ context.Context, r callRequest) (*callResult, error) {
		if a := server.RootsResponse(r.Params.InputResponses, "client_roots"); a != nil {
			return says(fmt.Sprint("Roots: ", a.Roots)), nil
		}
		return server.NewInputRequestBuilder("").Roots("client_roots").ToolResult(), nil
	})
	for _, name := range []string{"request_state", "tampered_state"} {
		addTool(m, prefix+name, func(_ context.Context, r callRequest) (*callResult, error) {
			return elicit(r, "confirm", f.sign(name), "Please confirm", object("ok", "boolean"),
				func(any) (*callResult, error) { return says("state-ok"), f.check(r.Params.RequestState, name) })
		})
	}
	addTool(m, prefix+"multiple_inputs", func(_ context.Context, r callRequest) (*callResult, error) {
		in := r.Params.InputResponses
		name, greeting, roots := server.ElicitationResponse(in, "user_name"), server.SamplingResponse(in, "greeting"),
			server.RootsResponse(in, "client_roots")
		if name != nil && greeting != nil && roots != nil {
			return says(fmt.Sprint(textOf(greeting.Content), field(name.Content, "name"), roots.Roots)),
				f.check(r.Params.RequestState, "multiple")
		}
		return server.NewInputRequestBuilder(f.sign("multiple")).Elicit("user_name",
			mcp.ElicitationParams{Message: "What is your name?", RequestedSchema: object("name", "string")}).
			Sample("greeting", sampling("Generate a greeting", 50)).Roots("client_roots").ToolResult(), nil
	})
	addTool(m, prefix+"multi_round", func(_ context.Context, r callRequest) (*callResult, error) {
		if a := server.ElicitationResponse(r.Params.InputResponses, "step2"); a != nil {
			return says("Favorite color: " + field(a.Content, "color")), f.check(r.Params.RequestState, "round2")
		}
		return elicit(r, "step1", f.sign("round1"), "Step 1: What is your name?", object("name", "string"), func(any) (*callResult, error) {
			if err := f.check(r.Params.RequestState, "round1"); err != nil {
				return nil, err
			}
			return server.NewInputRequestBuilder(f.sign("round2")).Elicit("step2",
				mcp.ElicitationParams{Message: "Step 2: What is your favorite color?",
					RequestedSchema: object("color", "string")}).ToolResult(), nil
		})
	})
	addTool(m, prefix+"capabilities", func(ctx context.Context, _ callRequest) (*callResult, error) {
		able := mcpserver.SessionFrom(ctx).GetClientCapabilities()
		b := server.NewInputRequestBuilder("")
		if able.Sampling != nil {
			b.Sample("sample", sampling("Say something", 10))
		}
		if able.Elicitation != nil {
			b.Elicit("ask", mcp.ElicitationParams{Message: "Please answer", RequestedSchema: object("answer", "string")})
		}
		return b.ToolResult(), nil
	})
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

func (f *fixtures) prompts(m *server.MCPServer) {
	add := func(name string, do func(args map[string]string) []mcp.Content, args ...string) {
		options := []mcp.PromptOption{mcp.WithPromptDescription("For the conformance suite.")}
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
	m.AddPrompt(mcp.NewPrompt("test_input_required_result_prompt", mcp.WithPromptDescription("For the conformance suite.")),
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

// fixtureResources puts the suite's resources before those of the server.
type fixtureResources struct{ mcpserver.Resources }

var fixed = []mcp.ResourceContents{
	mcp.TextResourceContents{URI: "test://static-text", MIMEType: "text/plain", Text: "This is the content of the static text resource."},
	mcp.BlobResourceContents{URI: "test://static-binary", MIMEType: "image/png", Blob: pngPixel},
	mcp.TextResourceContents{URI: "test://watched-resource", MIMEType: "text/plain", Text: "It can be watched."},
}

// List implements mcpserver.Resources.
func (f fixtureResources) List(ctx context.Context, cursor string) ([]mcp.Resource, string, error) {
	page, next, err := f.Resources.List(ctx, cursor)
	if cursor == "" {
		var first []mcp.Resource
		for _, uri := range []string{"test://static-text", "test://static-binary", "test://watched-resource"} {
			first = append(first, mcp.NewResource(uri, uri, mcp.WithResourceDescription("For the conformance suite.")))
		}
		page = append(first, page...)
	}
	return page, next, err
}

// Templates implements mcpserver.Resources.
func (f fixtureResources) Templates() []mcp.ResourceTemplate {
	return append(f.Resources.Templates(), mcp.NewResourceTemplate("test://template/{id}/data", "test",
		mcp.WithTemplateDescription("For the conformance suite.")))
}

// Read implements mcpserver.Resources.
func (f fixtureResources) Read(ctx context.Context, uri string) ([]mcp.ResourceContents, error) {
	for _, c := range fixed {
		switch r := c.(type) {
		case mcp.TextResourceContents:
			if r.URI == uri {
				return []mcp.ResourceContents{r}, nil
			}
		case mcp.BlobResourceContents:
			if r.URI == uri {
				return []mcp.ResourceContents{r}, nil
			}
		}
	}
	if id, ok := strings.CutPrefix(uri, "test://template/"); ok && strings.HasSuffix(id, "/data") {
		id = strings.TrimSuffix(id, "/data")
		body, err := json.Marshal(map[string]any{"id": id, "templateTest": true, "data": "Data for ID: " + id})
		return []mcp.ResourceContents{mcp.TextResourceContents{URI: uri, MIMEType: "application/json", Text: string(body)}}, err
	}
	return f.Resources.Read(ctx, uri)
}

// Watch implements mcpserver.Resources.
func (f fixtureResources) Watch(ctx context.Context, uri string, changed func()) error {
	if strings.HasPrefix(uri, "test://") {
		return nil
	}
	return f.Resources.Watch(ctx, uri, changed)
}
