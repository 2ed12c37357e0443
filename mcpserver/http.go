package mcpserver

import (
	"cmp"
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mark3labs/mcp-go/mcp"

	"soulbox.dev/soulbox/access"
)

// HTTPOptions configures the HTTP transport; zero values mean the documented defaults.
type HTTPOptions struct {
	Admission   Admission
	SessionIdle time.Duration // after which an unused session ends; default 30 min
	// Allowances bound what the requests of each owner take; the default has allowances of its own, with their defaults.
	Allowances *access.Allowances

	beat time.Duration // between two keep-alives on a stream
}

// HTTP is one endpoint for all revisions of MCP: those with sessions (2024-11-05 to 2025-11-25) and the stateless one (2026-07-28). Each
// request says which revision it uses. HTTP is an http.Handler.
type HTTP struct {
	HTTPOptions
	s          *Server
	ctx        context.Context
	cancel     context.CancelCauseFunc
	background sync.WaitGroup

	mu       sync.Mutex
	closing  bool
	sessions map[string]*conversation  // by id
	clients  map[program]*conversation // of stateless requests
	owners   map[string]*holding
}

// holding is what the endpoint itself holds for an owner.
type holding struct {
	programs int          // stateless clients
	kept     atomic.Int64 // bytes of answers kept for clients that reconnect
}

// holding returns what is held for an owner. h.mu is held.
func (h *HTTP) holding(owner string) *holding {
	own := h.owners[owner]
	if own == nil {
		own = &holding{}
		h.owners[owner] = own
	}
	return own
}

// program identifies a client of stateless requests: its owner and its name.
type program struct{ owner, name string }

const (
	maxBody     = maxMessage
	maxPrograms = 100     // stateless clients of one owner that are told apart by name; all others count as one
	maxOwnKept  = 8 << 20 // bytes kept for one owner
)

// HTTP makes the HTTP transport. The caller must call Close.
func (s *Server) HTTP(o HTTPOptions) *HTTP {
	o.SessionIdle, o.beat = cmp.Or(o.SessionIdle, 30*time.Minute), cmp.Or(o.beat, 15*time.Second)
	if o.Allowances == nil {
		o.Allowances = &access.Allowances{}
	}
	h := &HTTP{HTTPOptions: o, s: s, sessions: map[string]*conversation{}, clients: map[program]*conversation{},
		owners: map[string]*holding{}}
	h.ctx, h.cancel = context.WithCancelCause(context.Background())
	h.background.Go(h.expire)
	return h
}

// Close lets calls in flight run for patience, asks those that last longer to yield, and ends all sessions.
func (h *HTTP) Close(patience time.Duration) {
	h.mu.Lock()
	h.closing = true
	all := h.conversations()
	h.mu.Unlock()
	var drains sync.WaitGroup
	for _, c := range all {
		drains.Go(func() {
			if !c.drain(patience) {
				h.s.Log.Warn("calls did not end in time; their answers are lost")
			}
		})
	}
	drains.Wait()
	h.cancel(gone{"the server is ending"})
	h.background.Wait()
}

// conversations returns all conversations. h.mu is held.
func (h *HTTP) conversations() []*conversation {
	all := make([]*conversation, 0, len(h.sessions)+len(h.clients))
	for _, c := range h.sessions {
		all = append(all, c)
	}
	for _, c := range h.clients {
		all = append(all, c)
	}
	return all
}

// Sessions counts the sessions, including those of stateless clients.
func (h *HTTP) Sessions() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.sessions) + len(h.clients)
}

// expire ends unused sessions.
func (h *HTTP) expire() {
	ticker := time.NewTicker(max(min(h.SessionIdle/4, time.Minute), time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-h.ctx.Done():
			return
		case <-ticker.C:
			h.mu.Lock()
			all := h.conversations()
			h.mu.Unlock()
			for _, c := range all {
				c.forgetStreams(keptTime)
				if c.idleFor() > h.SessionIdle {
					h.end(c)
				}
			}
		}
	}
}

// idleFor is how long the conversation has been unused.
func (c *conversation) idleFor() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.attached > 0 || len(c.inflight) > 0 {
		return 0
	}
	return time.Since(c.used)
}

// attach counts an HTTP request that uses the conversation. The caller must call detach.
func (c *conversation) attach() (detach func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.attached++
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.attached--
		c.used = time.Now()
	}
}

