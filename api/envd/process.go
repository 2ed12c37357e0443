package envd

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/api/client"
	pb "soulbox.dev/soulbox/api/envd/spec/process"
)

const (
	keepAlive    = 90 * time.Second // if the client names no other interval
	minKeepAlive = time.Second
	maxKeepAlive = 300              // seconds: less than idleTime
	endedKept    = 30 * time.Second // how long the end of a process can still be asked for
	waitPart     = time.Hour        // of a wait without an end of its own
)

// processes implements the service process.Process.
type processes struct{ *Server }

// Start implements processconnect.ProcessHandler. The process does not depend on the stream, but it is killed at the deadline of the call.
func (s processes) Start(ctx context.Context, req *connect.Request[pb.StartRequest], stream *connect.ServerStream[pb.StartResponse]) error {
	p := scopeOf(ctx)
	start, err := p.startRequest(ctx, req)
	if err != nil {
		return err
	}
	began, err := p.start(ctx, start, lingerOf(req.Header()) > 0)
	if err != nil {
		return startError(err, req.Msg.GetProcess(), start.User)
	}
	f := feed{scope: p, id: began.Process.ID, terminal: start.Terminal != nil, every: interval(req.Header()),
		send: func(e *pb.ProcessEvent) error { return stream.Send(&pb.StartResponse{Event: e}) }}
	gone := s.leases.follow(p, began.Process.ID, req.Header())
	stream.ResponseHeader().Set(client.ProcessHeader, began.Process.ID)
	err = f.run(ctx, began.Process, 0)
	gone(err)
	return err
}

// start starts a process. ctx does not cancel the start, because it would be unknown whether the process was started. hangs says that the
// process ends with its followers: if the caller has gone meanwhile, the process is killed, because no client knows of it.
func (p *scope) start(ctx context.Context, req agent.StartRequest, hangs bool) (agent.Snapshot, error) {
	begin := func() (agent.Snapshot, error) { return p.client.Start(context.WithoutCancel(ctx), req) }
	if !hangs {
		return agent.UntilDone(ctx, begin, nil)
	}
	return agent.UntilDone(ctx, begin, func(began agent.Snapshot) {
		ending, cancel := context.WithTimeout(context.Background(), killTime)
		defer cancel()
		_, _ = p.client.Kill(ending, began.Process.ID) // it may have ended already
	})
}

// startRequest translates a client's request into the agent's.
func (p *scope) startRequest(ctx context.Context, req *connect.Request[pb.StartRequest]) (agent.StartRequest, error) {
	config := req.Msg.GetProcess()
	if config.GetCmd() == "" {
		return agent.StartRequest{}, errorf(connect.CodeInvalidArgument, "no command is given")
	}
	who, err := user(req.Header())
	if err != nil {
		return agent.StartRequest{}, err
	}
	start := agent.StartRequest{Hold: true, Args: append([]string{config.GetCmd()}, config.GetArgs()...), Env: config.GetEnvs(), User: who,
		Tag:       req.Msg.GetTag(),
		KeepStdin: req.Msg.Stdin == nil || req.Msg.GetStdin()}
	for i, arg := range start.Args {
		start.Args[i] = p.decodeName(arg)
	}
	if config.GetCwd() != "" {
		if start.Cwd, err = p.absolute(ctx, p.decodeName(config.GetCwd()), who); err != nil {
			return start, err
		}
	}
	if size := req.Msg.GetPty(); size != nil {
		start.Terminal = &agent.Terminal{Rows: int(min(size.GetSize().GetRows(), 1<<15)), Cols: int(min(size.GetSize().GetCols(), 1<<15))}
	}
	if deadline, ok := ctx.Deadline(); ok {
		start.TimeoutMS = max(1, time.Until(deadline).Milliseconds())
	}
	return start, nil
}

// startError returns the error in the words that clients know.
func startError(err error, config *pb.ProcessConfig, who string) error {
	switch {
	case errors.Is(err, agent.ErrNoUser):
		return errorf(connect.CodeUnauthenticated, "invalid username: '%s'", who)
	case errors.Is(err, agent.ErrCwd):
		return errorf(connect.CodeInvalidArgument, "cwd '%s' does not exist", config.GetCwd())
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOEXEC), errors.Is(err, syscall.EISDIR):
		told := errorf(connect.CodeInvalidArgument, "the program %q cannot be started: %w", config.GetCmd(), err)
		status := "126" // as in shells (POSIX, 2.8.2)
		if errors.Is(err, fs.ErrNotExist) {
			status = "127"
		}
		told.Meta().Set(client.ExitHeader, status)
		return told
	}
	return err
}

