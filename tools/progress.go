package tools

import (
	"context"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// requestKey carries a call's parameters besides its arguments. They are request-scoped data, which is what context values are for.
type requestKey struct{}

func withRequest(ctx context.Context, params *mcp.CallToolParams) context.Context {
	return context.WithValue(ctx, requestKey{}, params)
}

func request(ctx context.Context) *mcp.CallToolParams {
	if params, ok := ctx.Value(requestKey{}).(*mcp.CallToolParams); ok {
		return params
	}
	return &mcp.CallToolParams{}
}

// inTask reports whether a call runs as a task, which means that no client waits for its answer.
func inTask(ctx context.Context) bool {
	s, ok := server.ClientSessionFromContext(ctx).(interface{ InTask() bool })
	return ok && s.InTask()
}

// logTo tells a client that listens what a call has done besides its result. It ignores a client that is gone: whoever sends the answer
// notices that.
func logTo(ctx context.Context, text string) {
	if s, ok := server.ClientSessionFromContext(ctx).(interface {
		Log(ctx context.Context, level mcp.LoggingLevel, logger string, data any) error
	}); ok {
		_ = s.Log(ctx, mcp.LoggingLevelInfo, "soulbox", text)
	}
}

// notifier is a session that can send a notification at once, before the answer that follows it.
type notifier interface {
	Notify(method string, params map[string]any) error
}

// progress reports how a call is getting on, to clients that asked for it.
type progress struct {
	token  any
	always bool // a task's message, which needs no token
	to     notifier
	last   string
	count  int
}

func newProgress(ctx context.Context) *progress {
	p := &progress{always: inTask(ctx)}
	if meta := request(ctx).Meta; meta != nil {
		p.token = meta.ProgressToken
	}
	p.to, _ = server.ClientSessionFromContext(ctx).(notifier)
	return p
}

func (p *progress) wanted() bool { return (p.token != nil || p.always) && p.to != nil }

// tell sends a notification if there is something new. It ignores a client that is gone: whoever sends the answer notices that.
func (p *progress) tell(message string) {
	if !p.wanted() || message == "" || message == p.last {
		return
	}
	p.last = message
	p.count++
	params := map[string]any{"progress": p.count, "message": message}
	if p.token != nil {
		params["progressToken"] = p.token
	}
	_ = p.to.Notify("notifications/progress", params)
}
