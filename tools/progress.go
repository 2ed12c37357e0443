package tools

import (
	"context"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// progressKey carries a call's progress token; it is request-scoped data, which is what context values are for.
type progressKey struct{}

func withProgress(ctx context.Context, meta *mcp.Meta) context.Context {
	if meta == nil || meta.ProgressToken == nil {
		return ctx
	}
	return context.WithValue(ctx, progressKey{}, meta.ProgressToken)
}

// notifier is the ability of a session to write a note at once, before the answer that follows it.
type notifier interface {
	Notify(method string, params map[string]any) error
}

// progress tells a client that asked for it how a call is getting on.
type progress struct {
	token any
	to    notifier
	last  string
	count int
}

func newProgress(ctx context.Context) *progress {
	p := &progress{token: ctx.Value(progressKey{})}
	p.to, _ = server.ClientSessionFromContext(ctx).(notifier)
	return p
}

func (p *progress) wanted() bool { return p.token != nil && p.to != nil }

// tell sends a note if there is something new. A client that is gone is noticed by whoever answers it.
func (p *progress) tell(message string) {
	if !p.wanted() || message == "" || message == p.last {
		return
	}
	p.last = message
	p.count++
	_ = p.to.Notify("notifications/progress", map[string]any{"progressToken": p.token, "progress": p.count, "message": message})
}