// Connect implements processconnect.ProcessHandler. It sends the output from now on, or from an offset if the client sends one; with an
// offset it also finds processes that ended long ago.
func (s processes) Connect(ctx context.Context, req *connect.Request[pb.ConnectRequest],
	stream *connect.ServerStream[pb.ConnectResponse]) error {
	p := scopeOf(ctx)
	kept, from, late := endedKept, int64(-1), true
	if text := req.Header().Get(client.FromHeader); text != "" {
		var err error
		if from, err = strconv.ParseInt(text, 10, 64); err != nil || from < 0 {
			return errorf(connect.CodeInvalidArgument, "%s is a number of bytes, not %.40q", client.FromHeader, text)
		}
		kept, late = math.MaxInt64, false
	}
	process, err := p.findProcess(ctx, req.Msg.GetProcess(), kept)
	if err != nil {
		return err
	}
	if late {
		from = process.Output
	}
	f := feed{scope: p, id: process.ID, terminal: process.Terminal != nil, late: late, every: interval(req.Header()),
		send: func(e *pb.ProcessEvent) error { return stream.Send(&pb.ConnectResponse{Event: e}) }}
	gone := s.leases.follow(p, process.ID, req.Header())
	stream.ResponseHeader().Set(client.ProcessHeader, process.ID)
	err = f.run(ctx, process, from)
	gone(err)
	return err
}

// interval returns how often a client wants a sign that the stream lives.
func interval(h http.Header) time.Duration {
	n, err := strconv.Atoi(h.Get("Keepalive-Ping-Interval"))
	if err != nil || n <= 0 || n > maxKeepAlive {
		return keepAlive
	}
	return max(time.Duration(n)*time.Second, minKeepAlive)
}

// feed sends a client the events of a process.
type feed struct {
	scope    *scope
	id       string
	terminal bool
	late     bool // output before the first frame may be missing; only Follow's goroutine uses it
	every    time.Duration

	mu   sync.Mutex // of send
	send func(*pb.ProcessEvent) error
	last atomic.Int64 // when something was sent, in Unix nanoseconds

	reached atomic.Int64 // offset of the output that was sent
	end     atomic.Int64 // offset at which the process ended; -1 before
}

var errOver = errors.New("all is told")

// run sends all events until the end of the process. It does not wait for what the process's children write after that.
func (f *feed) run(ctx context.Context, p agent.Process, from int64) error {
	if err := f.tell(&pb.ProcessEvent{Event: &pb.ProcessEvent_Start{Start: &pb.ProcessEvent_StartEvent{Pid: uint32(p.PID)}}}); err != nil {
		return err
	}
	f.end.Store(-1)
	f.reached.Store(from)
	telling, stop := context.WithCancelCause(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer stop(nil)
	followed := make(chan error, 1)
	all.Go(func() {
		err := f.scope.client.Follow(telling, f.id, from, f.frame)
		if err != nil {
			stop(err) // await stops too
		}
		followed <- err
	})
	all.Go(func() { f.keepAlive(telling, stop) })
	ended, err := f.await(telling)
	if err != nil {
		return err
	}
	if f.end.Store(ended.Output); f.reached.Load() < ended.Output {
		if err := <-followed; err != nil && !errors.Is(err, errOver) {
			return err
		}
	}
	if ended.Cause == agent.CauseTimeout {
		return errorf(connect.CodeDeadlineExceeded, "the command took longer than its timeout and was killed")
	}
	return f.tell(&pb.ProcessEvent{Event: &pb.ProcessEvent_End{End: endOf(ended)}})
}

// await waits for the end of the process.
func (f *feed) await(ctx context.Context) (agent.Process, error) {
	for {
		s, err := f.scope.client.Wait(ctx, agent.WaitRequest{Process: f.id, WaitMS: waitPart.Milliseconds()})
		if err != nil || s.Process.State != agent.StateRunning {
			return s.Process, err
		}
	}
}

func (f *feed) tell(e *pb.ProcessEvent) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last.Store(time.Now().UnixNano())
	f.scope.idle.Moves()
	return f.send(e)
}

// frame sends some output.
func (f *feed) frame(o agent.OutputFrame) error {
	if o.End != nil {
		return nil
	}
	if gap := o.Offset - f.reached.Load(); gap > 0 && !f.late {
		return errorf(connect.CodeDataLoss, "%d bytes of its output were lost: it was written faster than it could be kept", gap)
	}
	data := &pb.ProcessEvent_DataEvent{}
	switch {
	case f.terminal:
		data.Output = &pb.ProcessEvent_DataEvent_Pty{Pty: o.Data}
	case o.Stream == "stderr":
		data.Output = &pb.ProcessEvent_DataEvent_Stderr{Stderr: o.Data}
	default:
		data.Output = &pb.ProcessEvent_DataEvent_Stdout{Stdout: o.Data}
	}
	if err := f.tell(&pb.ProcessEvent{Event: &pb.ProcessEvent_Data{Data: data}}); err != nil {
		return err
	}
	f.late = false
	f.reached.Store(o.Offset + int64(len(o.Data)))
	if end := f.end.Load(); end >= 0 && f.reached.Load() >= end {
		return errOver
	}
	return nil
}

