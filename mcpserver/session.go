package mcpserver

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// Session is one client's conversation. It implements mcp-go's session interfaces, and Notify, which is how notes keep their order.
type Session struct {
	id          string
	out         *writer
	notes       chan mcp.JSONRPCNotification // mcp-go's own notes
	initialized atomic.Bool

	mu           sync.Mutex
	info         mcp.Implementation
	capabilities mcp.ClientCapabilities
}

var (
	_ server.ClientSession         = (*Session)(nil)
	_ server.SessionWithClientInfo = (*Session)(nil)
)

func newSession(out *writer) *Session {
	var random [16]byte
	rand.Read(random[:])
	return &Session{id: hex.EncodeToString(random[:]), out: out, notes: make(chan mcp.JSONRPCNotification, 64)}
}

// SessionID implements server.ClientSession.
func (s *Session) SessionID() string { return s.id }

// Initialize implements server.ClientSession.
func (s *Session) Initialize() { s.initialized.Store(true) }

// Initialized implements server.ClientSession.
func (s *Session) Initialized() bool { return s.initialized.Load() }

// NotificationChannel implements server.ClientSession; only mcp-go itself uses it.
func (s *Session) NotificationChannel() chan<- mcp.JSONRPCNotification { return s.notes }

// GetClientInfo implements server.SessionWithClientInfo.
func (s *Session) GetClientInfo() mcp.Implementation {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.info
}

// SetClientInfo implements server.SessionWithClientInfo.
func (s *Session) SetClientInfo(info mcp.Implementation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.info = info
}

// GetClientCapabilities implements server.SessionWithClientInfo.
func (s *Session) GetClientCapabilities() mcp.ClientCapabilities {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.capabilities
}

// SetClientCapabilities implements server.SessionWithClientInfo.
func (s *Session) SetClientCapabilities(c mcp.ClientCapabilities) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.capabilities = c
}

// Notify writes a note before it returns, so that it precedes whatever its caller answers later.
func (s *Session) Notify(method string, params map[string]any) error {
	return s.out.write(struct {
		JSONRPC string         `json:"jsonrpc"`
		Method  string         `json:"method"`
		Params  map[string]any `json:"params,omitempty"`
	}{"2.0", method, params})
}

// writer writes messages whole, one after the other.
type writer struct {
	mu     sync.Mutex // held while a client does not read
	w      io.Writer
	failed atomic.Pointer[error] // of the first write that failed; nothing is written after it
}

func (w *writer) err() error {
	if e := w.failed.Load(); e != nil {
		return *e
	}
	return nil
}

var errEncode = errors.New("encode message")

func (w *writer) write(v any) error {
	line, err := encode(v)
	if err != nil {
		return errors.Join(errEncode, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.err(); err != nil {
		return err
	}
	if _, err := w.w.Write(line); err != nil {
		w.failed.Store(&err)
	}
	return w.err()
}
