package tools

import (
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// Instructions is what a client's model is told about the whole server.
//
//go:embed instructions.md
var Instructions string

// Options configures the tools; zero values mean the documented defaults.
type Options struct {
	Manager *sandbox.Manager // required
	// Toolsets are the names of the toolsets to offer (see the function Toolsets); default all.
	Toolsets []string
	// PortURL is where a user reaches an exposed port; default on this machine's loopback.
	PortURL func(*sandbox.Sandbox, sandbox.Port) string
	// FileURL is a URL by which anyone who has it reads or writes a file until a given time; nil if the server is not reached by URLs.
	FileURL func(sb *sandbox.Sandbox, path, operation string, until time.Time) string
	// Store has the templates besides the host's; Builds makes new ones. By default there are none, and none can be made.
	Store  *template.Store
	Builds *template.Builds
	// ContextDirs are the directories of the host that builds may read, as real paths (symlinks resolved); default none.
	ContextDirs []string
	// ReadOnly leaves out every tool that changes anything; no call makes a sandbox.
	ReadOnly bool
}

// Toolbox implements the tools on one Manager. It is safe for concurrent use.
type Toolbox struct {
	Options
	secret  [32]byte // signs what a client returns to us
	screens screens
}

// session is the state of one client's conversation, above all its default sandbox.
type session struct {
	heir    heir       // nil if its client cannot continue in another session
	shell   string     // the shell that its commands share; each sandbox has one of this name
	making  sync.Mutex // held while the default sandbox is made, so that concurrent calls get the same one
	current atomic.Pointer[sandbox.Sandbox]
	// inherited is the id of the previous session's sandbox, until that is found; guarded by making.
	inherited string
}

// New makes the tools of a Manager.
func New(o Options) (*Toolbox, error) {
	if err := CheckToolsets(o.Toolsets); err != nil {
		return nil, err
	}
	s := &Toolbox{Options: o}
	rand.Read(s.secret[:])
	return s, nil
}

// conversation is what the tools need of a call's session.
type conversation interface {
	Owner() string
	Value(key any, make func() any) any
}

// errNoSession is a fault of the server: a call without a session has no owner.
var errNoSession = errors.New("the call belongs to no session")

// caller finds the conversation that a call belongs to.
func caller(ctx context.Context) (conversation, error) {
	if c, ok := server.ClientSessionFromContext(ctx).(conversation); ok {
		return c, nil
	}
	return nil, errNoSession
}

type sessionKey struct{ *Toolbox }

// session finds the session of a call's conversation.
func (s *Toolbox) session(ctx context.Context) (own *session, owner string, err error) {
	c, err := caller(ctx)
	if err != nil {
		return nil, "", err
	}
	return c.Value(sessionKey{s}, func() any { return s.begin(c) }).(*session), c.Owner(), nil
}

// heir is a conversation in which a client can continue with the sandbox and shell of an earlier one that the server has forgotten. The
// handle names them.
type heir interface {
	Handle() string
	SetHandle(handle string)
}

// begin begins a session: a new one, or one with the sandbox and the shell of an earlier one.
func (s *Toolbox) begin(c conversation) *session {
	own := &session{shell: rand.Text()}
	if h, ok := c.(heir); ok {
		own.heir = h
		if id, shell, ok := strings.Cut(h.Handle(), "/"); ok && sandbox.ValidID(id) && shell != "" && len(shell) <= maxShell {
			own.inherited, own.shell = id, shell
		}
	}
	return own
}

// maxShell bounds the name of a shell that a client returns in a handle.
const maxShell = 64

// setCurrent makes a sandbox the session's own and puts it into the client's handle. making is held.
func (own *session) setCurrent(sb *sandbox.Sandbox) {
	own.current.Store(sb)
	if own.heir != nil {
		own.heir.SetHandle(sb.ID() + "/" + own.shell)
	}
}

// inherit finds the sandbox that the session is to continue with. If that no longer exists, the error is returned once. making is held.
func (s *Toolbox) inherit(ctx context.Context, own *session, owner string) error {
	id := own.inherited
	if id == "" {
		return nil
	}
	s.Manager.AwaitSettled(ctx) // a server that has just started takes over its predecessor's sandboxes in a moment
	sb, err := s.Manager.Get(owner, id)
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return err
	}
	own.inherited = ""
	if err != nil {
		return errDefaultGone
	}
	own.setCurrent(sb)
	logTo(ctx, "sandbox "+id+" is still this session's own, though the server was restarted")
	return nil
}

// shell is the name of the shell that the commands of a call's session share; "" for a command on its own.
func (s *Toolbox) shell(ctx context.Context, isolated bool) (string, error) {
	own, _, err := s.session(ctx)
	if err != nil || isolated {
		return "", err
	}
	return own.shell, nil
}