// keepAlive sends a sign of life after a silence, so that no proxy takes the stream for dead.
func (f *feed) keepAlive(ctx context.Context, stop context.CancelCauseFunc) {
	timer := time.NewTimer(f.every)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		due := time.Unix(0, f.last.Load()).Add(f.every)
		if wait := time.Until(due); wait > 0 {
			timer.Reset(wait)
			continue
		}
		if err := f.tell(&pb.ProcessEvent{Event: &pb.ProcessEvent_Keepalive{Keepalive: &pb.ProcessEvent_KeepAlive{}}}); err != nil {
			stop(err)
			return
		}
		timer.Reset(f.every)
	}
}

// endOf describes the end of a process in the words of Go's os.ProcessState.
func endOf(p agent.Process) *pb.ProcessEvent_EndEvent {
	e := &pb.ProcessEvent_EndEvent{ExitCode: int32(p.ExitCode), Exited: true, Status: "exit status " + strconv.Itoa(p.ExitCode)}
	if p.Signal != "" {
		e.ExitCode, e.Exited, e.Status = -1, false, "signal: "+signalText(p.Signal)
	}
	if e.ExitCode != 0 {
		text := e.Status
		if p.Cause == agent.CauseOOM {
			text += ": the sandbox had no memory left, and this was its largest process"
		}
		e.Error = &text
	}
	return e
}

func signalText(name string) string {
	if n := unix.SignalNum(name); n != 0 {
		return syscall.Signal(n).String()
	}
	return name
}

// findProcess finds the process that a client selects: one that runs, or one that ended at most ended ago.
func (p *scope) findProcess(ctx context.Context, s *pb.ProcessSelector, ended time.Duration) (agent.Process, error) {
	list, err := p.client.List(ctx, agent.ListRequest{Tag: s.GetTag()})
	if err != nil {
		return agent.Process{}, err
	}
	var what string
	switch s.GetSelector().(type) {
	case *pb.ProcessSelector_Pid:
		what = "pid " + strconv.FormatUint(uint64(s.GetPid()), 10)
		list = slices.DeleteFunc(list, func(q agent.Process) bool { return uint32(q.PID) != s.GetPid() })
	case *pb.ProcessSelector_Tag:
		what = "tag " + strconv.Quote(s.GetTag())
		list = slices.DeleteFunc(list, func(q agent.Process) bool { return q.Tag != s.GetTag() })
	default:
		return agent.Process{}, errorf(connect.CodeInvalidArgument, "name a process by its pid or tag")
	}
	list = slices.DeleteFunc(list, func(q agent.Process) bool {
		return p.process != "" && q.ID != p.process || q.State != agent.StateRunning && (ended == 0 || time.Since(q.Ended) > ended)
	})
	if len(list) == 0 {
		return agent.Process{}, errorf(connect.CodeNotFound, "process with %s not found", what)
	}
	// A number may be reused: prefer the process that runs, otherwise the last one.
	return slices.MinFunc(list, func(a, b agent.Process) int {
		return cmp.Or(cmp.Compare(b.State, a.State), b.Started.Compare(a.Started))
	}), nil
}

// List implements processconnect.ProcessHandler.
func (processes) List(ctx context.Context, _ *connect.Request[pb.ListRequest]) (*connect.Response[pb.ListResponse], error) {
	list, err := scopeOf(ctx).client.List(ctx, agent.ListRequest{State: agent.StateRunning})
	if err != nil {
		return nil, err
	}
	out := &pb.ListResponse{}
	for _, q := range list {
		cwd := valid(q.Cwd)
		config := &pb.ProcessConfig{Cwd: &cwd, Envs: map[string]string{}}
		if len(q.Args) > 0 {
			config.Cmd, config.Args = valid(q.Args[0]), validAll(q.Args[1:])
		} else {
			config.Cmd, config.Args = "/bin/bash", []string{"-c", valid(q.Command)}
		}
		info := &pb.ProcessInfo{Config: config, Pid: uint32(q.PID)}
		if q.Tag != "" {
			info.Tag = &q.Tag
		}
		out.Processes = append(out.Processes, info)
	}
	return connect.NewResponse(out), nil
}

// valid makes a guest's text valid UTF-8, which protocol buffers require.
func valid(text string) string { return strings.ToValidUTF8(text, "\uFFFD") }

