package agent

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
	"github.com/sourcegraph/jsonrpc2"
)

// MuxConfig returns the configuration of yamux, without keep-alives: a paused guest answers none, and the host sees the end of the pipe
// anyway.
func MuxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.AcceptBacklog = 512
	c.ConnectionWriteTimeout = 24 * time.Hour // a paused guest reads nothing for that long
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = closeTimeout
	c.LogOutput = io.Discard
	return c
}

// closeTimeout applies to a half-closed dial; both sides close all other streams at once.
const closeTimeout = 5 * time.Minute

// Quiet keeps jsonrpc2 from logging the other side's protocol errors: they end the session, and callers get an error.
var Quiet = jsonrpc2.SetLogger(log.New(io.Discard, "", 0))

// bufferedConn reads through the reader that has read the handshake, and writes each frame in one piece.
type bufferedConn struct {
	io.Reader
	io.Closer
	frameWriter
}

// NewBufferedConn returns a connection for yamux that reads from r, and writes to and closes conn.
func NewBufferedConn(r io.Reader, conn io.WriteCloser) *bufferedConn {
	return &bufferedConn{r, conn, frameWriter{w: conn}}
}

// frameWriter joins the head of a frame with its body, which yamux writes separately: each write would wake the other side. It drops
// yamux's window updates for the streams that windows manages.
type frameWriter struct {
	w       io.Writer
	buf     []byte   // for yamux's writes only
	windows *windows // nil manages no windows

	mu sync.Mutex // held while a frame is written
}

// Write implements io.Writer for yamux, which writes a frame with a body in two parts.
func (f *frameWriter) Write(p []byte) (int, error) {
	if len(f.buf) == 0 && len(p) == frameHead {
		switch p[1] {
		case frameData:
			if binary.BigEndian.Uint32(p[8:]) > 0 {
				f.buf = append(f.buf, p...)
				return len(p), nil
			}
		case frameWindow:
			if f.windows != nil && f.windows.keep(binary.BigEndian.Uint32(p[4:])) {
				if binary.BigEndian.Uint16(p[2:]) == 0 {
					return len(p), nil
				}
				p = append(slices.Clone(p[:8]), 0, 0, 0, 0) // keep only its flags
			}
		}
	}
	if len(f.buf) == 0 {
		return f.whole(p)
	}
	f.buf = append(f.buf, p...)
	n, err := f.whole(f.buf)
	if f.buf = f.buf[:0]; cap(f.buf) > maxJoined {
		f.buf = nil
	}
	return max(0, n-frameHead), err
}

// whole writes a complete frame.
func (f *frameWriter) whole(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.w.Write(p)
}

// maxJoined is how much memory a frameWriter keeps between frames.
const maxJoined = 64 << 10

// Constants of yamux's specification.
const (
	frameHead   = 12
	frameData   = 0
	frameWindow = 1
	framePing   = 2
	flagSYN     = 1
	flagFIN     = 4
	flagRST     = 8
)

// guestFrames reads the frames that a guest sends, in the format of yamux's specification. It fails at the first frame that no honest agent
// sends: a frame that opens a stream, or a ping. Each of these would cost the host a goroutine until the guest reads the reply. It skips
// the data that windows wants dropped.
type guestFrames struct {
	r       io.Reader
	windows *windows // nil manages no windows
	head    [frameHead]byte
	have    int // bytes of head that were read
	sent    int // bytes of head that were passed on
	body    uint32
	unread  int64 // bytes of a dropped body that are still to be read
}

// errFrame means that the guest violates the protocol.
var errFrame = errors.New("the guest opened a stream or sent a ping")

// Read implements io.Reader.
func (g *guestFrames) Read(p []byte) (int, error) {
	if g.body > 0 {
		n, err := g.r.Read(p[:min(len(p), int(g.body))])
		g.body -= uint32(n)
		return n, err
	}
	for g.unread > 0 {
		n, err := g.r.Read(p[:min(int64(len(p)), g.unread)])
		if g.unread -= int64(n); err != nil {
			return 0, err
		}
	}
	if g.have < len(g.head) {
		for g.have < len(g.head) {
			n, err := g.r.Read(g.head[g.have:])
			g.have += n
			if err != nil {
				return 0, err
			}
		}
		if err := g.look(); err != nil {
			return 0, err
		}
	}
	kind := g.head[1]
	n := copy(p, g.head[g.sent:])
	if g.sent += n; g.sent == len(g.head) {
		g.have, g.sent = 0, 0
		if kind == frameData {
			g.body = binary.BigEndian.Uint32(g.head[8:])
		}
	}
	return n, nil
}

// look checks a frame by its head.
func (g *guestFrames) look() error {
	kind, flags, id := g.head[1], binary.BigEndian.Uint16(g.head[2:4]), binary.BigEndian.Uint32(g.head[4:8])
	if kind == framePing || flags&flagSYN != 0 {
		return errFrame
	}
	if g.windows == nil {
		return nil
	}
	if kind == frameData {
		n := binary.BigEndian.Uint32(g.head[8:])
		drop, err := g.windows.comes(id, int64(n))
		if err != nil {
			return err
		}
		if drop {
			g.unread = int64(n)
			clear(g.head[8:])
		}
	}
	if flags&(flagFIN|flagRST) != 0 {
		g.windows.ended(id)
	}
	return nil
}

// WriteHello writes h as one line.
func WriteHello(w io.Writer, h Hello) error {
	line, err := json.Marshal(h)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// ReadHello reads one bounded line.
func ReadHello(r *bufio.Reader, h *Hello) error {
	line, err := r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return fmt.Errorf("handshake line: %w", ErrTooLarge)
	}
	if err != nil {
		return fmt.Errorf("handshake: %w", cutOff(err))
	}
	if err := json.Unmarshal(line, h); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	return nil
}

// MessageStream is a stream of size-bounded messages for jsonrpc2.
type MessageStream struct{ Conn io.ReadWriteCloser }

// WriteObject implements jsonrpc2.ObjectStream.
func (m MessageStream) WriteObject(v any) error { return WriteMessage(m.Conn, v) }

// ReadObject implements jsonrpc2.ObjectStream.
func (m MessageStream) ReadObject(v any) error { return ReadMessage(m.Conn, v) }

// Close implements jsonrpc2.ObjectStream.
func (m MessageStream) Close() error { return m.Conn.Close() }

// ReadFrame reads one frame of an output stream.
func ReadFrame(r io.Reader) (kind int, offset int64, body []byte, err error) {
	var head [9]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, 0, nil, cutOff(err)
	}
	body, err = readBlock(r, maxChunk)
	return int(head[0]), int64(binary.BigEndian.Uint64(head[1:])), body, cutOff(err)
}

// onceCloser closes its stream once, however often Close is called.
type onceCloser struct {
	io.ReadWriteCloser
	once sync.Once
	err  error
}

// Close implements io.Closer.
func (c *onceCloser) Close() error {
	c.once.Do(func() { c.err = c.ReadWriteCloser.Close() })
	return c.err
}

// HandlerFunc makes a function a jsonrpc2.Handler.
type HandlerFunc func(context.Context, *jsonrpc2.Conn, *jsonrpc2.Request)

// Handle implements jsonrpc2.Handler.
func (f HandlerFunc) Handle(ctx context.Context, c *jsonrpc2.Conn, r *jsonrpc2.Request) { f(ctx, c, r) }
