package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"

	pb "soulbox.dev/soulbox/api/envd/spec/process"
	"soulbox.dev/soulbox/api/envd/spec/process/processconnect"
	"soulbox.dev/soulbox/internal/names"
)

// Size is the size of a terminal, in characters.
type Size struct{ Rows, Cols int }

// Command is a process to start.
type Command struct {
	Args  []string
	Env   map[string]string
	Cwd   string // default the user's home
	User  string // default the sandbox's
	Tag   string // a name that no two running processes share
	Stdin bool   // stdin is a pipe; otherwise it is empty
	// Terminal, if not nil, gives the process a terminal, which is also its stdin.
	Terminal *Size
	// Linger is how long the process may run without followers before it is killed; 0 sets no limit.
	Linger time.Duration
}

// Exit is how a process has ended.
type Exit struct {
	Code   int    // as in shells: 128 plus the number of the signal that killed it
	Status string // such as "signal: killed: …"; "" if it has exited by itself
}

// StartError means that a process could not be started. Exit is the exit status that a shell would have: 126 or 127.
type StartError struct {
	Exit    int
	Message string
}

// Error implements error.
func (e *StartError) Error() string { return e.Message }

// ProcessHandle follows a process, even when connections break and servers end: it reconnects and continues at the byte that it had
// reached. Its methods may be called concurrently, but Follow only once.
type ProcessHandle struct {
	PID     int // never changes
	sandbox string
	id      string // of the process, as its server knows it
	linger  time.Duration
	pty     bool
	again   func(context.Context) (*Client, error) // finds the server that now has the sandbox

	mu      sync.Mutex
	client  *Client
	reached int64
	stream  stream

	inputs sync.Mutex // keeps inputs in their order
}

// stream is the answer of Start or Connect.
type stream interface {
	receive() (*pb.ProcessEvent, error)
	ResponseHeader() http.Header
	Close() error
}

type started struct {
	*connect.ServerStreamForClient[pb.StartResponse]
	cancel context.CancelFunc
}

func (s started) receive() (*pb.ProcessEvent, error) {
	if s.Receive() {
		return s.Msg().GetEvent(), nil
	}
	return nil, ended(s.Err())
}

type connected struct {
	*connect.ServerStreamForClient[pb.ConnectResponse]
	cancel context.CancelFunc
}

func (s connected) receive() (*pb.ProcessEvent, error) {
	if s.Receive() {
		return s.Msg().GetEvent(), nil
	}
	return nil, ended(s.Err())
}

// Close closes the stream, whatever it waits for.
func (s started) Close() error { s.cancel(); return s.ServerStreamForClient.Close() }

// Close closes the stream, whatever it waits for.
func (s connected) Close() error { s.cancel(); return s.ServerStreamForClient.Close() }

func ended(err error) error {
	if err == nil {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (c *Client) processes(sandbox string) processconnect.ProcessClient {
	return processconnect.NewProcessClient(c.plain, c.envd(sandbox), uncompressed)
}

func by(pid int) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: uint32(pid)}}
}

// Start starts a process and follows it. When the server is gone, again finds the server that now has the sandbox.
func (c *Client) Start(ctx context.Context, sandbox string, cmd Command,
	again func(context.Context) (*Client, error)) (*ProcessHandle, error) {
	if len(cmd.Args) == 0 {
		return nil, errors.New("there is no command: give its name, and its arguments")
	}
	bytes := !utf8.ValidString(cmd.Cwd) || slices.ContainsFunc(cmd.Args, func(arg string) bool { return !utf8.ValidString(arg) })
	if bytes { // otherwise older servers understand it too
		cmd.Args, cmd.Cwd = slices.Clone(cmd.Args), names.Show(cmd.Cwd)
		for i, arg := range cmd.Args {
			cmd.Args[i] = names.Show(arg)
		}
	}
	msg := &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: cmd.Args[0], Args: cmd.Args[1:], Envs: cmd.Env}, Stdin: &cmd.Stdin}
	if cmd.Cwd != "" {
		msg.Process.Cwd = &cmd.Cwd
	}
	if cmd.Tag != "" {
		msg.Tag = &cmd.Tag
	}
	if cmd.Terminal != nil {
		msg.Pty = pty(*cmd.Terminal)
	}
	req := connect.NewRequest(msg)
	if bytes {
		req.Header().Set(NamesHeader, "shown")
	}
	if cmd.User != "" {
		plain, _ := http.NewRequest("GET", "/", nil) // to encode the name
		plain.SetBasicAuth(cmd.User, "")
		req.Header().Set("Authorization", plain.Header.Get("Authorization"))
	}
	s := &ProcessHandle{sandbox: sandbox, client: c, linger: cmd.Linger, again: again, pty: cmd.Terminal != nil}
	s.ask(req.Header())
	ctx, cancel := context.WithCancel(ctx)
	res, err := c.processes(sandbox).Start(ctx, req)
	if err != nil {
		cancel()
		return nil, c.startError(err)
	}
	return s, s.first(c, started{res, cancel})
}

