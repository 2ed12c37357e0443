package mcpserver

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// ErrCancelled is the cause of a call's context when the client has cancelled it: what the call began is to be undone.
var ErrCancelled = errors.New("cancelled by the client")

// gone is the cause of a call's context when its client is leaving: the call is to return what it has, and undo nothing.
type gone struct{ text string }

func (g gone) Error() string { return g.text }

// Yield tells a handler to return what it has.
func (gone) Yield() bool { return true }

// Stdio serves one client on a pair of pipes; zero values mean the documented defaults.
type Stdio struct {
	Server   *server.MCPServer // required
	Log      *slog.Logger      // default discards
	MaxLine  int               // bytes of one message; default 4 MiB
	Parallel int               // calls that run at once; more wait; default 64
	Pending  int               // calls that run or wait; more are refused; default 4096
	// Drain is how long calls may still run once the client has closed its end; then they are asked to yield. Default 10 s.
	Drain time.Duration
}

// maxHeld bounds the bytes of all requests in flight.
const maxHeld = 64 << 20

// yieldTime is how long calls have to yield before their answers are given up.
const yieldTime = 3 * time.Second

// loop is one conversation.
type loop struct {
	Stdio
	session *Session
	out     *writer
	slots   chan struct{}
	calls   sync.WaitGroup

	mu       sync.Mutex
	inflight map[string]context.CancelCauseFunc
	held     int // bytes of the requests in flight
	closing  bool
}

// Serve reads from in until its end or the end of ctx, answers everything it was asked, and returns. A message that is not
// valid gets an error answer and ends nothing. Only a failing pipe is an error.
func (s Stdio) Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	s.MaxLine, s.Parallel, s.Pending = cmp.Or(s.MaxLine, 4<<20), cmp.Or(s.Parallel, 64), cmp.Or(s.Pending, 4096)
	s.Drain = cmp.Or(s.Drain, 10*time.Second)
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	w := &writer{w: out}
	l := &loop{Stdio: s, out: w, session: newSession(w), slots: make(chan struct{}, s.Parallel), inflight: map[string]context.CancelCauseFunc{}}
	callCtx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(gone{"the conversation has ended"})
	if err := s.Server.RegisterSession(callCtx, l.session); err != nil {
		return err
	}
	defer s.Server.UnregisterSession(callCtx, l.session.SessionID())
	callCtx = s.Server.WithContext(callCtx, l.session)

	stopNotes := make(chan struct{})
	go l.forwardNotes(stopNotes) // not waited for: a client that does not read may hold it
	defer close(stopNotes)

	ended := make(chan error, 1)
	go func() { ended <- l.read(callCtx, in) }() // a blocked read of stdin ends with the process
	drain := s.Drain
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
		drain = 0
	}
	l.drain(cancel, drain)
	if werr := w.err(); werr != nil {
		return errors.Join(err, fmt.Errorf("write to client: %w", werr))
	}
	return err
}

// drain waits for the calls in flight.
func (l *loop) drain(cancel context.CancelCauseFunc, patience time.Duration) {
	l.mu.Lock()
	l.closing = true // from here on no call is added
	l.mu.Unlock()
	done := make(chan struct{})
	go func() { l.calls.Wait(); close(done) }()
	for _, step := range []time.Duration{patience, yieldTime} {
		timer := time.NewTimer(step)
		select {
		case <-done:
			timer.Stop()
			return
		case <-timer.C:
			cancel(gone{"the client has gone"})
		}
	}
	l.Log.Warn("calls did not end in time; their answers are lost")
}

// forwardNotes writes mcp-go's own notes.
func (l *loop) forwardNotes(stop <-chan struct{}) {
	for {
		select {
		case note := <-l.session.notes:
			if err := l.out.write(note); err != nil {
				return
			}
		case <-stop:
			return
		}
	}
}

// read handles message after message.
func (l *loop) read(ctx context.Context, in io.Reader) error {
	r := bufio.NewReaderSize(in, 64<<10)
	for {
		line, tooLong, err := readLine(r, l.MaxLine)
		if tooLong {
			l.answer(failure(nil, codeInvalid, fmt.Sprintf("the message is longer than %d bytes; send large content in parts", l.MaxLine)))
		} else if line = bytes.TrimSpace(line); len(line) > 0 {
			l.handle(ctx, line)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read from client: %w", err)
		}
	}
}

// readLine reads a line; of one that is too long it keeps nothing.
func readLine(r *bufio.Reader, limit int) (line []byte, tooLong bool, err error) {
	for {
		part, err := r.ReadSlice('\n')
		if tooLong = tooLong || len(line)+len(part) > limit; tooLong {
			line = nil
		} else {
			line = append(line, part...)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, tooLong, err
		}
	}
}

