package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/mcpserver"
)

// questions adds tools that ask the client one thing.
func (f *fixtures) questions(m *server.MCPServer) {
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
}

// schemas adds tools that ask the user by schemas of their own.
func (f *fixtures) schemas(m *server.MCPServer) {
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

// prefix begins the names of the tools of multi round-trip requests (SEP-2322).
const prefix = "test_input_required_result_"

// inputs adds tools that need one answer of their client.
func (f *fixtures) inputs(m *server.MCPServer) {
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
}

// rounds adds tools that need several answers, at once or one after the other.
func (f *fixtures) rounds(m *server.MCPServer) {
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