func pty(s Size) *pb.PTY {
	return &pb.PTY{Size: &pb.PTY_Size{Rows: uint32(s.Rows), Cols: uint32(s.Cols)}}
}

// keepAliveEvery is how often a server shows that it lives. A server that is silent for three times as long counts as gone.
const keepAliveEvery = 20 * time.Second

func (s *ProcessHandle) ask(h http.Header) {
	h.Set("Keepalive-Ping-Interval", strconv.Itoa(int(keepAliveEvery.Seconds())))
	if s.linger > 0 {
		h.Set(LingerHeader, strconv.FormatInt(s.linger.Milliseconds(), 10))
	}
}

// Attach follows an existing process from a byte of its output on, also one that has ended. The process continues without followers.
func (c *Client) Attach(ctx context.Context, sandbox string, p Process, from int64,
	again func(context.Context) (*Client, error)) (*ProcessHandle, error) {
	s := &ProcessHandle{sandbox: sandbox, client: c, again: again, reached: from, pty: p.Terminal}
	s.PID, s.id = p.PID, p.ID
	return s, s.connect(ctx, c)
}

// connect follows the process again, from the byte that was reached.
func (s *ProcessHandle) connect(ctx context.Context, c *Client) error {
	req := asked(s, &pb.ConnectRequest{Process: by(s.PID)})
	s.ask(req.Header())
	s.mu.Lock()
	req.Header().Set(FromHeader, strconv.FormatInt(s.reached, 10))
	s.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	late := time.AfterFunc(attemptTime, cancel)
	defer late.Stop()
	res, err := c.processes(s.sandbox).Connect(ctx, req)
	if err != nil {
		cancel()
		return c.plainError(err)
	}
	return s.first(c, connected{res, cancel})
}

// attemptTime bounds one attempt to reconnect.
const attemptTime = 20 * time.Second

// asked makes a call for this process by its id, because its number may belong to another one by now.
func asked[T any](s *ProcessHandle, msg *T) *connect.Request[T] {
	req := connect.NewRequest(msg)
	if s.id != "" {
		req.Header().Set(ProcessHeader, s.id)
	}
	return req
}

