// Package envd serves the processes and files of a sandbox as E2B's envd does, at port 49983 of each sandbox: processes and files by
// Connect RPC, whole files and some facts by plain HTTP (docs/protocol.md). None of it runs in the sandbox: this package speaks to the
// sandbox's agent.
package envd

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"soulbox.dev/soulbox/agent"
	ours "soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/api/envd/spec/filesystem/filesystemconnect"
	"soulbox.dev/soulbox/api/envd/spec/process/processconnect"
	"soulbox.dev/soulbox/sandbox"
)

// Version is the version that clients see. The package has everything that clients require of it (docs/protocol.md).
const Version = "0.6.13"

// Port is the port of a sandbox on which clients expect envd.
const Port = 49983

// AccessHeader carries the sandbox's access token.
const AccessHeader = "X-Access-Token"

// maxMessage bounds one message of a client, in bytes; files go through /files.
const maxMessage = 8 << 20

// Target is the sandbox that a request is for.
type Target struct {
	Sandbox *sandbox.Sandbox
	// Open says that no token is required, and that paths for the operator alone are served too: only this machine's user can come here.
	Open bool
	// Free says that no token is required, because the sandbox was made so.
	Free bool
}

// Server serves any number of sandboxes. It is safe for concurrent use.
type Server struct {
	log      *slog.Logger
	mux      *http.ServeMux
	watchers watchers
	leases   leases
	reading  atomic.Int64  // bytes of bodies in memory
	listings chan struct{} // holds one token per running listing
}

// New makes a Server.
func New(log *slog.Logger) *Server {
	s := &Server{log: log, mux: http.NewServeMux(), listings: make(chan struct{}, maxListings)}
	options := []connect.HandlerOption{connect.WithReadMaxBytes(maxMessage), connect.WithInterceptors(aborter{})}
	s.mux.Handle(processconnect.NewProcessHandler(processes{s}, options...))
	s.mux.Handle(filesystemconnect.NewFilesystemHandler(files{s}, options...))
	s.mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	s.mux.HandleFunc("GET /metrics", s.metrics)
	s.mux.HandleFunc("GET /envs", s.envs)
	s.mux.HandleFunc("POST /init", s.init)
	s.mux.HandleFunc("GET /files", s.download)
	s.mux.HandleFunc("POST /files", s.upload)
	s.mux.HandleFunc("POST /files/compose", s.compose)
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fail(w, http.StatusNotFound, "there is no "+r.URL.Path) })
	return s
}

// Proven reports whether a request has proof that it may act: the sandbox's token, a signature, or a sandbox that needs none. A health
// check proves nothing without the token.
func (t Target) Proven(r *http.Request) bool {
	return t.hasToken(r) || t.Free && r.URL.Path != "/health" || r.URL.Path == "/files" && t.wrong(r) == ""
}

// Admits reports whether a request may act in a sandbox. It answers those that may not, and CORS preflights.
func (s *Server) Admits(w http.ResponseWriter, r *http.Request, t Target) bool {
	if allowAll(w, r) {
		return false
	}
	if internal[r.URL.Path] && !t.Open { // the path exists for no client, whatever token it has
		fail(w, http.StatusNotFound, "there is no "+r.URL.Path)
		return false
	}
	if wrong := t.wrong(r); wrong != "" {
		fail(w, http.StatusUnauthorized, wrong)
		return false
	}
	return true
}

// internal are the paths that only E2B's own servers use.
var internal = map[string]bool{"/init": true, "/freeze": true, "/unfreeze": true, "/collapse": true, "/fsfreeze": true, "/fsthaw": true,
	"/upgrade": true}

// Serve answers an admitted request. If the sandbox ends meanwhile, it breaks off the connection, so that the client does not take that for
// the end of the answer.
func (s *Server) Serve(w http.ResponseWriter, r *http.Request, t Target) {
	client, err := t.agent(r)
	if err != nil && follows(r) && errors.Is(err, sandbox.ErrState) && Refuse(w, r, http.StatusConflict, err.Error()) {
		return
	}
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	if client.Level() < level {
		fail(w, http.StatusNotImplemented,
			"the sandbox was made by an older version of SoulBox, which does not support this: use it through MCP, or create a new sandbox")
		return
	}
	ctx, cancel := t.Sandbox.Bind(r.Context())
	defer cancel()
	p := &scope{Target: t, client: client, process: r.Header.Get(ours.ProcessHeader), shown: r.Header.Get(ours.NamesHeader) != ""}
	over := p.guardConnection(ctx, w)
	defer over()
	if r.URL.Path != "/files" { // bodies of /files are passed on, not held in memory
		body := &counted{ReadCloser: r.Body, all: &s.reading}
		defer body.release()
		r.Body = body
	}
	s.mux.ServeHTTP(w, r.WithContext(context.WithValue(ctx, scopeKey{}, p)))
}

