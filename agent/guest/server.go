package guest

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
	"github.com/sourcegraph/jsonrpc2"
	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

// Options configures a Server. With the zero value it serves the process's own user on this machine, as in tests.
type Options struct {
	Version  string
	SpoolDir string // for large outputs; default os.TempDir
	ShellDir string // for what shells leave; default a directory in SpoolDir
	Home     string // home of the only user outside a sandbox
	Init     bool   // be the first process of a sandbox: reap orphans, use cgroups, switch users
	Image    bool   // the root is an image, in which files such as homes already have the right owners
	Log      func(format string, args ...any)
}

// Server is the guest's end of the protocol. All methods are safe for concurrent use.
type Server struct {
	opts      Options
	boot      string
	shell     string
	null      int         // descriptor of /dev/null
	files     unix.Rlimit // limit of descriptors of processes; only in a sandbox
	reaper    *reaper
	second    *processors // nil outside a sandbox
	stock     outputStock
	activity  activity
	collector *collector
	groups    *cgroups // nil outside a sandbox
	guard     *guard   // nil outside a sandbox
	starting  chan struct{}
	ctx       context.Context
	cancel    context.CancelCauseFunc

	oomKills atomic.Int64
	dials    sync.Map // functions that end a connection, by its name, for the host
	fields   fieldCache
	shells   *shells
	watches  *watches
	turns    turns
	marked   marked

	acceptors acceptors
	events    events

	mu sync.Mutex
	// waits ends when calls that wait for something in the sandbox must return what they have.
	waits       context.Context
	cancelWaits context.CancelFunc
	config      agent.Config
	procs       map[string]*process // by id
	tags        map[string]*process // the last one started under each tag
	seq         int
	hosts       int // number of sessions
	orphan      *countdown
	generation  int64 // of the machine; -1 until it is known
}

// NewServer makes a Server; with opts.Init it also sets up the machine.
func NewServer(opts Options) (*Server, error) {
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/null: %w", err)
	}
	boot := make([]byte, 8)
	rand.Read(boot)
	s := &Server{opts: opts, boot: hex.EncodeToString(boot), shell: "/bin/sh", null: null, procs: map[string]*process{},
		tags: map[string]*process{}, watches: newWatches(), generation: -1, starting: make(chan struct{}, starters)}
	if lookPath("/bin/bash", "/", nil) != "" {
		s.shell = "/bin/bash"
	}
	if s.opts.SpoolDir == "" {
		s.opts.SpoolDir = os.TempDir()
	}
	if s.opts.Home == "" {
		s.opts.Home = "/"
	}
	s.loadEnv()
	s.shells = newShells(cmp.Or(opts.ShellDir, filepath.Join(s.opts.SpoolDir, "shell")))
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.waits, s.cancelWaits = context.WithCancel(s.ctx)
	if s.collector, err = newCollector(); err != nil {
		return nil, err
	}
	s.reaper = newReaper(opts.Init, s.collector)
	if opts.Init {
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &s.files); err != nil {
			return nil, fmt.Errorf("get the limit of descriptors: %w", err)
		}
		s.files.Cur = min(s.files.Max, softFiles)
		s.second = newProcessors(&s.activity)
		if s.groups, err = setUpSandbox(opts.Image); err != nil {
			return nil, err
		}
		if _, err := s.nextGeneration(); err != nil { // before any other process exists
			return nil, fmt.Errorf("count the generation: %w", err)
		}
		s.guard = newGuard(s)
		go s.guard.run()
	}
	return s, nil
}