// first reads the first event of a stream.
func (s *ProcessHandle) first(c *Client, in stream) error {
	e, err := in.receive()
	if err != nil {
		_ = in.Close() // it has ended anyway
		return c.startError(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.PID == 0 { // never changes
		s.PID, s.id = int(e.GetStart().GetPid()), in.ResponseHeader().Get(ProcessHeader)
	}
	s.client, s.stream = c, in
	return nil
}

func (c *Client) startError(err error) error {
	var ce *connect.Error
	if errors.As(err, &ce) && connect.IsWireError(err) {
		if status, err := strconv.Atoi(ce.Meta().Get(ExitHeader)); err == nil {
			return &StartError{status, ce.Message()}
		}
	}
	return c.plainError(err)
}

// Follow writes the process's output until the process has ended; a terminal's output goes to stdout. It calls reconnecting, if not nil,
// with true when the connection is lost and with false when it is back.
func (s *ProcessHandle) Follow(ctx context.Context, stdout, stderr io.Writer, reconnecting func(bool)) (Exit, error) {
	for {
		exit, err := s.read(ctx, stdout, stderr)
		var told *Error
		if err == nil || ctx.Err() != nil || errors.As(err, new(writeError)) || errors.As(err, &told) &&
			told.Status != http.StatusBadGateway {
			if err != nil && ctx.Err() != nil {
				err = context.Cause(ctx) // an error that the end of ctx causes says nothing
			}
			return exit, err
		}
		if reconnecting != nil {
			reconnecting(true)
		}
		if err := s.reconnect(ctx, err); err != nil {
			return Exit{}, err
		}
		if reconnecting != nil {
			reconnecting(false)
		}
	}
}

// writeError is an error of the writers that get the output.
type writeError struct{ error }

// Unwrap returns the writer's error.
func (w writeError) Unwrap() error { return w.error }

// read reads one stream until it, or the process, ends.
func (s *ProcessHandle) read(ctx context.Context, stdout, stderr io.Writer) (Exit, error) {
	s.mu.Lock()
	in := s.stream
	s.mu.Unlock()
	silent := time.AfterFunc(3*keepAliveEvery, func() { _ = in.Close() }) // the server is silent: it is gone without notice
	defer silent.Stop()
	stop := context.AfterFunc(ctx, func() { _ = in.Close() })
	defer stop()
	for {
		e, err := in.receive()
		if err != nil {
			return Exit{}, s.current().plainError(err)
		}
		silent.Reset(3 * keepAliveEvery)
		switch e := e.GetEvent().(type) {
		case *pb.ProcessEvent_Data:
			out, to := e.Data.GetStdout(), stdout
			switch e.Data.GetOutput().(type) {
			case *pb.ProcessEvent_DataEvent_Stderr:
				out, to = e.Data.GetStderr(), stderr
			case *pb.ProcessEvent_DataEvent_Pty:
				out = e.Data.GetPty()
			}
			silent.Stop() // the time that a slow writer takes does not count
			if _, err := to.Write(out); err != nil {
				return Exit{}, writeError{err}
			}
			silent.Reset(3 * keepAliveEvery)
			s.mu.Lock()
			s.reached += int64(len(out))
			s.mu.Unlock()
		case *pb.ProcessEvent_End:
			_ = in.Close() // it has ended anyway
			return exitOf(e.End), nil
		}
	}
}

// exitOf reads how a process has ended.
func exitOf(e *pb.ProcessEvent_EndEvent) Exit {
	if e.GetExited() {
		return Exit{Code: int(e.GetExitCode())}
	}
	exit := Exit{Code: 255, Status: e.GetStatus()}
	if text := e.GetError(); text != "" {
		exit.Status = text
	}
	for n := syscall.Signal(1); n < 65; n++ {
		if "signal: "+n.String() == e.GetStatus() {
			exit.Code = 128 + int(n)
		}
	}
	return exit
}

func (s *ProcessHandle) current() *Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.client
}

const (
	firstPause = 50 * time.Millisecond
	lastPause  = 2 * time.Second
	patience   = 2 * time.Minute // with a server that does not come back
)

// ErrPaused ends the following of a process whose sandbox was paused. The process still exists when the sandbox is resumed.
var ErrPaused = errors.New("the sandbox was paused, with the process in it; 'soulbox sandbox resume' resumes it")

// reconnect follows the process again, on whichever server has its sandbox now.
func (s *ProcessHandle) reconnect(ctx context.Context, lost error) error {
	for pause, began := firstPause, time.Now(); ; pause = min(2*pause, lastPause) {
		s.current().Close() // do not reuse a connection that may be dead
		attempt, cancel := context.WithTimeout(ctx, attemptTime)
		c, err := s.again(attempt)
		var box Sandbox
		if err == nil {
			box, err = c.Sandbox(attempt, s.sandbox)
		}
		cancel()
		switch {
		case err != nil:
		case box.State == "killed" || box.State == "failed":
			return &Error{http.StatusNotFound, fmt.Sprintf("sandbox %s has ended: %s", s.sandbox, box.Cause)}
		case box.State == "paused": // reconnecting would wake it
			return ErrPaused
		}
		if err == nil {
			err = s.connect(ctx, c)
		}
		var told *Error
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.As(err, &told) && told.Status < 500 && told.Status != http.StatusTooManyRequests &&
			told.Status != http.StatusConflict: // it was just paused
			return err
		case time.Since(began) > patience:
			return fmt.Errorf("reconnect: the connection was lost (%w) and did not come back within %s: %w", lost, patience, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
