package mcpserver

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
)

// TasksExtension is the extension by which a long call continues as a task (SEP-2663). Clients declare it in their capabilities.
const TasksExtension = "io.modelcontextprotocol/tasks"

const (
	methodTasksGet    = "tasks/get"
	methodTasksUpdate = "tasks/update"
	methodTasksCancel = "tasks/cancel"

	maxTasks    = 64 // unfinished tasks per owner; further calls are answered as ordinary calls
	maxFinished = 256
	taskTTL     = time.Hour // counted from its creation, and again from its end
	taskPoll    = time.Second
)

// TaskRule says when a tool's call continues as a task.
type TaskRule struct {
	After    time.Duration // a call that ends within this time is answered as an ordinary call
	Required bool          // clients without the extension are refused
	AskFirst bool          // the tool's questions to the client come before the task is made
}

// The statuses of a task.
const (
	taskWorking   = "working"
	taskInput     = "input_required"
	taskCompleted = "completed"
	taskFailed    = "failed"
	taskCancelled = "cancelled"
)

// taskInfo is a task as tools/call and tasks/get show it.
type taskInfo struct {
	mcp.Result
	TaskID        string            `json:"taskId"`
	Status        string            `json:"status"`
	Message       string            `json:"statusMessage,omitempty"`
	CreatedAt     string            `json:"createdAt"`
	UpdatedAt     string            `json:"lastUpdatedAt"`
	TTLMS         int64             `json:"ttlMs"`
	PollMS        int64             `json:"pollIntervalMs"`
	InputRequests mcp.InputRequests `json:"inputRequests,omitempty"`
	Outcome       any               `json:"result,omitempty"`
	Error         any               `json:"error,omitempty"`
}

// task is a call that continues without its client.
type task struct {
	id, owner string
	cancel    context.CancelCauseFunc
	ended     chan struct{}
	response  any // of the call, once it has ended

	expires time.Time // zero while it is unfinished; guarded by tasks.mu

	telling   sync.Mutex // held while a notification is written, and while the task is announced; taken before mu
	mu        sync.Mutex
	announced bool   // notifications no longer go to the call's stream but become the task's message
	stream    sender // of the call
	info      taskInfo
	responses map[string]json.RawMessage
	answered  chan struct{} // closed when everything it asked for is answered
}

// tasks are all tasks of a server.
type tasks struct {
	mu   sync.Mutex
	byID map[string]*task
}

// ofOwner returns the number of an owner's unfinished tasks, and the finished ones. t.mu is held.
func (t *tasks) ofOwner(owner string) (unfinished int, finished []*task) {
	for _, n := range t.byID {
		switch {
		case n.owner != owner:
		case n.expires.IsZero():
			unfinished++
		default:
			finished = append(finished, n)
		}
	}
	return unfinished, finished
}

// mayAdd reports whether an owner may have another task.
func (t *tasks) mayAdd(owner string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	unfinished, _ := t.ofOwner(owner)
	return unfinished < maxTasks
}

// add adds a task if there is room. The oldest finished tasks are dropped.
func (t *tasks) add(n *task) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.DeleteFunc(t.byID, func(_ string, old *task) bool { return old.expired() })
	unfinished, finished := t.ofOwner(n.owner)
	if unfinished >= maxTasks {
		return false
	}
	slices.SortFunc(finished, func(a, b *task) int { return a.expires.Compare(b.expires) })
	for _, old := range finished[:max(0, len(finished)-maxFinished)] {
		delete(t.byID, old.id)
	}
	t.byID[n.id] = n
	return true
}

// finished records the end of a task. From then on it is kept for taskTTL.
func (t *tasks) finished(n *task) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n.expires = time.Now().Add(taskTTL)
}

// get returns a task of an owner. A task of another owner counts as not found.
func (t *tasks) get(owner, id string) (*task, *Error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.byID[id]; n != nil && n.owner == owner && !n.expired() {
		return n, nil
	}
	return nil, &Error{Code: codeParams, Message: "there is no such task"}
}

func (n *task) expired() bool {
	return !n.expires.IsZero() && time.Now().After(n.expires)
}

