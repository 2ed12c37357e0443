package mcpserver

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// sender is where the messages of a call go.
type sender interface {
	// write writes a whole message before it returns, so that the message precedes whatever the caller writes later.
	write(v any) error
}

// Session is a client's conversation as one call sees it: what the client is and may do, and where notifications about the call go. It
// implements the session interfaces of mcp-go.
type Session struct {
	*conversation
	client *client // of the conversation; a call of 2026-07-28 has its own
	out    sender  // nil: notifications go nowhere
	inTask bool
	until  context.Context // ends when the call's credential is no longer valid; nil: never
	failed atomic.Pointer[Error]
}

// SessionFrom is the session of a call; nil if there is none.
func SessionFrom(ctx context.Context) *Session {
	s, _ := server.ClientSessionFromContext(ctx).(*Session)
	return s
}

var (
	_ server.SessionWithClientInfo      = (*Session)(nil)
	_ server.SessionWithLogging         = (*Session)(nil)
	_ server.SessionWithElicitation     = (*Session)(nil)
	_ server.SessionWithSampling        = (*Session)(nil)
	_ server.SessionWithRoots           = (*Session)(nil)
	_ server.SessionWithProtocolVersion = (*Session)(nil)
)

// client is what a client has said about itself.
type client struct {
	mu sync.Mutex
	clientState
}

type clientState struct {
	initialized  bool
	info         mcp.Implementation
	capabilities mcp.ClientCapabilities
	version      string
	level        mcp.LoggingLevel
}

// conversation is what the calls of a session share and what outlives them.
type conversation struct {
	id     string
	owner  string // the authenticated owner; "" is the user of this machine
	ctx    context.Context
	cancel context.CancelCauseFunc
	open   context.Context // ends when nothing new may begin; long-lived requests end with it
	shut   context.CancelFunc
	client client
	slots  chan struct{}
	feed   *feed
	values sync.Map // what other packages keep for the conversation
	// counted gives back what a session takes of its owner's allowance; nil for conversations that are none.
	counted func()

	calls sync.WaitGroup

	mu        sync.Mutex
	inflight  map[string]context.CancelCauseFunc
	held      int // bytes of the requests in flight
	closing   bool
	asked     int
	handle    string                             // what a later session may continue with
	questions map[string]chan message            // sent to the client and not answered yet, by id
	watched   map[string]context.CancelCauseFunc // subscriptions, by URI
	streams   []*stream                          // HTTP streams that a client may reconnect to
	attached  int                                // HTTP requests that are using the conversation
	listener  context.CancelCauseFunc            // of the HTTP request that gets the messages of no call
	used      time.Time
}

func newConversation(ctx context.Context, owner string, parallel int) *conversation {
	c := &conversation{id: randomID(), owner: owner, slots: make(chan struct{}, parallel), feed: newFeed(),
		inflight: map[string]context.CancelCauseFunc{}, used: time.Now()}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	c.open, c.shut = context.WithCancel(c.ctx)
	return c
}

// randomID cannot be guessed: it has 128 random bits.
func randomID() string {
	var random [16]byte
	rand.Read(random[:])
	return hex.EncodeToString(random[:])
}

// session returns the conversation as seen by one call.
func (c *conversation) session(m message, out sender) *Session {
	s := &Session{conversation: c, client: &c.client, out: out}
	if m.modern() {
		s.client = &client{}
		_ = json.Unmarshal(m.head.Meta.Capabilities, &s.client.capabilities) // whoever reads the request reports errors in them
	}
	return s
}

// flight is a request in flight.
type flight struct {
	c      *conversation
	ctx    context.Context // ends with the conversation, and when the client cancels the request
	cancel context.CancelCauseFunc
	key    string
	size   int
}

// begin adds a request to those in flight. The caller must call land and then done on the flight.
func (c *conversation) begin(m message, size, limit int) (*flight, *Error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, reused := c.inflight[m.key()]
	switch {
	case c.closing:
		return nil, &Error{Code: codeBusy, Message: "the conversation is over; the call was not begun"}
	case reused:
		return nil, &Error{Code: codeInvalid, Message: "a request with this id is still in flight"}
	case len(c.inflight) >= limit || c.held+size > maxHeld:
		return nil, &Error{Code: codeBusy, Message: "too many calls are in flight already; wait for some of them"}
	}
	f := &flight{c: c, key: m.key(), size: size}
	f.ctx, f.cancel = context.WithCancelCause(c.ctx)
	c.calls.Add(1)
	c.inflight[f.key] = f.cancel
	c.held += size
	return f, nil
}