// errDefaultEnded is returned once when the default sandbox of a session has ended; the next call makes a new one.
var errDefaultEnded = errors.New("this session's sandbox has ended, and its files with it; the next call without sandbox_id " +
	"makes a new one")

// errDefaultGone is returned once when a session continues in a server that does not have its sandbox.
var errDefaultGone = errors.New("the server was restarted, and this session's sandbox no longer exists; the next call without " +
	"sandbox_id makes a new one")

// sandbox finds the sandbox that a call addresses. Without an id that is the session's own, made at first use.
func (s *Toolbox) sandbox(ctx context.Context, id string) (*sandbox.Sandbox, error) {
	own, owner, err := s.session(ctx)
	if err != nil {
		return nil, err
	}
	if id != "" {
		return s.Manager.Get(owner, id)
	}
	own.making.Lock()
	defer own.making.Unlock()
	if err := s.inherit(ctx, own, owner); err != nil {
		return nil, err
	}
	if current := own.current.Load(); current != nil {
		info := current.Info()
		if !info.State.Ended() {
			return current, nil
		}
		if saved, err := s.Manager.Get(owner, info.ID); err == nil && saved.Info().OnDisk { // it waits for a resume, or was resumed
			own.current.Store(saved)
			return saved, nil
		}
		own.current.Store(nil)
		return nil, errors.Join(errDefaultEnded, &sandbox.StateError{ID: info.ID, Verb: "use", State: info.State, Cause: info.Cause,
			At: info.Changed})
	}
	if s.ReadOnly {
		return nil, badArgument("The argument \"sandbox_id\" is missing: this server only reads, so it makes no sandbox. Call " +
			"sandbox_list to see the existing ones.")
	}
	sb, err := s.Manager.Create(ctx, sandbox.CreateOptions{Owner: owner})
	if err != nil {
		return nil, err
	}
	own.setCurrent(sb)
	logTo(ctx, "sandbox "+sb.ID()+" is this session's own")
	return sb, nil
}

// adopt makes a sandbox the session's own if it has none.
func (s *Toolbox) adopt(ctx context.Context, sb *sandbox.Sandbox) {
	own, owner, err := s.session(ctx)
	if err != nil {
		return // cannot happen: the sandbox was made for this call's owner
	}
	own.making.Lock()
	defer own.making.Unlock()
	if err := s.inherit(ctx, own, owner); err != nil {
		logTo(ctx, err.Error())
	}
	if current := own.current.Load(); current == nil || current.Info().State.Ended() {
		own.setCurrent(sb)
	}
}

// isDefault reports whether a sandbox is the session's own.
func (s *Toolbox) isDefault(ctx context.Context, id string) bool {
	own, _, err := s.session(ctx)
	if err != nil {
		return false
	}
	current := own.current.Load()
	return current != nil && current.ID() == id
}

// heavyTime is how long a call waits for a slot: clients give up after a minute.
const heavyTime = 45 * time.Second

// heavy takes a slot for work that needs much of the server's processor, and memory for it, from the account of the call's owner. If there
// is no slot it waits, heavyTime at most; other owners are not held up meanwhile.
func (s *Toolbox) heavy(ctx context.Context, buffers int64) (done func(), err error) {
	c, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	return s.Manager.Accounts().TakeAll(ctx, heavyTime, c.Owner(), access.Part{Of: access.Work, N: 1},
		access.Part{Of: access.Buffers, N: buffers})
}

// target is embedded in every input that may name a sandbox.
type target struct {
	SandboxID string `json:"sandbox_id,omitempty" header:"Sandbox-Id"`
}

func (t target) id() string { return t.SandboxID }

// whyLost finds out why a sandbox ended during a call: the end is known a moment after the agent is gone.
func (s *Toolbox) whyLost(ctx context.Context, id string, lost error) error {
	own, owner, err := s.session(ctx)
	if err != nil {
		return lost
	}
	sb := own.current.Load()
	if id != "" {
		sb, _ = s.Manager.Get(owner, id) // nil if it is not found: then lost is all there is to say
	}
	if sb == nil {
		return lost
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if info := sb.AwaitEnd(ctx); info.State.Ended() {
		return &sandbox.StateError{ID: info.ID, Verb: "continue in", State: info.State, Cause: info.Cause, At: info.Changed,
			Saved: info.OnDisk}
	}
	return lost
}

// agent finds the agent of a target's sandbox.
func (s *Toolbox) agent(ctx context.Context, t target, verb string) (*sandbox.Sandbox, *agent.Client, error) {
	sb, err := s.sandbox(ctx, t.SandboxID)
	if err != nil {
		return nil, nil, err
	}
	client, err := sb.Agent(ctx, verb)
	return sb, client, err
}