// Close kills every process and waits for their end. The agent never calls it, since as init it ends with its machine; tests do, and the
// fake machines of internal/sandboxtest, which run a Server in the test's own process.
func (s *Server) Close() {
	s.cancel(errors.New("agent closed"))
	for _, p := range s.all() {
		p.killAll()
	}
	for _, p := range s.all() {
		<-p.done
	}
	s.closeStock()
	s.collector.close()
	s.watches.endAll()
	for _, p := range s.all() {
		p.output.discard()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.null >= 0 {
		_ = unix.Close(s.null)
		s.null = -1
	}
}

// Done is closed when the agent has been without a host for too long, and should end.
func (s *Server) Done() <-chan struct{} { return s.ctx.Done() }

func (s *Server) log(format string, args ...any) {
	if s.opts.Log != nil {
		s.opts.Log(format, args...)
	}
}

// Serve speaks the protocol on a pipe until the pipe ends. Several pipes may be served at once.
func (s *Server) Serve(conn io.ReadWriteCloser) error {
	return s.serve(conn, bufio.NewReaderSize(conn, agent.MaxHello))
}

// serve is Serve with a reader of the pipe.
func (s *Server) serve(conn io.ReadWriteCloser, reader *bufio.Reader) error {
	defer conn.Close()
	s.present(1)
	defer s.present(-1)
	var host agent.Hello
	if err := agent.ReadHello(reader, &host); err != nil {
		return err
	}
	mine := agent.Hello{Protocol: agent.Protocol, Version: s.opts.Version, Boot: s.boot, Level: agent.Level}
	if host.Protocol != agent.Protocol {
		mine.Error = fmt.Sprintf("agent %s speaks protocol %d, host %s speaks %d", s.opts.Version, agent.Protocol,
			agent.Clip(host.Version, 40), host.Protocol)
	}
	if err := agent.WriteHello(conn, mine); err != nil || mine.Error != "" {
		return errors.Join(err, conn.Close())
	}
	session, err := yamux.Server(agent.NewBufferedConn(reader, conn), agent.MuxConfig())
	if err != nil {
		return err
	}
	defer session.Close()
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	context.AfterFunc(ctx, func() { _ = session.Close() })
	var streams sync.WaitGroup
	defer streams.Wait()
	for {
		stream, err := session.AcceptStream()
		if err != nil {
			cancel()
			return nil // the pipe has ended
		}
		streams.Go(func() {
			defer stream.Close()
			s.serveStream(ctx, stream)
		})
	}
}

// present counts the hosts, and ends the agent when it has been without one for too long.
func (s *Server) present(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hosts += n
	s.orphan.stop()
	s.orphan = nil
	if s.hosts == 0 && s.config.OrphanMS > 0 {
		s.orphan = after(time.Duration(s.config.OrphanMS)*time.Millisecond, func() { s.cancel(errors.New("no host for too long")) })
	}
}

// serveStream serves one stream according to its header. A panic ends the stream, not the machine.
func (s *Server) serveStream(ctx context.Context, stream *yamux.Stream) {
	defer func() {
		if r := recover(); r != nil {
			buf := make([]byte, 4<<10)
			s.log("panic: %v\n%s", r, buf[:runtime.Stack(buf, false)])
		}
	}()
	var h agent.Header
	if err := agent.ReadMessage(stream, &h); err != nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if laborious[h.Stream] {
		defer s.second.hold()()
	}
	switch h.Stream {
	case agent.StreamRPC:
		s.serveRPC(ctx, stream)
	case agent.StreamRead:
		s.serveRead(stream, h)
	case agent.StreamWrite:
		s.serveWrite(stream, h)
		discard(stream)
	case agent.StreamOutput:
		s.serveOutput(ctx, stream, h)
	case agent.StreamStdin:
		s.serveStdin(ctx, stream, h)
		discard(stream)
	case agent.StreamWatch:
		s.serveWatch(ctx, stream, h)
	case agent.StreamDial:
		s.serveDial(ctx, stream, h)
	case agent.StreamAccept:
		s.serveAccept(ctx, stream, h)
	case agent.StreamChanges:
		s.serveChanges(ctx, stream, h)
	case agent.StreamUnpack:
		s.serveUnpack(stream, h)
		discard(stream)
	default:
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(agent.Invalid("unknown stream %q", agent.Clip(h.Stream, 40)))})
	}
}

// serveRPC serves the calls on the control channel, each in its own goroutine.
func (s *Server) serveRPC(ctx context.Context, stream *yamux.Stream) {
	var mu sync.Mutex
	cancels := map[uint64]context.CancelFunc{}
	handler := func(_ context.Context, conn *jsonrpc2.Conn, req *jsonrpc2.Request) {
		if req.Notif {
			var note struct {
				ID   uint64 `json:"id"`
				Dial string `json:"dial"`
			}
			if req.Method == agent.NoteCancel && req.Params != nil && json.Unmarshal(*req.Params, &note) == nil {
				mu.Lock()
				if cancel := cancels[note.ID]; cancel != nil {
					cancel()
				}
				mu.Unlock()
			}
			if req.Method == agent.NoteHangUp && req.Params != nil && json.Unmarshal(*req.Params, &note) == nil {
				if hangUp, ok := s.dials.Load(note.Dial); ok {
					hangUp.(context.CancelFunc)()
				}
			}
			return
		}
		callCtx, cancel := context.WithCancel(ctx)
		mu.Lock()
		cancels[req.ID.Num] = cancel
		mu.Unlock()
		go func() {
			defer cancel()
			result, err := s.call(callCtx, req)
			mu.Lock()
			delete(cancels, req.ID.Num)
			mu.Unlock()
			if err != nil {
				_ = conn.ReplyWithError(callCtx, req.ID, replyError(err)) // an error means that the pipe has ended
				return
			}
			if err := conn.Reply(callCtx, req.ID, agent.ForWire(result)); errors.Is(err, agent.ErrTooLarge) {
				_ = conn.ReplyWithError(callCtx, req.ID, replyError(err))
			}
		}()
	}
	conn := jsonrpc2.NewConn(ctx, agent.MessageStream{Conn: stream}, agent.HandlerFunc(handler), agent.Quiet)
	<-conn.DisconnectNotify()
}