// end ends a session: its calls yield, its streams end.
func (h *HTTP) end(c *conversation) {
	h.mu.Lock()
	if h.sessions[c.id] == c {
		delete(h.sessions, c.id)
		c.counted()
	}
	for key, other := range h.clients {
		if other == c {
			delete(h.clients, key)
			h.owners[c.owner].programs--
		}
	}
	h.mu.Unlock()
	c.close()
	c.forgetStreams(0)
	h.background.Go(func() { c.drain(0) })
}

// ServeHTTP implements http.Handler.
func (h *HTTP) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	owner, ok := h.Admission.admit(w, r)
	if !ok {
		return
	}
	if !h.Allowances.MayAsk(owner) {
		tooMany(w, nil)
		return
	}
	modern := mcp.IsModernProtocol(r.Header.Get(mcp.HeaderProtocolVersion))
	switch {
	case r.Method == http.MethodPost:
		h.post(w, r, owner)
	case (r.Method == http.MethodGet || r.Method == http.MethodDelete) && !modern:
		h.session(w, r, owner)
	default:
		w.Header().Set("Allow", "POST")
		if !modern {
			w.Header().Set("Allow", "POST, GET, DELETE")
		}
		refuse(w, http.StatusMethodNotAllowed, nil, codeInvalid, r.Method+" is not a method of this endpoint")
	}
}

func tooMany(w http.ResponseWriter, id json.RawMessage) {
	w.Header().Set("Retry-After", "1")
	refuse(w, http.StatusTooManyRequests, id, codeBusy,
		"you have sent too many requests, or have too many calls in flight; wait for some of them")
}

// refuse answers a request that is not accepted.
func refuse(w http.ResponseWriter, status int, id json.RawMessage, code int, text string) {
	refuseWith(w, status, id, &Error{Code: code, Message: text})
}

func refuseWith(w http.ResponseWriter, status int, id json.RawMessage, e *Error) {
	body, err := encode(failure(id, e))
	if err != nil {
		status, body = http.StatusInternalServerError, nil
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body) // an error means that the client is gone
}

