package mcpserver

import (
	"net/http"
	"strings"
)

// headerHandle carries the handle of a session: what a client presents to a new session to continue there when the server has forgotten the
// first one. A handle is a name, not a right: its user must check that what it names belongs to the owner.
const headerHandle = "Soulbox-Session-Handle"

const maxHandle = 256

// validHandle reports whether a handle can be passed on as a header and in a comment of a stream.
func validHandle(handle string) bool {
	return len(handle) <= maxHandle && strings.Trim(handle, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_./") == ""
}

// Handle is what the session continues with, as given by its client or by SetHandle; "" means nothing.
func (s *Session) Handle() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.handle
}

// SetHandle tells the client what a later session may continue with: up to 256 letters, digits and - _ . /
func (s *Session) SetHandle(handle string) {
	if !validHandle(handle) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handle = handle
}

// takeHandle stores the handle with which a client continues in a new session.
func (c *conversation) takeHandle(r *http.Request) {
	if handle := r.Header.Get(headerHandle); validHandle(handle) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.handle = handle
	}
}

// tellHandle puts the handle into an answer: as a header, or as a comment of the stream if the headers are already sent. st.mu is held.
func (st *stream) tellHandle() {
	if st.handle == nil || st.w == nil {
		return
	}
	handle := st.handle()
	if handle == "" || handle == st.told {
		return
	}
	st.told = handle
	if !st.isOpen {
		st.w.Header().Set(headerHandle, handle)
	} else {
		_ = st.put([]byte(handleComment + handle + "\n\n")) // put lets a client go that cannot be written to
	}
}

const handleComment = ": handle "

// keepHandle remembers what a later session is to continue with.
func (l *bridge) keepHandle(handle string) {
	if handle == "" || !validHandle(handle) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kept = handle
}