func (l *loop) answer(v any) {
	if err := l.out.write(v); err != nil && errors.Is(err, errEncode) {
		l.Log.Error("answer", "error", err)
	}
}

// inline are the methods that are answered on the read loop: they are cheap, and what follows them may depend on them.
var inline = map[string]bool{"initialize": true, "ping": true, "server/discover": true}

// handle starts what a message asks for; it never waits for a call.
func (l *loop) handle(ctx context.Context, line []byte) {
	m, err := parse(line)
	switch {
	case err != nil:
		code := codeInvalid
		if !json.Valid(line) {
			code = codeParse
		}
		l.answer(failure(nil, code, err.Error()))
	case m.Method == "notifications/cancelled":
		l.cancel(m)
	case !m.isRequest():
		// A note, or an answer to a question of ours. mcp-go wants notes in their order.
		l.call(ctx, m, line)
	case inline[m.Method]:
		l.respond(m, l.call(ctx, m, line))
	default:
		l.start(ctx, m, line)
	}
}

// start runs a request in a goroutine of its own.
func (l *loop) start(ctx context.Context, m message, line []byte) {
	ctx, cancel := context.WithCancelCause(ctx)
	l.mu.Lock()
	_, reused := l.inflight[m.key()]
	full := len(l.inflight) >= l.Pending || l.held+len(line) > maxHeld
	if l.closing {
		l.mu.Unlock()
		cancel(nil)
		return // the conversation is over: nothing that comes now is read
	}
	if !reused && !full {
		l.calls.Add(1)
		l.inflight[m.key()] = cancel
		l.held += len(line)
	}
	l.mu.Unlock()
	if reused || full {
		cancel(nil)
		if reused {
			l.answer(failure(m.ID, codeInvalid, "a request with this id is still in flight"))
		} else {
			l.answer(failure(m.ID, codeBusy, "too many calls are in flight already; wait for some of them"))
		}
		return
	}
	go func() {
		defer l.calls.Done()
		defer cancel(nil)
		var response any
		select {
		case l.slots <- struct{}{}:
			// A call that is cancelled gives its slot back at once, however long its handler takes to notice.
			free := sync.OnceFunc(func() { <-l.slots })
			defer free()
			defer context.AfterFunc(ctx, free)()
		case <-ctx.Done():
		}
		if ctx.Err() == nil {
			response = l.call(ctx, m, line)
		} else { // it was cancelled while it waited: never begun
			response = failure(m.ID, codeBusy, "the server is ending; the call was not begun")
		}
		// From here on a cancellation comes too late; before, it forbids the answer.
		l.mu.Lock()
		delete(l.inflight, m.key())
		l.held -= len(line)
		l.mu.Unlock()
		if !errors.Is(context.Cause(ctx), ErrCancelled) {
			l.respond(m, response)
		}
	}()
}

// cancel cancels a request in flight. One that is not known has ended already, which is no error.
func (l *loop) cancel(m message) {
	var params struct {
		RequestID json.RawMessage `json:"requestId"`
	}
	if json.Unmarshal(m.Params, &params) != nil {
		return
	}
	l.mu.Lock()
	cancel := l.inflight[string(params.RequestID)]
	l.mu.Unlock()
	if cancel != nil {
		cancel(ErrCancelled)
	}
}

// call lets mcp-go handle a request. A panic is one failed request, not the end of the server.
func (l *loop) call(ctx context.Context, m message, line []byte) (response any) {
	defer func() {
		if r := recover(); r != nil {
			l.Log.Error("panic in a handler", "method", m.Method, "panic", r, "stack", string(debug.Stack()))
			response = failure(m.ID, codeInternal, "internal error; the server's log tells more")
		}
	}()
	return l.Server.HandleMessage(ctx, line)
}

// respond writes a response with the id as the client wrote it: mcp-go turns numbers into floats.
func (l *loop) respond(m message, response any) {
	id := mcp.NewRequestId(m.ID)
	switch r := response.(type) {
	case nil:
		return
	case mcp.JSONRPCResponse:
		r.ID = id
		response = r
	case mcp.JSONRPCError:
		r.ID = id
		response = r
	}
	if err := l.out.write(response); errors.Is(err, errEncode) {
		l.Log.Error("encode response", "method", m.Method, "error", err)
		l.answer(failure(m.ID, codeInternal, "the answer could not be encoded"))
	}
}
