package mcpserver

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// ErrCancelled is the cause of a call's context when the client has cancelled it: the handler must undo what the call began.
var ErrCancelled = errors.New("cancelled by the client")

// gone is the cause of a call's context when its client is leaving: the call must return what it has, and undo nothing.
type gone struct{ text string }

// Error implements error.
func (g gone) Error() string { return g.text }

// Yield tells a handler to return what it has.
func (gone) Yield() bool { return true }

// Options configures a Server; zero values mean the documented defaults.
type Options struct {
	MCP       *server.MCPServer   // tools, prompts, and the methods it knows; required
	Resources Resources           // nil: none
	Tasks     map[string]TaskRule // tools that may run as tasks, by name
	Log       *slog.Logger        // default discards
	// Observe is called for every answered request with its tool, if it called one, and its outcome. It must not block.
	Observe func(method, tool, outcome string, took time.Duration)

	Name, Version string // what the server calls itself in answers that mcp-go does not make

	parallel int // calls of one conversation that run at once; more wait
	pending  int // calls of one conversation that run or wait; more are refused
}

// Server answers MCP requests of any number of conversations, on any transport. It is safe for concurrent use.
type Server struct {
	Options
	tasks tasks

	mu    sync.Mutex
	feeds map[*feed]subscription // all subscribers to changed lists
}

// New makes a server. It adds middleware to o.MCP that lets tools and prompts answer with an *Error.
func New(o Options) *Server {
	o.parallel, o.pending = cmp.Or(o.parallel, 64), cmp.Or(o.pending, 4096)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Observe == nil {
		o.Observe = func(string, string, string, time.Duration) {}
	}
	s := &Server{Options: o, feeds: map[*feed]subscription{}}
	s.tasks.byID = map[string]*task{}
	o.MCP.Use(keepError)
	server.WithPromptHandlerMiddleware(keepPromptError)(o.MCP)
	return s
}

// keepError remembers a tool's *Error, which the client must get unchanged: mcp-go would report it as an internal error.
func keepError(next server.ToolHandlerFunc) server.ToolHandlerFunc {
	return func(ctx context.Context, req mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		result, err := next(ctx, req)
		keep(ctx, err)
		return result, err
	}
}

// keepPromptError is keepError for prompts.
func keepPromptError(next server.PromptHandlerFunc) server.PromptHandlerFunc {
	return func(ctx context.Context, req mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
		result, err := next(ctx, req)
		keep(ctx, err)
		return result, err
	}
}

func keep(ctx context.Context, err error) {
	if session := SessionFrom(ctx); session != nil && err != nil {
		if e := asError(err); e.Code != codeInternal {
			session.failed.Store(e)
		}
	}
}

// maxHeld bounds the bytes of all requests in flight of one conversation.
const maxHeld = 64 << 20

// run answers a request in flight. If the client has cancelled it, respond is not called, since an answer is then forbidden.
func (s *Server) run(f *flight, session *Session, m message, raw []byte, respond func(any)) {
	defer f.done()
	began := time.Now()
	ctx := s.MCP.WithContext(f.ctx, session)
	// The other methods cost nothing, or must not wait for calls.
	if m.Method != methodListen && !inline[m.Method] && !strings.HasPrefix(m.Method, "tasks/") {
		select {
		case f.c.slots <- struct{}{}:
			// A cancelled call returns its slot at once, however long its handler takes to notice.
			free := sync.OnceFunc(func() { <-f.c.slots })
			defer free()
			defer context.AfterFunc(ctx, free)()
		case <-ctx.Done():
		}
	}
	var response any = failure(m.ID, &Error{Code: codeBusy, Message: "the server is ending; the call was not begun"})
	if ctx.Err() == nil {
		response = s.answer(ctx, session, m, raw)
	}
	if f.land() {
		s.Observe(m.Method, m.tool(), "cancelled", time.Since(began))
		return
	}
	s.Observe(m.Method, m.tool(), outcome(response), time.Since(began))
	if response != nil {
		respond(response)
	}
}

func outcome(response any) string {
	switch r := response.(type) {
	case mcp.JSONRPCError:
		return "refused"
	case mcp.JSONRPCResponse:
		if result, ok := toolResult(r.Result); ok && result.IsError {
			return "error"
		}
	}
	return "ok"
}

func toolResult(v any) (mcp.CallToolResult, bool) {
	switch r := v.(type) {
	case mcp.CallToolResult:
		return r, true
	case *mcp.CallToolResult:
		if r != nil {
			return *r, true
		}
	}
	return mcp.CallToolResult{}, false
}