// follows reports whether a request comes from a client that follows a process: such a client sends an offset, or the process's id.
func follows(r *http.Request) bool {
	return r.Header.Get(ours.FromHeader) != "" || r.Header.Get(ours.ProcessHeader) != ""
}

// agent returns the sandbox's agent. A call wakes a paused sandbox if it may. A client that follows a process does not wake it: the sandbox
// was paused on purpose.
func (t Target) agent(r *http.Request) (*agent.Client, error) {
	if follows(r) {
		return t.Sandbox.AgentIfAwake(r.Context(), "follow a process in")
	}
	return t.Sandbox.Agent(r.Context(), "act in")
}

// level is the level that an agent must have.
const level = 1

const (
	idleTime  = 10 * time.Minute // of a connection on which nothing moves while a request is served
	freeBody  = 64 << 10         // bytes of a body that are not counted
	maxBodies = 256 << 20        // bytes of the bodies of all calls together
)

// guardConnection ends the connection of a request when nothing moves on it for long, and when ctx ends: a client that does not read must
// not keep what belongs to an ended sandbox. The caller calls over when the request has been served.
func (p *scope) guardConnection(ctx context.Context, w http.ResponseWriter) (over func()) {
	idle := NewIdle(w, idleTime)
	idle.Moves()
	p.idle = idle
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(cut)
		idle.Cut()
	})
	return func() {
		if !stop() {
			<-cut // it still uses w
		}
		idle.Over()
	}
}

// counted is the body of a call, which is held in memory. Read fails when all bodies together exceed maxBodies.
type counted struct {
	io.ReadCloser
	all     *atomic.Int64
	n, held int64
}

var errBodies = connect.NewError(connect.CodeResourceExhausted,
	errors.New("too much is being sent to this server at once; try again in a moment"))

// Read implements io.Reader.
func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	if c.n += int64(n); c.n > freeBody {
		c.held += int64(n)
		if c.all.Add(int64(n)) > maxBodies {
			return n, errBodies
		}
	}
	return n, err
}

func (c *counted) release() { c.all.Add(-c.held) }

type scopeKey struct{}

// scope is where a request acts.
type scope struct {
	Target
	client *agent.Client
	idle   *Idle // is told when something is sent or received
	// process is the agent's id of the requested process, if the client sends it: numbers may be reused.
	process string
	shown   bool // file names are in the notation of package names, which E2B does not know
}

func scopeOf(ctx context.Context) *scope { return ctx.Value(scopeKey{}).(*scope) }

// hasEnded reports whether an error means that the sandbox has ended or is being paused.
func (p *scope) hasEnded(err error) bool { return p.dead() || errors.Is(err, sandbox.ErrState) }

// broken reports whether an error means such an end, or that the server or the client has gone. Such a call gets no end frame.
func (p *scope) broken(ctx context.Context, err error) bool {
	return p.hasEnded(err) || errors.Is(ctx.Err(), context.Canceled)
}

// dead reports whether the agent's connection or the sandbox has ended.
func (p *scope) dead() bool {
	select {
	case <-p.client.Done():
		return true
	default:
		return p.Sandbox.Gone()
	}
}

// aborter breaks off calls whose sandbox has ended.
type aborter struct{}

// WrapUnary implements connect.Interceptor.
func (aborter) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		res, err := next(ctx, req)
		if err != nil && scopeOf(ctx).broken(ctx, err) {
			panic(http.ErrAbortHandler)
		}
		return res, rpcError(err)
	}
}

// WrapStreamingClient implements connect.Interceptor.
func (aborter) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler implements connect.Interceptor.
func (aborter) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		err := next(ctx, conn)
		if err != nil && scopeOf(ctx).broken(ctx, err) {
			panic(http.ErrAbortHandler)
		}
		return rpcError(err)
	}
}

