package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
	"github.com/sourcegraph/jsonrpc2"
)

// Client is the host's end of the pipe to one agent; it acts in one sandbox. All methods are safe for concurrent use. Errors of the guest
// keep their class: errors.Is works with fs.ErrNotExist, syscall errnos and the Err variables of this package. When the pipe ends, calls in
// progress fail with ErrLost. Everything from the guest is treated as hostile; every size is bounded.
type Client struct {
	boot    string
	level   int
	version string
	session *yamux.Session
	windows *windows
	rpc     *jsonrpc2.Conn
	conn    *onceCloser
	lastID  atomic.Uint64
	heard   atomic.Int64 // bytes read from the guest

	mu    sync.Mutex
	cause error // why the session ended, if not because the pipe did

	inFlight inFlight
}

// NewClient does the handshake with the agent at the other end of conn, and owns conn from then on. ctx bounds the handshake only.
func NewClient(ctx context.Context, conn io.ReadWriteCloser, version string) (_ *Client, err error) {
	c := &Client{conn: &onceCloser{ReadWriteCloser: conn}}
	stop := context.AfterFunc(ctx, func() { _ = c.conn.Close() })
	defer func() {
		if !stop() && ctx.Err() != nil {
			err = fmt.Errorf("handshake with agent: %w (%w)", context.Cause(ctx), ErrLost)
		}
		if err != nil {
			_ = c.conn.Close()
		}
	}()
	if err := WriteHello(c.conn, Hello{Protocol: Protocol, Version: version}); err != nil {
		return nil, fmt.Errorf("handshake with agent: %w: %w", err, ErrLost)
	}
	reader := bufio.NewReaderSize(heardReader{c.conn, &c.heard}, MaxHello)
	var guest Hello
	if err := ReadHello(reader, &guest); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrLost)
	}
	if guest.Error != "" || guest.Protocol != Protocol {
		return nil, fmt.Errorf("agent %q speaks protocol %d, this host %q speaks %d: %w", Clip(guest.Version, 40), guest.Protocol, version,
			Protocol, ErrVersion)
	}
	c.boot, c.version, c.level = Clip(guest.Boot, 64), Clip(guest.Version, 40), guest.Level
	mux := NewBufferedConn(nil, c.conn)
	c.windows = newWindows(&mux.frameWriter)
	mux.Reader = &guestFrames{r: reader, windows: c.windows}
	if c.session, err = yamux.Client(mux, MuxConfig()); err != nil {
		return nil, err
	}
	stream, err := c.open(Header{Stream: StreamRPC})
	if err != nil {
		return nil, err
	}
	whole := make(chan struct{}) // closed when c.rpc is set: the guest may call before that
	refuse := func(context.Context, *jsonrpc2.Conn, *jsonrpc2.Request) {
		go func() {
			<-whole
			c.fail(errors.New("the guest called the host")) // which it never does
		}()
	}
	c.rpc = jsonrpc2.NewConn(context.Background(), MessageStream{Conn: stream}, HandlerFunc(refuse), Quiet)
	close(whole)
	go c.refuseStreams()
	go func() {
		<-c.rpc.DisconnectNotify()
		c.fail(errors.New("the control channel has ended"))
	}()
	return c, nil
}

// refuseStreams ends the session when the guest opens a stream, which it never does.
func (c *Client) refuseStreams() {
	if stream, err := c.session.AcceptStream(); err == nil {
		_ = stream.Close()
		c.fail(errors.New("the guest opened a stream"))
		return
	}
	c.fail(nil)
}

func (c *Client) fail(cause error) {
	c.mu.Lock()
	if c.cause == nil {
		c.cause = cause
	}
	c.mu.Unlock()
	_ = c.session.Close()
	_ = c.rpc.Close()
	_ = c.conn.Close()
}

// Close ends the session. The agent and its processes keep running.
func (c *Client) Close() error {
	c.fail(nil)
	return nil
}