// write implements sender. Until the client knows the task, notifications go to the call's stream; then the last progress becomes the
// task's message.
func (n *task) write(v any) error {
	n.telling.Lock() // a notification that is being written precedes the announcement
	defer n.telling.Unlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	if stream := n.stream; !n.announced {
		if stream == nil {
			return nil
		}
		n.mu.Unlock()
		defer n.mu.Lock()
		return stream.write(v)
	}
	if p, ok := v.(note); ok && p.ID == "" && p.Method == "notifications/progress" {
		if params, ok := p.Params.(map[string]any); ok {
			n.info.Message, _ = params["message"].(string)
			n.touch()
		}
	}
	if p, ok := v.(note); ok && p.ID != "" {
		return errNotAsked
	}
	return nil
}

// touch records the time of a change. n.mu is held.
func (n *task) touch() { n.info.UpdatedAt = stamp(time.Now()) }

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

func declaresTasks(session *Session) bool {
	_, ok := session.GetClientCapabilities().Extensions[TasksExtension]
	return ok
}

var errNoTasks = &Error{Code: codeCapability, Message: "this needs a client that declares the extension " + TasksExtension,
	Data: map[string]any{"requiredCapabilities": map[string]any{"extensions": map[string]any{TasksExtension: map[string]any{}}}}}

// mayBecomeTask answers a call of a tool that may run as a task. Clients do not ask for a task; those that declare the extension may get
// one.
func (s *Server) mayBecomeTask(ctx context.Context, session *Session, m message, raw []byte, rule TaskRule) any {
	if !m.modern() || !declaresTasks(session) {
		if rule.Required {
			return failure(m.ID, errNoTasks)
		}
		return s.dispatch(ctx, session, m, raw)
	}
	if rule.AskFirst && len(m.head.InputResponses) == 0 || !s.tasks.mayAdd(session.owner) {
		return s.dispatch(ctx, session, m, raw)
	}
	n := s.startTask(ctx, session, m, raw)
	timer := time.NewTimer(rule.After)
	defer timer.Stop()
	select {
	case <-n.ended: // it ended so soon that it need not be a task
		return n.response
	case <-ctx.Done():
		return n.abort(context.Cause(ctx))
	case <-timer.C:
	}
	if !s.tasks.add(n) { // too many tasks: it stays a long call
		select {
		case <-n.ended:
			return n.response
		case <-ctx.Done():
			return n.abort(context.Cause(ctx))
		}
	}
	result := n.announce()
	s.decorate(m.Method, &result)
	return mcp.NewJSONRPCResultResponse(mcp.NewRequestId(m.ID), &result)
}

// startTask runs a call that no longer depends on its request, and may become a task.
func (s *Server) startTask(ctx context.Context, session *Session, m message, raw []byte) *task {
	now := stamp(time.Now())
	n := &task{id: randomID(), owner: session.owner, ended: make(chan struct{}), stream: session.out, info: taskInfo{
		Status: taskWorking, CreatedAt: now, UpdatedAt: now, TTLMS: taskTTL.Milliseconds(), PollMS: taskPoll.Milliseconds()}}
	n.info.TaskID = n.id
	taskCtx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	n.cancel = cancel
	stopEnd := context.AfterFunc(session.ctx, func() { cancel(context.Cause(session.ctx)) })
	stopRevoked := session.whenRevoked(func() { cancel(errRevoked) })
	session.calls.Add(1)       // the call itself is counted, so drain has not returned
	detach := session.attach() // a session with a task is not idle
	go func() {
		defer session.calls.Done()
		defer detach()
		defer cancel(nil)
		defer stopEnd()
		defer stopRevoked()
		n.response = s.runTask(taskCtx, n, session, m, raw)
		n.setOutcome(n.response)
		s.tasks.finished(n)
		close(n.ended)
	}()
	return n
}

// abort cancels a call that has not become a task, and waits for its end.
func (n *task) abort(cause error) any {
	n.cancel(cause)
	<-n.ended
	return n.response
}

// announce returns the answer by which the client learns of the task. tasks/get reports what has happened since it was begun.
func (n *task) announce() taskInfo {
	n.telling.Lock()
	n.mu.Lock()
	n.announced = true
	result := n.info
	n.mu.Unlock()
	n.telling.Unlock()
	result.Status, result.InputRequests, result.Outcome, result.Error = taskWorking, nil, nil, nil
	result.SetResultType("task")
	return result
}