// wrong says why a request is not authorized; "" means that it is. A signature authorizes requests for files.
func (t Target) wrong(r *http.Request) string {
	switch {
	case t.Open, t.Free, t.hasToken(r):
		return ""
	case r.URL.Path == "/health" && (r.Method == http.MethodGet || r.Method == http.MethodHead):
		return ""
	case r.URL.Path == "/files" && (r.Method == http.MethodGet || r.Method == http.MethodHead):
		return t.unsigned(r, OpRead)
	case r.URL.Path == "/files" && r.Method == http.MethodPost:
		return t.unsigned(r, OpWrite)
	}
	return "unauthorized access, please provide a valid access token or method signing if supported"
}

func (t Target) hasToken(r *http.Request) bool {
	shown, secret := r.Header.Values(AccessHeader), t.Sandbox.AccessToken()
	return len(shown) == 1 && secret != "" && subtle.ConstantTimeCompare([]byte(shown[0]), []byte(secret)) == 1
}

// allowAll lets web pages of any origin use the server, as envd does: they must send the token, which no browser adds by itself. It answers
// preflights.
func allowAll(w http.ResponseWriter, r *http.Request) (answered bool) {
	h := w.Header()
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Expose-Headers",
		"Location, Cache-Control, X-Content-Type-Options, Grpc-Status, Grpc-Message, Grpc-Status-Details-Bin")
	if r.Method != http.MethodOptions {
		return false
	}
	h.Set("Access-Control-Allow-Methods", "HEAD, GET, POST, PUT, PATCH, DELETE")
	h.Set("Access-Control-Allow-Headers",
		"*, Authorization, Content-Type, Connect-Protocol-Version, Connect-Timeout-Ms, Keepalive-Ping-Interval, X-Access-Token, "+
			"E2b-Sandbox-Id, E2b-Sandbox-Port, X-Requested-With")
	h.Set("Access-Control-Max-Age", "7200")
	w.WriteHeader(http.StatusNoContent)
	return true
}

// user returns the user as whom a call acts: the name in Basic authentication without a password.
func user(h http.Header) (string, error) {
	given := h.Get("Authorization")
	if given == "" {
		return "", nil
	}
	name, _, ok := (&http.Request{Header: http.Header{"Authorization": {given}}}).BasicAuth()
	if !ok {
		return "", connect.NewError(connect.CodeUnauthenticated, errors.New("the user is given as Basic authentication without a password"))
	}
	return name, nil
}

// metrics answers with what the sandbox uses.
func (s *Server) metrics(w http.ResponseWriter, r *http.Request) {
	p := scopeOf(r.Context())
	inside, outside, err := p.Sandbox.Usage(r.Context())
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	samples, err := p.Sandbox.Samples(time.Now().Add(-time.Minute), time.Time{})
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	cpu := 0.0
	if len(samples) > 0 {
		cpu = max(samples[len(samples)-1].CPU, samples[len(samples)-1].HostCPU)
	}
	used := max(inside.Memory, outside.Memory) // includes the sandbox's kernel, as in E2B's machines
	limits := p.Sandbox.Info().Limits
	cpu /= max(limits.CPU, 1) // of what it may use
	answer(w, map[string]any{
		"ts": time.Now().Unix(), "cpu_count": max(1, int(limits.CPU+0.5)), "cpu_used_pct": cpu, "mem_total": limits.Memory,
		"mem_used": used, "mem_cache": 0,
		"mem_total_mib": limits.Memory >> 20, "mem_used_mib": used >> 20, "disk_used": inside.DiskUsed, "disk_total": limits.Disk,
	})
}

func (s *Server) envs(w http.ResponseWriter, r *http.Request) {
	env, err := scopeOf(r.Context()).client.Environment(r.Context())
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	answer(w, env)
}

// init sets the variables that E2B's own servers send to a new sandbox, and ignores the rest of the message.
func (s *Server) init(w http.ResponseWriter, r *http.Request) {
	p := scopeOf(r.Context())
	if !p.Open {
		fail(w, http.StatusNotFound, "there is no "+r.URL.Path)
		return
	}
	var body struct {
		EnvVars map[string]string `json:"envVars"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxMessage)).Decode(&body); err != nil {
		fail(w, http.StatusBadRequest, "the body is not a JSON object with envVars: "+err.Error())
		return
	}
	if err := p.Sandbox.AddEnv(r.Context(), body.EnvVars); err != nil {
		s.refuse(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func answer(w http.ResponseWriter, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(body) // the client may be gone
}

// fail answers with an error in E2B's form.
func fail(w http.ResponseWriter, code int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Del("Content-Encoding")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{"code": code, "message": agent.Inert([]byte(message))}) // the client may be gone
}