// answer answers a request itself or lets mcp-go do it.
func (s *Server) answer(ctx context.Context, session *Session, m message, raw []byte) (response any) {
	defer s.recover(m, &response)
	if own := s.own(m); own != nil {
		if err := checkModern(m); err != nil {
			return failure(m.ID, err)
		}
		result, err := own(ctx, session, m)
		if err != nil {
			return failure(m.ID, asError(err))
		}
		if m.modern() {
			s.decorate(m.Method, result)
		}
		return mcp.NewJSONRPCResultResponse(mcp.NewRequestId(m.ID), result)
	}
	if rule, may := s.Tasks[m.tool()]; may && m.Method == string(mcp.MethodToolsCall) {
		return s.mayBecomeTask(ctx, session, m, raw, rule)
	}
	return s.dispatch(ctx, session, m, raw)
}

// recover turns a panic into a failed request, so that it does not end the server.
func (s *Server) recover(m message, response *any) {
	if r := recover(); r != nil {
		s.Log.Error("panic in a handler", "method", m.Method, "panic", r, "stack", string(debug.Stack()))
		*response = failure(m.ID, &Error{Code: codeInternal, Message: "internal error; the server's log tells more"})
	}
}

// dispatch lets mcp-go answer. The answer carries the id as the client wrote it, since mcp-go turns numbers into floats.
func (s *Server) dispatch(ctx context.Context, session *Session, m message, raw []byte) (response any) {
	defer s.recover(m, &response)
	id := mcp.NewRequestId(m.ID)
	if len(m.head.Task) > 0 {
		raw = withoutTask(raw)
	}
	switch r := s.MCP.HandleMessage(ctx, raw).(type) {
	case mcp.JSONRPCResponse:
		r.ID = id
		return r
	case mcp.JSONRPCError:
		if e := session.failed.Load(); e != nil {
			return failure(m.ID, e)
		}
		r.ID = id
		return r
	}
	return nil
}

// withoutTask removes the parameter by which clients of 2025-11-25 ask for that revision's tasks, which mcp-go offers and we do not.
func withoutTask(raw []byte) []byte {
	var request, params map[string]json.RawMessage
	if json.Unmarshal(raw, &request) != nil || json.Unmarshal(request["params"], &params) != nil {
		return raw
	}
	delete(params, "task")
	var err error
	if request["params"], err = json.Marshal(params); err != nil {
		return raw
	}
	if plain, err := json.Marshal(request); err == nil {
		return plain
	}
	return raw
}

// method answers a method that mcp-go does not know or gets wrong.
type method func(ctx context.Context, session *Session, m message) (mcp.ResultMetadata, error)

func (s *Server) own(m message) method {
	switch m.Method {
	case methodListen:
		if m.modern() {
			return s.listen
		}
	case methodSubscribe:
		if !m.modern() && s.Resources != nil {
			return s.subscribe
		}
	case methodUnsubscribe:
		if !m.modern() && s.Resources != nil {
			return s.unsubscribe
		}
	case methodTasksGet, methodTasksUpdate, methodTasksCancel:
		if m.modern() && len(s.Tasks) > 0 {
			return s.taskMethod
		}
	case string(mcp.MethodResourcesList), string(mcp.MethodResourcesTemplatesList), string(mcp.MethodResourcesRead):
		if s.Resources != nil {
			return s.resourceMethod
		}
	case string(mcp.MethodCompletionComplete):
		if s.Resources != nil && m.completesResource() {
			return s.complete
		}
	case "tasks/list", "tasks/result": // of a revision whose tasks mcp-go offers; clients must not think that we do
		return func(context.Context, *Session, message) (mcp.ResultMetadata, error) {
			return nil, &Error{Code: codeNoMethod, Message: "there is no method " + m.Method}
		}
	}
	return nil
}

// decorate adds the fields that 2026-07-28 requires in every result.
func (s *Server) decorate(method string, result mcp.ResultMetadata) {
	if result.GetResultType() == "" {
		result.SetResultType(mcp.ResultTypeComplete)
	}
	if meta := result.EnsureResultMeta(); meta.ServerInfo() == nil {
		meta.SetServerInfo(mcp.Implementation{Name: s.Name, Version: s.Version})
	}
	if c, ok := result.(mcp.CacheHintSetter); ok && (method == string(mcp.MethodResourcesList) ||
		method == string(mcp.MethodResourcesTemplatesList) || method == string(mcp.MethodResourcesRead)) {
		c.SetCacheHints(0, mcp.CacheScopePrivate)
	}
}