// session answers GET, which listens to a session or resumes a stream of it, and DELETE, which ends it.
func (h *HTTP) session(w http.ResponseWriter, r *http.Request, owner string) {
	if v := r.Header.Get(mcp.HeaderProtocolVersion); v != "" && !mcp.IsValidProtocolVersion(v) {
		refuse(w, http.StatusBadRequest, nil, codeInvalid, "the protocol version is not known")
		return
	}
	c := h.sessionOf(w, r, owner, nil)
	if c == nil {
		return
	}
	if r.Method == http.MethodDelete {
		h.end(c)
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if !strings.Contains(r.Header.Get("Accept"), "text/event-stream") {
		refuse(w, http.StatusNotAcceptable, nil, codeInvalid, "a GET of this endpoint returns text/event-stream; accept it")
		return
	}
	defer c.attach()()
	if last := r.Header.Get(mcp.HeaderLastEventID); last != "" {
		old, since, found := c.findStream(last)
		if !found {
			refuse(w, http.StatusBadRequest, nil, codeInvalid, "that stream is no longer kept")
			return
		}
		old.resume(w, since)
		old.wait(r.Context())
		return
	}
	h.listenTo(c, newStream(w, r, h.beat), r)
}

// listenTo sends a session's notifications that belong to no call. The latest listener gets them.
func (h *HTTP) listenTo(c *conversation, st *stream, r *http.Request) {
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	defer context.AfterFunc(c.open, func() { cancel(nil) })()
	c.mu.Lock()
	earlier := c.listener
	c.listener = cancel
	c.mu.Unlock()
	if earlier != nil {
		earlier(nil)
	}
	st.mu.Lock()
	st.allowed, st.refused = func() bool { return h.Admission.still(r) }, func() { cancel(nil) }
	st.open()
	if err := st.put([]byte(": listening\n\n")); err != nil { // sends the headers
		cancel(err)
	}
	st.mu.Unlock()
	_ = c.feed.tell(ctx, st, nil) // what a client that is gone has missed becomes due again
	st.mu.Lock()
	defer st.mu.Unlock()
	st.end()
}

// sessionOf returns the session that a request names. A session of another owner counts as not found.
func (h *HTTP) sessionOf(w http.ResponseWriter, r *http.Request, owner string, id json.RawMessage) *conversation {
	name := r.Header.Get(mcp.HeaderSessionID)
	if name == "" {
		refuse(w, http.StatusBadRequest, id, codeInvalid, "the header Mcp-Session-Id is missing; initialize first")
		return nil
	}
	h.mu.Lock()
	c := h.sessions[name]
	h.mu.Unlock()
	if c == nil || c.owner != owner {
		refuse(w, http.StatusNotFound, id, codeInvalid, "there is no such session; initialize again")
		return nil
	}
	return c
}

// post answers a POST, which carries one message.
func (h *HTTP) post(w http.ResponseWriter, r *http.Request, owner string) {
	m, body, ok := h.read(w, r, owner)
	if !ok {
		return
	}
	version := r.Header.Get(mcp.HeaderProtocolVersion)
	if mcp.IsModernProtocol(version) || m.modern() {
		if e := h.checkHeaders(r, m); e != nil {
			refuseWith(w, http.StatusBadRequest, m.ID, e)
			return
		}
		if !m.isRequest() { // a stateless cancellation could come from anyone; here a client cancels by leaving
			w.WriteHeader(http.StatusAccepted)
			return
		}
		if c := h.client(owner, m); c != nil {
			h.call(w, r, c, m, body)
		} else {
			refuse(w, http.StatusServiceUnavailable, m.ID, codeBusy, "the server has too many clients, or is ending; try again later")
		}
		return
	}
	if version != "" && !mcp.IsValidProtocolVersion(version) {
		refuse(w, http.StatusBadRequest, m.ID, codeInvalid, "the protocol version is not known")
		return
	}
	if m.Method == string(mcp.MethodInitialize) && m.isRequest() {
		h.initialize(w, r, owner, m, body)
		return
	}
	c := h.sessionOf(w, r, owner, m.ID)
	if c == nil {
		return
	}
	if m.isRequest() {
		h.call(w, r, c, m, body)
		return
	}
	defer c.attach()()
	switch m.Method {
	case "":
		c.answered(m)
	case "notifications/cancelled":
		c.cancelCall(m)
	default:
		session := c.session(m, nil)
		h.s.dispatch(h.s.MCP.WithContext(c.ctx, session), session, m, body)
	}
	w.WriteHeader(http.StatusAccepted)
}

// initialize begins a session.
func (h *HTTP) initialize(w http.ResponseWriter, r *http.Request, owner string, m message, body []byte) {
	c := newConversation(h.ctx, owner, h.s.parallel)
	c.takeHandle(r)
	h.mu.Lock()
	ok := false
	if !h.closing {
		if c.counted, ok = h.Allowances.MayOpen(owner); ok {
			h.sessions[c.id] = c
		}
	}
	h.mu.Unlock()
	if !ok {
		refuse(w, http.StatusServiceUnavailable, m.ID, codeBusy, "the server has too many sessions, or is ending; try again later")
		return
	}
	stop := h.s.follow(c.feed, subscription{owner: owner, by: &c.client})
	context.AfterFunc(c.ctx, stop)
	revoked := context.AfterFunc(h.Admission.until(r), func() { h.end(c) }) // a session ends with the key that began it
	context.AfterFunc(c.ctx, func() { revoked() })
	w.Header().Set(mcp.HeaderSessionID, c.id)
	w.Header().Set(headerCall, "1") // calls may have names, by which their answers are asked for again
	h.call(w, r, c, m, body)
	if !c.session(m, nil).Initialized() {
		h.end(c)
	}
}

// client finds the conversation of stateless requests: those of one owner and one program share it.
func (h *HTTP) client(owner string, m message) *conversation {
	var info struct {
		Name string `json:"name"`
	}
	_ = json.Unmarshal(m.head.Meta.Client, &info) // clients need not give a name
	key := program{owner, info.Name[:min(len(info.Name), 64)]}
	h.mu.Lock()
	defer h.mu.Unlock()
	a := h.holding(owner)
	if h.clients[key] == nil && a.programs >= maxPrograms {
		key.name = ""
	}
	c := h.clients[key]
	if c == nil && !h.closing {
		c = newConversation(h.ctx, owner, h.s.parallel)
		h.clients[key] = c
		a.programs++
	}
	return c
}