// Done is closed when either side has ended the session.
func (c *Client) Done() <-chan struct{} { return c.session.CloseChan() }

// Boot identifies the boot of the agent; it is the same when a host attaches again.
func (c *Client) Boot() string { return c.boot }

// Level is the agent's level, see the constant Level.
func (c *Client) Level() int { return c.level }

// Version is the agent's version.
func (c *Client) Version() string { return c.version }

// lost marks an error as one of the pipe, unless it is the guest's own answer or the end of a context.
func (c *Client) lost(op string, err error) error {
	var remote *Error
	if errors.As(err, &remote) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return fmt.Errorf("%s: %w: %w", op, ErrLost, c.cause)
	}
	return fmt.Errorf("%s: %w: %w", op, ErrLost, err)
}

// Call makes one call. When ctx ends, Call tells the guest and returns without the answer.
func Call[R any](ctx context.Context, c *Client, method string, args any) (result R, err error) {
	if !ownCalls[method] {
		if err := c.inFlight.begin(); err != nil {
			return result, fmt.Errorf("%s: %w", method, err)
		}
		defer c.inFlight.end()
	}
	id := c.lastID.Add(1)
	waiter, err := UntilDone(ctx, func() (jsonrpc2.Waiter, error) {
		return c.rpc.DispatchCall(ctx, method, ForWire(args), jsonrpc2.PickID(jsonrpc2.ID{Num: id}))
	}, nil)
	if errors.Is(err, ErrTooLarge) {
		return result, fmt.Errorf("%s: %w", method, err) // our own request was too large and was not sent
	}
	if err != nil {
		return result, c.streamError(ctx, method, err)
	}
	var raw json.RawMessage
	err = waiter.Wait(ctx, &raw)
	var reply *jsonrpc2.Error
	switch {
	case err == nil:
		if err := decodeAnswer(raw, &result); err != nil {
			var none R
			return none, fmt.Errorf("%s: %w", method, err)
		}
		return result, nil
	case errors.As(err, &reply):
		var e Error
		if reply.Data == nil || Unmarshal(*reply.Data, &e) != nil {
			e = Error{Message: reply.Message}
		}
		if e.Kind == "invalid" && strings.HasPrefix(e.Message, UnknownCall) {
			return result, fmt.Errorf("%s: the sandbox was made by an older version, which does not know this call: %w", method, ErrVersion)
		}
		e.Message = Clip(e.Message, 4000)
		return result, &e
	case ctx.Err() != nil:
		// In the background: only the guest needs to know, and it may not read its pipe.
		go func() { _ = c.rpc.Notify(context.Background(), NoteCancel, map[string]uint64{"id": id}) }()
		return result, context.Cause(ctx)
	}
	return result, c.lost(method, err)
}