// land removes the request from those that can be cancelled, and reports whether it was cancelled: then it must not be answered.
func (f *flight) land() (cancelled bool) {
	f.c.mu.Lock()
	delete(f.c.inflight, f.key)
	f.c.held -= f.size
	f.c.mu.Unlock()
	return errors.Is(context.Cause(f.ctx), ErrCancelled)
}

// done ends a request whose answer is written.
func (f *flight) done() {
	f.cancel(nil)
	f.c.calls.Done()
}

// cancelCall cancels the request that a notifications/cancelled names. An unknown request has already ended, which is no error.
func (c *conversation) cancelCall(m message) {
	var params struct {
		RequestID json.RawMessage `json:"requestId"`
	}
	if json.Unmarshal(m.Params, &params) != nil {
		return
	}
	c.mu.Lock()
	cancel := c.inflight[string(params.RequestID)]
	c.mu.Unlock()
	if cancel != nil {
		cancel(ErrCancelled)
	}
}

// close makes the conversation refuse new requests.
func (c *conversation) close() {
	c.mu.Lock()
	c.closing = true
	c.mu.Unlock()
	c.shut()
}

// drain waits for the calls in flight, then asks them to yield; new requests are refused. It reports whether all calls have ended.
func (c *conversation) drain(patience time.Duration) bool {
	c.close()
	done := make(chan struct{})
	go func() { c.calls.Wait(); close(done) }()
	for _, step := range []time.Duration{patience, yieldTime} {
		timer := time.NewTimer(step)
		select {
		case <-done:
			timer.Stop()
			c.cancel(gone{"the conversation has ended"})
			return true
		case <-timer.C:
			c.cancel(gone{"the client has gone"})
		}
	}
	return false
}

// yieldTime is how long calls may take to yield before their answers are given up.
const yieldTime = 3 * time.Second

// SessionID implements server.ClientSession.
func (s *Session) SessionID() string { return s.id }

// Owner is the authenticated owner of the conversation; "" is the user of this machine.
func (s *Session) Owner() string { return s.owner }

// InTask reports whether the call runs as a task: no client waits for its answer, so it may take its time.
func (s *Session) InTask() bool { return s.inTask }

// Value is what a package keeps for the conversation under a key of a type of its own; make makes it at first use. It lives as long as the
// conversation.
func (s *Session) Value(key any, make func() any) any {
	if v, ok := s.values.Load(key); ok {
		return v
	}
	v, _ := s.values.LoadOrStore(key, make())
	return v
}

// Initialize implements server.ClientSession.
func (s *Session) Initialize() { s.client.set(func(c *client) { c.initialized = true }) }

// Initialized implements server.ClientSession.
func (s *Session) Initialized() bool { return s.client.get().initialized }

// NotificationChannel implements server.ClientSession. Only mcp-go uses it, for clients registered with mcp-go, which ours are not.
func (s *Session) NotificationChannel() chan<- mcp.JSONRPCNotification { return nil }

func (c *client) get() clientState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.clientState
}

func (c *client) set(change func(*client)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c)
}

// GetClientInfo implements server.SessionWithClientInfo.
func (s *Session) GetClientInfo() mcp.Implementation { return s.client.get().info }

// SetClientInfo implements server.SessionWithClientInfo.
func (s *Session) SetClientInfo(info mcp.Implementation) {
	s.client.set(func(c *client) { c.info = info })
}

// GetClientCapabilities implements server.SessionWithClientInfo.
func (s *Session) GetClientCapabilities() mcp.ClientCapabilities { return s.client.get().capabilities }

// SetClientCapabilities implements server.SessionWithClientInfo.
func (s *Session) SetClientCapabilities(capabilities mcp.ClientCapabilities) {
	s.client.set(func(c *client) { c.capabilities = capabilities })
}

// ProtocolVersion implements server.SessionWithProtocolVersion.
func (s *Session) ProtocolVersion() string { return s.client.get().version }

// SetProtocolVersion is called by mcp-go with the version that initialize has agreed on.
func (s *Session) SetProtocolVersion(version string) {
	s.client.set(func(c *client) { c.version = version })
}

// SetLogLevel implements server.SessionWithLogging.
func (s *Session) SetLogLevel(level mcp.LoggingLevel) {
	s.client.set(func(c *client) { c.level = level })
}

// GetLogLevel implements server.SessionWithLogging.
func (s *Session) GetLogLevel() mcp.LoggingLevel { return s.client.get().level }