func validAll(texts []string) []string {
	out := make([]string, len(texts))
	for i, t := range texts {
		out[i] = valid(t)
	}
	return out
}

// Update implements processconnect.ProcessHandler.
func (processes) Update(ctx context.Context, req *connect.Request[pb.UpdateRequest]) (*connect.Response[pb.UpdateResponse], error) {
	p := scopeOf(ctx)
	process, err := p.findProcess(ctx, req.Msg.GetProcess(), 0)
	if err != nil {
		return nil, err
	}
	if size := req.Msg.GetPty().GetSize(); size != nil {
		_, err = p.client.Resize(ctx, agent.ResizeRequest{Process: process.ID,
			Terminal: agent.Terminal{Rows: int(min(size.GetRows(), 1<<15)), Cols: int(min(size.GetCols(), 1<<15))}})
	}
	return connect.NewResponse(&pb.UpdateResponse{}), err
}

// SendInput implements processconnect.ProcessHandler.
func (processes) SendInput(ctx context.Context, req *connect.Request[pb.SendInputRequest]) (*connect.Response[pb.SendInputResponse],
	error) {
	p := scopeOf(ctx)
	process, err := p.findProcess(ctx, req.Msg.GetProcess(), 0)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.SendInputResponse{}), p.write(ctx, process, req.Msg.GetInput())
}

// write writes to a process.
func (p *scope) write(ctx context.Context, process agent.Process, input *pb.ProcessInput) error {
	text := input.GetStdin()
	switch input.GetInput().(type) {
	case *pb.ProcessInput_Pty:
		if text = input.GetPty(); process.Terminal == nil {
			return errorf(connect.CodeFailedPrecondition, "process %d has no terminal: write to its stdin", process.PID)
		}
	case *pb.ProcessInput_Stdin:
	default:
		return errorf(connect.CodeInvalidArgument, "there is no input: give stdin or pty")
	}
	defer p.idle.Waits()() // a process may not read for a long time
	_, err := p.client.WriteStdin(ctx, process.ID, text, false)
	return err
}

// StreamInput implements processconnect.ProcessHandler.
func (processes) StreamInput(ctx context.Context,
	stream *connect.ClientStream[pb.StreamInputRequest]) (*connect.Response[pb.StreamInputResponse], error) {
	p := scopeOf(ctx)
	var process agent.Process
	for stream.Receive() {
		p.idle.Moves()
		var err error
		switch e := stream.Msg().GetEvent().(type) {
		case *pb.StreamInputRequest_Start:
			process, err = p.findProcess(ctx, e.Start.GetProcess(), 0)
		case *pb.StreamInputRequest_Data:
			if process.ID == "" {
				return nil, errorf(connect.CodeInvalidArgument, "the first message must say which process is written to")
			}
			err = p.write(ctx, process, e.Data.GetInput())
		}
		if err != nil {
			return nil, err
		}
	}
	return connect.NewResponse(&pb.StreamInputResponse{}), stream.Err()
}

// SendSignal implements processconnect.ProcessHandler. SIGKILL ends everything that the process has started. E2B defines two signals by
// their numbers; this server takes every signal's number.
func (processes) SendSignal(ctx context.Context, req *connect.Request[pb.SendSignalRequest]) (*connect.Response[pb.SendSignalResponse],
	error) {
	p := scopeOf(ctx)
	process, err := p.findProcess(ctx, req.Msg.GetProcess(), 0)
	if err != nil {
		return nil, err
	}
	name := unix.SignalName(syscall.Signal(req.Msg.GetSignal()))
	switch {
	case req.Msg.GetSignal() == pb.Signal_SIGNAL_SIGKILL:
		_, err = p.client.Kill(ctx, process.ID)
	case name == "":
		err = errorf(connect.CodeInvalidArgument, "there is no signal %d", req.Msg.GetSignal())
	default:
		_, err = p.client.Signal(ctx, process.ID, name)
	}
	return connect.NewResponse(&pb.SendSignalResponse{}), err
}

// CloseStdin implements processconnect.ProcessHandler.
func (processes) CloseStdin(ctx context.Context, req *connect.Request[pb.CloseStdinRequest]) (*connect.Response[pb.CloseStdinResponse],
	error) {
	p := scopeOf(ctx)
	process, err := p.findProcess(ctx, req.Msg.GetProcess(), 0)
	if err != nil {
		return nil, err
	}
	if process.Terminal != nil {
		return nil, errorf(connect.CodeFailedPrecondition, "a terminal has no stdin that could be closed: send Ctrl+D, which is byte 4")
	}
	_, err = p.client.WriteStdin(ctx, process.ID, nil, true)
	return connect.NewResponse(&pb.CloseStdinResponse{}), err
}
