package tools

import (
	"context"
	_ "embed"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
)

// Instructions is what a client's model is told about the server as a whole.
//
//go:embed instructions.md
var Instructions string

// Service is the tools on one Manager. It is safe for concurrent use.
type Service struct {
	manager *sandbox.Manager

	mu       sync.Mutex
	sessions map[string]*session
}

// session is what one client's conversation has: its default sandbox.
type session struct {
	making  sync.Mutex // held while the default sandbox is made: calls at the same time get the same one
	current atomic.Pointer[sandbox.Sandbox]
}

// New makes the tools of a Manager.
func New(manager *sandbox.Manager) *Service {
	return &Service{manager: manager, sessions: map[string]*session{}}
}

// Register adds all tools to a server.
func (s *Service) Register(m *server.MCPServer) {
	for _, noun := range []func() []server.ServerTool{s.execTools, s.processTools, s.fileTools, s.sandboxTools} {
		m.AddTools(noun()...)
	}
}

func (s *Service) session(ctx context.Context) *session {
	id := ""
	if client := server.ClientSessionFromContext(ctx); client != nil {
		id = client.SessionID()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions[id] == nil {
		s.sessions[id] = &session{}
	}
	return s.sessions[id]
}

// errDefaultEnded is told once when the default sandbox of a session has ended; the next call makes a new one.
var errDefaultEnded = errors.New("this session's sandbox has ended, and its files with it; the next call without sandbox_id makes a new one")

// sandbox finds the sandbox that a call goes to. Without an id that is the session's own, made at first use.
func (s *Service) sandbox(ctx context.Context, id string) (*sandbox.Sandbox, error) {
	if id != "" {
		return s.manager.Get(id)
	}
	own := s.session(ctx)
	own.making.Lock()
	defer own.making.Unlock()
	if current := own.current.Load(); current != nil {
		info := current.Info()
		if !info.State.Ended() {
			return current, nil
		}
		own.current.Store(nil)
		return nil, errors.Join(errDefaultEnded, &sandbox.StateError{ID: info.ID, Verb: "use", State: info.State, Cause: info.Cause, At: info.Changed})
	}
	sb, err := s.manager.Create(ctx, sandbox.CreateOptions{})
	if err != nil {
		return nil, err
	}
	own.current.Store(sb)
	return sb, nil
}

// adopt makes a sandbox the session's own if it has none.
func (s *Service) adopt(ctx context.Context, sb *sandbox.Sandbox) {
	own := s.session(ctx)
	own.making.Lock()
	defer own.making.Unlock()
	if current := own.current.Load(); current == nil || current.Info().State.Ended() {
		own.current.Store(sb)
	}
}

// isDefault says whether a sandbox is the session's own.
func (s *Service) isDefault(ctx context.Context, id string) bool {
	current := s.session(ctx).current.Load()
	return current != nil && current.ID() == id
}

// target is embedded in every input that may name a sandbox.
type target struct {
	SandboxID string `json:"sandbox_id,omitempty"`
}

func (t target) id() string { return t.SandboxID }

// whyLost finds out why a sandbox ended under a call: its end is known a moment after its agent is gone.
func (s *Service) whyLost(ctx context.Context, id string, lost error) error {
	sb := s.session(ctx).current.Load()
	if id != "" {
		sb, _ = s.manager.Get(id) // nil where it is not known: then lost is all there is to say
	}
	if sb == nil {
		return lost
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if info := sb.AwaitEnd(ctx); info.State.Ended() {
		return &sandbox.StateError{ID: info.ID, Verb: "go on in", State: info.State, Cause: info.Cause, At: info.Changed}
	}
	return lost
}

// agent finds the agent of a target's sandbox.
func (s *Service) agent(ctx context.Context, t target, verb string) (*sandbox.Sandbox, *agent.Client, error) {
	sb, err := s.sandbox(ctx, t.SandboxID)
	if err != nil {
		return nil, nil, err
	}
	client, err := sb.Agent(verb)
	return sb, client, err
}