// Notify writes a notification about the current call before it returns, so that it precedes the call's answer.
func (s *Session) Notify(method string, params map[string]any) error {
	if s.out == nil {
		return nil
	}
	return s.out.write(newNote(method, params))
}

// errRevoked ends what a key has begun when the key is no longer valid. What runs in a sandbox belongs to the owner and continues.
var errRevoked = gone{"the key is no longer valid"}

// whenRevoked calls do once the call's credential is no longer valid, unless stop is called before.
func (s *Session) whenRevoked(do func()) (stop func() bool) {
	if s.until == nil {
		return func() bool { return true }
	}
	return context.AfterFunc(s.until, do)
}

// levels are the levels of MCP's log messages, least serious first.
var levels = []mcp.LoggingLevel{mcp.LoggingLevelDebug, mcp.LoggingLevelInfo, mcp.LoggingLevelNotice, mcp.LoggingLevelWarning,
	mcp.LoggingLevelError, mcp.LoggingLevelCritical, mcp.LoggingLevelAlert, mcp.LoggingLevelEmergency}

// Log sends the client a log message about the current call if the client wants messages of this level. The default is info and above.
// Nothing is sent before the handshake, nor in 2026-07-28 unless the request itself names a level.
func (s *Session) Log(ctx context.Context, level mcp.LoggingLevel, logger string, data any) error {
	least := s.GetLogLevel()
	if info := server.RequestProtocolInfoFromContext(ctx); info != nil && info.Modern {
		if least = info.LogLevel; least == "" {
			return nil
		}
	} else if !s.Initialized() {
		return nil
	} else if least == "" {
		least = mcp.LoggingLevelInfo
	}
	if slices.Index(levels, level) < slices.Index(levels, least) {
		return nil
	}
	return s.Notify("notifications/message", map[string]any{"level": level, "logger": logger, "data": data})
}

// askTime is how long the user of a client may take to answer.
const askTime = 10 * time.Minute

// errNotAsked is the error of a call that cannot reach its client.
var errNotAsked = errors.New("the client cannot be asked here")

// ask sends a question to the client on the stream of the current call and waits for the answer.
func (s *Session) ask(ctx context.Context, method string, params, answer any) error {
	if st, http := s.out.(*stream); s.out == nil || http && !st.events {
		return errNotAsked
	}
	reply := make(chan message, 1)
	s.mu.Lock()
	s.asked++
	id := fmt.Sprintf("soulbox-%d", s.asked)
	if s.questions == nil {
		s.questions = map[string]chan message{}
	}
	s.questions[id] = reply
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.questions, id)
		s.mu.Unlock()
	}()
	q := newNote(method, params)
	q.ID = id
	if err := s.out.write(q); err != nil {
		return err
	}
	timer := time.NewTimer(askTime)
	defer timer.Stop()
	select {
	case <-timer.C:
		return errors.New("the client has not answered")
	case m := <-reply:
		if m.Error != nil {
			return fmt.Errorf("the client answered: %s", m.Error.Message)
		}
		if err := json.Unmarshal(m.Result, answer); err != nil {
			return fmt.Errorf("the client's answer: %w", err)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// answered accepts a client's answer to a question. An answer that is not waited for is dropped.
func (c *conversation) answered(m message) {
	var id string
	if json.Unmarshal(m.ID, &id) != nil {
		return
	}
	c.mu.Lock()
	reply := c.questions[id]
	delete(c.questions, id)
	c.mu.Unlock()
	if reply != nil {
		reply <- m
	}
}

// RequestElicitation implements server.SessionWithElicitation.
func (s *Session) RequestElicitation(ctx context.Context, req mcp.ElicitationRequest) (*mcp.ElicitationResult, error) {
	var answer mcp.ElicitationResult
	return &answer, s.ask(ctx, string(mcp.MethodElicitationCreate), req.Params, &answer)
}

// RequestSampling implements server.SessionWithSampling.
func (s *Session) RequestSampling(ctx context.Context, req mcp.CreateMessageRequest) (*mcp.CreateMessageResult, error) {
	var answer mcp.CreateMessageResult
	return &answer, s.ask(ctx, string(mcp.MethodSamplingCreateMessage), req.CreateMessageParams, &answer)
}

// ListRoots implements server.SessionWithRoots.
func (s *Session) ListRoots(ctx context.Context, _ mcp.ListRootsRequest) (*mcp.ListRootsResult, error) {
	var answer mcp.ListRootsResult
	return &answer, s.ask(ctx, string(mcp.MethodListRoots), nil, &answer)
}
