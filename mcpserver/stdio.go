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
	"time"

	"github.com/mark3labs/mcp-go/mcp"
)

// maxMessage bounds the bytes of one message.
const maxMessage = 4 << 20

// Stdio serves one client on a pair of pipes.
type Stdio struct {
	Server *Server // required

	drain time.Duration // how long calls may keep running once the client has closed its end; then they are asked to yield
}

// loop is one conversation over pipes.
type loop struct {
	Stdio
	c   *conversation
	out *writer
}

// Serve reads from in until its end or the end of ctx, answers every request, and returns. An invalid message gets an error answer and ends
// nothing. Only a failing pipe is an error.
func (s Stdio) Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	s.drain = cmp.Or(s.drain, 10*time.Second)
	l := &loop{Stdio: s, c: newConversation(context.WithoutCancel(ctx), "", s.Server.parallel), out: &writer{w: out}}
	defer l.c.cancel(gone{"the conversation has ended"})
	defer s.Server.follow(l.c.feed, subscription{by: &l.c.client})()
	// It is not waited for, since a client that does not read may block it; a failing pipe is reported below.
	go func() { _ = l.c.feed.tell(l.c.ctx, l.out, nil) }()

	ended := make(chan error, 1)
	go func() { ended <- l.read(in) }() // a blocked read of stdin ends with the process
	over, stop := context.WithCancel(context.Background())
	defer stop()
	givenUp := l.out.watch(over, in)
	patience := s.drain
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
		patience = 0
	case <-givenUp.Done():
		patience = 0
	}
	l.out.leave()
	if !l.c.drain(patience) {
		s.Server.Log.Warn("calls did not end in time; their answers are lost")
	}
	if werr := l.out.err(); werr != nil {
		return errors.Join(err, fmt.Errorf("write to client: %w", werr))
	}
	return err
}

// read handles one message after the other.
func (l *loop) read(in io.Reader) error {
	r := bufio.NewReaderSize(in, 64<<10)
	for {
		line, tooLong, err := readLine(r, maxMessage)
		if tooLong {
			l.respond(failure(nil, &Error{Code: codeInvalid,
				Message: fmt.Sprintf("the message is longer than %d bytes; send large content in parts", maxMessage)}))
		} else if line = bytes.TrimSpace(line); len(line) > 0 {
			l.handle(line)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read from client: %w", err)
		}
	}
}

// readLine reads a line. A line that is too long is discarded.
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

// inline are the methods answered on the read loop: they are cheap, and the messages after them may depend on them.
var inline = map[string]bool{"initialize": true, "ping": true, "server/discover": true}

// handle starts what a message asks for. It never waits for a call.
func (l *loop) handle(line []byte) {
	m, err := parse(line)
	if err != nil {
		l.respond(failure(nil, malformed(line, err)))
		return
	}
	session := l.c.session(m, l.out)
	switch {
	case m.Method == "notifications/cancelled":
		l.c.cancelCall(m)
	case m.Method == "":
		l.c.answered(m)
	case !m.isRequest(): // mcp-go needs notifications in order
		l.Server.dispatch(l.Server.MCP.WithContext(l.c.ctx, session), session, m, line)
	default:
		f, refusal := l.c.begin(m, len(line), l.Server.pending)
		switch {
		case refusal != nil && l.c.over(): // the conversation is over; what comes now is ignored
		case refusal != nil:
			l.respond(failure(m.ID, refusal))
		case inline[m.Method]:
			l.Server.run(f, session, m, line, l.respond)
		default:
			go l.Server.run(f, session, m, line, l.respond)
		}
	}
}

func (c *conversation) over() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closing
}

// malformed is the error for a line that is not a message.
func malformed(line []byte, err error) *Error {
	code := codeInvalid
	if !json.Valid(line) {
		code = codeParse
	}
	return &Error{Code: code, Message: err.Error()}
}

func (l *loop) respond(response any) {
	err := l.out.write(response)
	if !errors.Is(err, errEncode) {
		return
	}
	l.Server.Log.Error("encode response", "error", err)
	if r, ok := response.(mcp.JSONRPCResponse); ok {
		_ = l.out.write(mcp.JSONRPCError{JSONRPC: r.JSONRPC, ID: r.ID,
			Error: mcp.NewJSONRPCErrorDetails(codeInternal, "the answer could not be encoded", nil)})
	}
}