// UntilDone waits for do until ctx is done. do cannot or must not be interrupted: it may block for as long as the guest does not read its
// pipe. When ctx ends first, do continues in the background until it returns or the pipe ends, and undo, if not nil, gets its result.
func UntilDone[T any](ctx context.Context, do func() (T, error), undo func(T)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	done := make(chan outcome)
	go func() {
		value, err := do()
		select {
		case done <- outcome{value, err}:
		case <-ctx.Done():
			if err == nil && undo != nil {
				undo(value)
			}
		}
	}()
	select {
	case o := <-done:
		return o.value, o.err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}

// Configure sets the sandbox's environment and limits.
func (c *Client) Configure(ctx context.Context, config Config) error {
	_, err := Call[struct{}](ctx, c, CallConfigure, config)
	return err
}

// Start starts a process and waits up to req.WaitMS for its end; a short command needs only this one round trip.
func (c *Client) Start(ctx context.Context, req StartRequest) (Snapshot, error) {
	if c.level < 2 && req.hasBytes() {
		return Snapshot{}, fmt.Errorf("start: the sandbox was made by an older version, which takes only arguments that are text: %w",
			ErrVersion)
	}
	return Call[Snapshot](ctx, c, CallStart, req)
}

// Wait waits up to req.WaitMS for a process to end. Ending ctx ends the wait, never the process.
func (c *Client) Wait(ctx context.Context, req WaitRequest) (Snapshot, error) {
	return Call[Snapshot](ctx, c, CallWait, req)
}

// Input writes to a process and returns its reply. Ending ctx ends the wait for the reply.
func (c *Client) Input(ctx context.Context, req InputRequest) (InputResult, error) {
	return Call[InputResult](ctx, c, CallInput, req)
}

// Signal sends a signal to a process's group.
func (c *Client) Signal(ctx context.Context, process, signal string) (Process, error) {
	return Call[Process](ctx, c, CallSignal, SignalRequest{Process: process, Signal: signal})
}

// Resize changes the size of a process's terminal. The error of a process without a terminal is ErrNoTerminal.
func (c *Client) Resize(ctx context.Context, req ResizeRequest) (Process, error) {
	return Call[Process](ctx, c, CallResize, req)
}

// Kill ends a process and everything it started.
func (c *Client) Kill(ctx context.Context, process string) (Process, error) {
	return Call[Process](ctx, c, CallKill, WaitRequest{Process: process})
}

// List lists processes, newest first.
func (c *Client) List(ctx context.Context, req ListRequest) ([]Process, error) {
	return Call[[]Process](ctx, c, CallList, req)
}

// Mount mounts something for a build, or unmounts it.
func (c *Client) Mount(ctx context.Context, req MountRequest) (MountResult, error) {
	return Call[MountResult](ctx, c, CallMount, req)
}

// Ping returns when the agent has replied.
func (c *Client) Ping(ctx context.Context) error {
	_, err := Call[struct{}](ctx, c, CallPing, struct{}{})
	return err
}

// Usage returns the resource usage of all user processes and, if since is not nil, the events after that number.
func (c *Client) Usage(ctx context.Context, since *int64) (Usage, error) {
	return Call[Usage](ctx, c, CallUsage, UsageRequest{Since: since})
}

// Shell returns what a shell remembers.
func (c *Client) Shell(ctx context.Context, req ShellRequest) (ShellInfo, error) {
	return Call[ShellInfo](ctx, c, CallShell, req)
}

// WatchTree begins, reads or ends a watch of a tree. The agent keeps its events, so a later host can read them.
func (c *Client) WatchTree(ctx context.Context, req TreeRequest) (TreeResult, error) {
	return Call[TreeResult](ctx, c, CallTree, req)
}

// Stat describes a file, following symlinks.
func (c *Client) Stat(ctx context.Context, path string) (FileInfo, error) {
	return Call[FileInfo](ctx, c, CallStat, PathRequest{Path: path})
}

// Lstat describes a file without following symlinks.
func (c *Client) Lstat(ctx context.Context, path string) (FileInfo, error) {
	return Call[FileInfo](ctx, c, CallStat, PathRequest{Path: path, Links: true})
}

// Environment returns the variables that Configure has given to processes.
func (c *Client) Environment(ctx context.Context) (map[string]string, error) {
	return Call[map[string]string](ctx, c, CallEnv, struct{}{})
}

// User looks up a user.
func (c *Client) User(ctx context.Context, user string) (User, error) {
	return Call[User](ctx, c, CallUser, UserRequest{User: user})
}

// Dir lists a directory.
func (c *Client) Dir(ctx context.Context, req DirRequest) (DirResult, error) {
	return Call[DirResult](ctx, c, CallDir, req)
}

// Mkdir creates a directory and its missing parents; the error is fs.ErrExist if it exists already.
func (c *Client) Mkdir(ctx context.Context, req PathRequest) (FileInfo, error) {
	return Call[FileInfo](ctx, c, CallMkdir, req)
}

// Move renames a file or directory and replaces an existing file at the target.
func (c *Client) Move(ctx context.Context, req MoveRequest) (FileInfo, error) {
	return Call[FileInfo](ctx, c, CallMove, req)
}

// Remove removes a file or, when Recursive, a tree.
func (c *Client) Remove(ctx context.Context, req PathRequest) error {
	_, err := Call[struct{}](ctx, c, CallRemove, req)
	return err
}

// Edit changes a text file in place, atomically.
func (c *Client) Edit(ctx context.Context, req EditRequest) (EditResult, error) {
	return Call[EditResult](ctx, c, CallEdit, req)
}

// Search finds files and lines.
func (c *Client) Search(ctx context.Context, req SearchRequest) (SearchResult, error) {
	return Call[SearchResult](ctx, c, CallSearch, req)
}

// Setattr sets user.* extended attributes; an empty value removes one.
func (c *Client) Setattr(ctx context.Context, req PathRequest) (FileInfo, error) {
	return Call[FileInfo](ctx, c, CallSetattr, req)
}

// open opens a stream and sends its header.
func (c *Client) open(h Header) (*yamux.Stream, error) {
	stream, err := c.session.OpenStream()
	if err != nil {
		return nil, c.lost("open "+h.Stream, err)
	}
	if narrow[h.Stream] {
		err = c.windows.narrow(stream)
	}
	if err = errors.Join(err, WriteMessage(stream, h)); err != nil {
		c.giveUp(stream)
		return nil, c.lost("open "+h.Stream, err)
	}
	return stream, nil
}

// giveUp closes a stream that has no reader.
func (c *Client) giveUp(stream *yamux.Stream) {
	_ = stream.Close()
	c.windows.drop(stream.StreamID())
}

// begin opens a stream that ends with ctx at the latest, and reads the guest's answer. The caller calls end when it is done with the
// stream.
func (c *Client) begin(ctx context.Context, h Header) (narrowStream, Answer, func(), error) {
	stream, a, end, err := c.handshake(ctx, h)
	if err != nil {
		return narrowStream{}, a, nil, err
	}
	stop := context.AfterFunc(ctx, end)
	return stream, a, func() { stop(); end() }, nil
}

// handshake opens a stream and reads the guest's answer; ctx bounds only these two steps.
func (c *Client) handshake(ctx context.Context, h Header) (stream narrowStream, a Answer, end func(), err error) {
	if err := ctx.Err(); err != nil {
		return narrowStream{}, a, nil, context.Cause(ctx)
	}
	if err := c.inFlight.begin(); err != nil {
		return narrowStream{}, a, nil, fmt.Errorf("%s: %w", h.Stream, err)
	}
	leave := sync.OnceFunc(c.inFlight.end)
	defer func() {
		if err != nil || !transfers[h.Stream] {
			leave()
		}
	}()
	opened, err := UntilDone(ctx, func() (*yamux.Stream, error) { return c.open(h) }, c.giveUp)
	if err != nil {
		return narrowStream{}, a, nil, err
	}
	stream = newNarrowStream(opened, nil)
	if narrow[h.Stream] {
		stream.windows = c.windows
	}
	end = sync.OnceFunc(func() {
		leave()
		// The guest sees that our half is closed and closes its own; what it sends until then is dropped with the stream.
		_ = opened.SetReadDeadline(time.Unix(1, 0)) // first, so that a read does not take the guest's close for the regular end
		_ = opened.Close()
		_ = opened.SetDeadline(time.Unix(1, 0))
		if stream.windows != nil {
			stream.letGo()
		}
	})
	defer context.AfterFunc(ctx, end)()
	if err := ReadMessage(stream, &a); err != nil {
		end()
		return narrowStream{}, a, nil, c.streamError(ctx, h.Stream, err)
	}
	if a.Error != nil {
		end()
		return narrowStream{}, a, nil, a.Error
	}
	return stream, a, end, nil
}

func (c *Client) streamError(ctx context.Context, op string, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return c.lost(op, err)
}