// runTask calls the tool, and calls it again with the answers to what it asks for.
func (s *Server) runTask(ctx context.Context, n *task, session *Session, m message, raw []byte) any {
	call := &Session{conversation: session.conversation, client: session.client, out: n, inTask: true}
	ctx = s.MCP.WithContext(ctx, call)
	for {
		response := s.dispatch(ctx, call, m, raw)
		r, ok := response.(mcp.JSONRPCResponse)
		if !ok {
			return response
		}
		result, ok := toolResult(r.Result)
		if !ok || !result.NeedsInput() {
			return response
		}
		responses, err := n.askFor(ctx, result.InputRequests)
		if err != nil {
			return failure(m.ID, &Error{Code: codeInternal, Message: err.Error()})
		}
		if raw, err = withInput(raw, responses, result.RequestState); err != nil {
			return failure(m.ID, asError(err))
		}
	}
}

// askFor waits until the client has answered everything.
func (n *task) askFor(ctx context.Context, requests mcp.InputRequests) (map[string]json.RawMessage, error) {
	n.mu.Lock()
	answered := make(chan struct{})
	n.answered, n.responses = answered, map[string]json.RawMessage{}
	if n.info.Status != taskCancelled {
		n.info.Status, n.info.InputRequests = taskInput, maps.Clone(requests)
		n.touch()
	}
	n.mu.Unlock()
	select {
	case <-answered:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.responses, nil
}

// withInput returns a request with the client's answers in it.
func withInput(raw []byte, responses map[string]json.RawMessage, state string) ([]byte, error) {
	var request, params map[string]json.RawMessage
	if err := json.Unmarshal(raw, &request); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(request["params"], &params); err != nil {
		return nil, err
	}
	var err error
	if params["inputResponses"], err = json.Marshal(responses); err != nil {
		return nil, err
	}
	if params["requestState"], err = json.Marshal(state); err != nil {
		return nil, err
	}
	if request["params"], err = json.Marshal(params); err != nil {
		return nil, err
	}
	return json.Marshal(request)
}

// setOutcome records the outcome. A cancelled task stays cancelled.
func (n *task) setOutcome(response any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.info.Status == taskCancelled {
		return
	}
	n.info.InputRequests = nil
	switch r := response.(type) {
	case mcp.JSONRPCResponse:
		n.info.Status, n.info.Outcome = taskCompleted, r.Result
	case mcp.JSONRPCError:
		n.info.Status, n.info.Error = taskFailed, r.Error
	default:
		n.info.Status, n.info.Error = taskFailed, Error{Code: codeInternal, Message: "the call had no answer"}
	}
	n.touch()
}

// taskMethod answers tasks/get, tasks/update and tasks/cancel.
func (s *Server) taskMethod(_ context.Context, session *Session, m message) (mcp.ResultMetadata, error) {
	if !declaresTasks(session) {
		return nil, errNoTasks
	}
	n, notFound := s.tasks.get(session.owner, m.head.TaskID)
	if notFound != nil {
		return nil, notFound
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	switch m.Method {
	case methodTasksUpdate:
		n.take(m.head.InputResponses)
	case methodTasksCancel:
		if n.info.Status == taskWorking || n.info.Status == taskInput {
			n.info.Status, n.info.InputRequests = taskCancelled, nil
			n.touch()
			n.cancel(ErrCancelled)
		}
	default:
		info := n.info
		info.Meta = nil // each answer gets its own
		info.InputRequests = maps.Clone(info.InputRequests)
		return &info, nil
	}
	return &mcp.Result{}, nil
}

// take keeps those answers that were asked for. n.mu is held.
func (n *task) take(responses map[string]json.RawMessage) {
	if n.info.Status != taskInput {
		return
	}
	for id, r := range responses {
		if _, asked := n.info.InputRequests[id]; asked {
			n.responses[id] = r
			delete(n.info.InputRequests, id)
		}
	}
	if len(n.info.InputRequests) == 0 {
		n.info.Status = taskWorking
		close(n.answered)
	}
	n.touch()
}
