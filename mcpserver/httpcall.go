package mcpserver

import (
	"encoding/json"
	"errors"
	"net/http"

	"github.com/mark3labs/mcp-go/mcp"
)

// call runs a request and answers it. A client with a session may leave and come back for the answer; a stateless client cancels by
// leaving.
func (h *HTTP) call(w http.ResponseWriter, r *http.Request, c *conversation, m message, body []byte) {
	defer c.attach()()
	again := ""
	if !m.modern() {
		again = r.Header.Get(headerCall)
		if st := c.findCall(again); st != nil { // made before; its client did not get the answer
			st.resume(w, 0)
			st.wait(r.Context())
			return
		}
	}
	done, ok := h.Allowances.MayCall(c.owner)
	if !ok {
		tooMany(w, m.ID)
		return
	}
	inner := m
	if m.modern() { // clients choose ids, so two instances of a program may use the same one at once
		inner.ID = json.RawMessage(`"` + randomID() + `"`)
	}
	f, refusal := c.begin(inner, len(body), h.s.pending)
	if refusal != nil {
		done()
		refuseWith(w, http.StatusOK, m.ID, refusal)
		return
	}
	st := h.newCallStream(w, r, c, m, again, f)
	session := c.session(m, st)
	session.until = h.Admission.until(r)
	go func() {
		defer done()
		defer session.whenRevoked(func() { f.cancel(errRevoked) })()
		h.answer(f, session, m, body, st)
	}()
	st.wait(r.Context())
	if m.modern() && r.Context().Err() != nil {
		if session.until.Err() != nil {
			f.cancel(errRevoked)
		}
		f.cancel(ErrCancelled)
	}
}

// newCallStream makes the stream of a call; again is the id under which the client can ask for the answer again.
func (h *HTTP) newCallStream(w http.ResponseWriter, r *http.Request, c *conversation, m message, again string, f *flight) *stream {
	st := newStream(w, r, h.beat)
	st.mu.Lock()
	st.resumable = !m.modern()
	st.priming = st.resumable && c.session(m, nil).ProtocolVersion() >= mcp.ProtocolVersion20251125
	h.mu.Lock()
	kept := &h.holding(c.owner).kept
	h.mu.Unlock()
	st.kept = kept
	if !m.modern() {
		st.handle = c.session(m, nil).Handle
	}
	if kept.Load() > maxOwnKept { // the new answer is kept whatever its size, so older ones must go
		c.forgetStreams(keptTime / 20)
	}
	if st.call = again; st.call != "" && st.events {
		c.remember(st)
	} else if st.resumable && st.events {
		st.opened = func() { c.remember(st) }
	}
	if m.Method == methodListen {
		st.allowed, st.refused = func() bool { return h.Admission.still(r) }, func() { f.cancel(errRevoked) }
	}
	st.mu.Unlock()
	return st
}

// answer runs a request and writes the answer.
func (h *HTTP) answer(f *flight, session *Session, m message, body []byte, st *stream) {
	answered := false
	h.s.run(f, session, m, body, func(response any) {
		answered = true
		if err := st.finish(statusOf(m, response), response); errors.Is(err, errEncode) {
			h.s.Log.Error("encode response", "method", m.Method, "error", err)
			_ = st.finish(http.StatusOK, failure(m.ID, &Error{Code: codeInternal, Message: "the answer could not be encoded"}))
		}
	})
	if !answered { // cancelled: the stream ends without an answer
		st.mu.Lock()
		st.open()
		st.end()
		st.mu.Unlock()
	}
	if session.over() { // no client can come back any more
		st.forget()
	}
}

// checkHeaders checks that a request's headers say the same as its body, as 2026-07-28 demands.
func (h *HTTP) checkHeaders(r *http.Request, m message) *Error {
	header, meta := r.Header.Get(mcp.HeaderProtocolVersion), m.head.Meta.Version
	mismatch := func(text string) *Error { return &Error{Code: mcp.HEADER_MISMATCH, Message: text} }
	switch {
	case !m.isRequest():
		return nil
	case header == "":
		return mismatch("the header MCP-Protocol-Version is missing")
	case meta == "":
		return &Error{Code: codeParams, Message: "missing or invalid _meta field " + mcp.MetaKeyProtocolVersion}
	case header != meta:
		return mismatch("the header MCP-Protocol-Version differs from the version in the message")
	}
	if e := checkModern(m); e != nil {
		return e
	}
	if err := mcp.ValidateStandardHeaders(r.Header.Get, meta, mcp.MCPMethod(m.Method), m.Params); err != nil {
		return mismatch(err.Error())
	}
	if m.Method == methodTasksGet || m.Method == methodTasksUpdate || m.Method == methodTasksCancel {
		if name, ok := mcp.DecodeHeaderValue(r.Header.Get(mcp.HeaderName)); !ok || name != m.head.TaskID {
			return mismatch("the header Mcp-Name does not name the task of the message")
		}
	}
	if m.tool() == "" {
		return nil
	}
	if tool := h.s.MCP.GetTool(m.tool()); tool != nil {
		if err := mcp.ValidateParamHeadersLookup(lookup(r.Header), &tool.Tool, m.Params); err != nil {
			return mismatch(err.Error())
		}
	}
	return nil
}

// lookup tells an empty header from a missing one.
func lookup(h http.Header) func(string) (string, bool) {
	return func(name string) (string, bool) {
		values := h.Values(name)
		if len(values) == 0 {
			return "", false
		}
		return values[0], true
	}
}
