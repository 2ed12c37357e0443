package mcpserver

import (
	"context"
	"encoding/json"
	"errors"

	"github.com/mark3labs/mcp-go/mcp"
)

// Resources is what the client whose session is in a call's context can read and watch. An error that is ErrNoResource means that the
// resource does not exist for this client.
type Resources interface {
	// List returns a page of resources, and the cursor of the next page if there is one.
	List(ctx context.Context, cursor string) (page []mcp.Resource, next string, err error)
	Templates() []mcp.ResourceTemplate
	Read(ctx context.Context, uri string) ([]mcp.ResourceContents, error)
	// Watch calls changed, from any goroutine, after every change until ctx ends. When it returns, no later change is missed.
	Watch(ctx context.Context, uri string, changed func()) error
	// Complete completes a variable of a template, given the variables that are already known.
	Complete(ctx context.Context, template, variable, value string, known map[string]string) ([]string, error)
}

// ErrNoResource is the error for a URI that names nothing.
var ErrNoResource = errors.New("resource not found")

// noResource gives ErrNoResource the error code of the client's revision.
func noResource(err error, uri string, m message) error {
	if !errors.Is(err, ErrNoResource) {
		return err
	}
	code := codeNoResource
	if m.modern() {
		code = codeParams
	}
	return &Error{Code: code, Message: err.Error(), Data: map[string]string{"uri": uri}}
}

// resourceMethod answers resources/list, resources/templates/list and resources/read.
func (s *Server) resourceMethod(ctx context.Context, _ *Session, m message) (mcp.ResultMetadata, error) {
	switch m.Method {
	case string(mcp.MethodResourcesRead):
		contents, err := s.Resources.Read(ctx, m.head.URI)
		if err != nil {
			return nil, noResource(err, m.head.URI, m)
		}
		return &mcp.ReadResourceResult{Contents: contents}, nil
	case string(mcp.MethodResourcesTemplatesList):
		return &mcp.ListResourceTemplatesResult{ResourceTemplates: s.Resources.Templates()}, nil
	}
	var params struct {
		Cursor string `json:"cursor"`
	}
	if len(m.Params) > 0 && json.Unmarshal(m.Params, &params) != nil {
		return nil, &Error{Code: codeParams, Message: "the cursor is not a string"}
	}
	page, next, err := s.Resources.List(ctx, params.Cursor)
	if err != nil {
		return nil, err
	}
	result := &mcp.ListResourcesResult{Resources: page}
	if page == nil {
		result.Resources = []mcp.Resource{}
	}
	result.NextCursor = mcp.Cursor(next)
	return result, nil
}

// maxCompletions is the maximum that the protocol allows.
const maxCompletions = 100

// complete answers completion/complete of a resource template.
func (s *Server) complete(ctx context.Context, _ *Session, m message) (mcp.ResultMetadata, error) {
	var params struct {
		Ref struct {
			URI string `json:"uri"`
		} `json:"ref"`
		Argument struct {
			Name  string `json:"name"`
			Value string `json:"value"`
		} `json:"argument"`
		Context struct {
			Arguments map[string]string `json:"arguments"`
		} `json:"context"`
	}
	if err := json.Unmarshal(m.Params, &params); err != nil {
		return nil, &Error{Code: codeParams, Message: "the parameters of completion/complete are invalid"}
	}
	values, err := s.Resources.Complete(ctx, params.Ref.URI, params.Argument.Name, params.Argument.Value, params.Context.Arguments)
	if err != nil {
		return nil, err
	}
	result := &mcp.CompleteResult{}
	result.Completion.Total = len(values)
	result.Completion.HasMore = len(values) > maxCompletions
	result.Completion.Values = append([]string{}, values[:min(len(values), maxCompletions)]...)
	return result, nil
}
