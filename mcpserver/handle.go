package mcpserver

import (
	"net/http"
	"strings"
)

// headerHandle is what a session has that its client may go on with in another session, when the server has forgotten the first: a handle
// is a name, not a right. Whoever uses it looks whether it is the owner's.
const headerHandle = "Soulbox-Session-Handle"

const maxHandle = 256

// validHandle says whether a handle can be passed on as a header, and in a comment of a stream.
func validHandle(handle string) bool {
	return len(handle) <= maxHandle && strings.Trim(handle, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_./") == ""
}

// Handle is what the session was told to go on with by its client, or by SetHandle; "" is nothing.
func (s *Session) Handle() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.handle
}

// SetHandle has the client know what a session after this one may go on with: up to 256 letters, digits and - _ . / of Handle's.
func (s *Session) SetHandle(handle string) {
	if !validHandle(handle) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handle = handle
}

// takeHandle takes what a client wants to go on with in a new session.
func (c *conversation) takeHandle(r *http.Request) {
	if handle := r.Header.Get(headerHandle); validHandle(handle) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.handle = handle
	}
}

// tellHandle has an answer carry the handle: as a header, or if those are sent as a comment of the stream. st.mu is held.
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

// keepHandle remembers what a session after this one is to go on with.
func (l *bridge) keepHandle(handle string) {
	if handle == "" || !validHandle(handle) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kept = handle
}