// call executes one call.
func (s *Server) call(ctx context.Context, req *jsonrpc2.Request) (result any, err error) {
	defer func() {
		if r := recover(); r != nil {
			result, err = nil, fmt.Errorf("%s: the agent panicked: %v", req.Method, r)
		}
	}()
	switch req.Method {
	case agent.CallConfigure:
		return on(req, func(c agent.Config) (struct{}, error) { return struct{}{}, s.configure(c) })
	case agent.CallStart:
		return on(req, func(r agent.StartRequest) (agent.Snapshot, error) { return s.start(s.waiting(ctx), r) })
	case agent.CallWait:
		return on(req, func(r agent.WaitRequest) (agent.Snapshot, error) {
			p, err := s.processByName(r.Process)
			if err != nil {
				return agent.Snapshot{}, err
			}
			return p.wait(s.waiting(ctx), time.Duration(r.WaitMS)*time.Millisecond, r.Beyond, r.Window)
		})
	case agent.CallSignal:
		return on(req, s.signal)
	case agent.CallResize:
		return on(req, s.resize)
	case agent.CallKill:
		return on(req, s.kill)
	case agent.CallList:
		return on(req, s.list)
	case agent.CallInput:
		return on(req, func(r agent.InputRequest) (agent.InputResult, error) { return s.input(s.waiting(ctx), r) })
	case agent.CallTree:
		return on(req, func(r agent.TreeRequest) (agent.TreeResult, error) { return s.watchTree(s.waiting(ctx), r) })
	case agent.CallShell:
		return on(req, s.describeShell)
	case agent.CallUser:
		return on(req, s.describeUser)
	case agent.CallEnv:
		return s.givenEnv(), nil
	case agent.CallPing:
		return struct{}{}, nil
	case agent.CallUsage:
		return on(req, func(r agent.UsageRequest) (agent.Usage, error) { return s.usage(r), nil })
	case agent.CallBusy:
		return on(req, func(r agent.BusyRequest) (agent.BusyResult, error) { return s.busy(s.waiting(ctx), r), nil })
	case agent.CallRelieve:
		return on(req, s.relieve)
	case agent.CallRestored:
		return s.restored()
	case agent.CallSuspend:
		s.suspend()
		return struct{}{}, nil
	}
	return s.callFiles(ctx, req)
}

// callFiles executes the calls that concern files.
func (s *Server) callFiles(ctx context.Context, req *jsonrpc2.Request) (any, error) {
	defer s.second.hold()()
	switch req.Method {
	case agent.CallStat:
		return on(req, s.stat)
	case agent.CallDir:
		return on(req, s.dir)
	case agent.CallMkdir:
		return on(req, s.mkdir)
	case agent.CallMove:
		return on(req, s.move)
	case agent.CallRemove:
		return on(req, s.remove)
	case agent.CallEdit:
		return on(req, s.edit)
	case agent.CallMount:
		return on(req, s.mount)
	case agent.CallSetattr:
		return on(req, s.setattr)
	case agent.CallSearch:
		return on(req, func(r agent.SearchRequest) (agent.SearchResult, error) { return s.search(ctx, r) })
	}
	return nil, agent.Invalid(agent.UnknownCall+" %q", agent.Clip(req.Method, 40))
}

// on decodes the arguments of a call and executes it.
func on[A, R any](req *jsonrpc2.Request, do func(A) (R, error)) (any, error) {
	var args A
	if req.Params != nil {
		if err := agent.Unmarshal(*req.Params, &args); err != nil {
			return nil, agent.Invalid("%s: %v", req.Method, err)
		}
	}
	return do(args)
}
