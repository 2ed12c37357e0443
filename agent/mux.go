package agent

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
	"github.com/sourcegraph/jsonrpc2"
)

// muxConfig is yamux without keep-alives: a paused guest answers none, and the host sees the end of the pipe anyway.
func muxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.AcceptBacklog = 512
	c.ConnectionWriteTimeout = 24 * time.Hour // a paused guest reads nothing for as long
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = 5 * time.Minute // of a half-closed dial; everything else is closed by both sides at once
	c.LogOutput = io.Discard
	return c
}

// quiet keeps jsonrpc2 from logging what the other side did wrong: it ends the session, and callers are told.
var quiet = jsonrpc2.SetLogger(log.New(io.Discard, "", 0))

// bufferedConn reads through the reader that has read the handshake, and writes each frame at once.
type bufferedConn struct {
	io.Reader
	io.Closer
	frameWriter
}

func newBufferedConn(r io.Reader, conn io.WriteCloser) *bufferedConn {
	return &bufferedConn{r, conn, frameWriter{w: conn}}
}

// frameWriter joins the head of a frame and its body, which yamux writes one after the other: each write would wake the other side.
type frameWriter struct {
	w   io.Writer
	buf []byte
}

// Write implements io.Writer, for one frame after the other.
func (f *frameWriter) Write(p []byte) (int, error) {
	if len(f.buf) == 0 && len(p) == frameHead && p[1] == frameData && binary.BigEndian.Uint32(p[8:]) > 0 {
		f.buf = append(f.buf, p...)
		return len(p), nil
	}
	if len(f.buf) == 0 {
		return f.w.Write(p)
	}
	f.buf = append(f.buf, p...)
	n, err := f.w.Write(f.buf)
	if f.buf = f.buf[:0]; cap(f.buf) > maxJoined {
		f.buf = nil
	}
	return max(0, n-frameHead), err
}

// maxJoined is how much memory a frameWriter keeps.
const maxJoined = 64 << 10

// As in yamux' specification.
const (
	frameHead = 12
	frameData = 0
	framePing = 2
	flagSYN   = 1
)

// guestFrames reads what a guest sends and ends at the first frame that no honest agent sends: one that opens a stream, and a ping,
// each of which would cost the host a goroutine until the guest reads its answer. Frames are as in yamux' specification.
type guestFrames struct {
	r    io.Reader
	head [frameHead]byte
	have int // bytes of head that were read
	sent int // bytes of head that were passed on
	body uint32
}

// errFrame says that the guest does not keep to the protocol.
var errFrame = errors.New("the guest opened a stream or sent a ping")

// Read implements io.Reader.
func (g *guestFrames) Read(p []byte) (int, error) {
	if g.body > 0 {
		n, err := g.r.Read(p[:min(len(p), int(g.body))])
		g.body -= uint32(n)
		return n, err
	}
	for g.have < len(g.head) {
		n, err := g.r.Read(g.head[g.have:])
		g.have += n
		if err != nil {
			return 0, err
		}
	}
	kind, flags := g.head[1], binary.BigEndian.Uint16(g.head[2:4])
	if kind == framePing || flags&flagSYN != 0 {
		return 0, errFrame
	}
	n := copy(p, g.head[g.sent:])
	if g.sent += n; g.sent == len(g.head) {
		g.have, g.sent = 0, 0
		if kind == frameData {
			g.body = binary.BigEndian.Uint32(g.head[8:])
		}
	}
	return n, nil
}

func writeHello(w io.Writer, h hello) error {
	line, err := json.Marshal(h)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// readHello reads one bounded line.
func readHello(r *bufio.Reader, h *hello) error {
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

// messageStream is a stream of messages for jsonrpc2, with their bound.
type messageStream struct{ conn io.ReadWriteCloser }

// WriteObject implements jsonrpc2.ObjectStream.
func (m messageStream) WriteObject(v any) error { return writeMessage(m.conn, v) }

// ReadObject implements jsonrpc2.ObjectStream.
func (m messageStream) ReadObject(v any) error { return readMessage(m.conn, v) }

// Close implements jsonrpc2.ObjectStream.
func (m messageStream) Close() error { return m.conn.Close() }

func writeFrame(w io.Writer, kind int, offset int64, body []byte) error {
	buf := make([]byte, 13, 13+len(body))
	buf[0] = byte(kind)
	binary.BigEndian.PutUint64(buf[1:], uint64(offset))
	binary.BigEndian.PutUint32(buf[9:], uint32(len(body)))
	_, err := w.Write(append(buf, body...))
	return err
}

func readFrame(r io.Reader) (kind int, offset int64, body []byte, err error) {
	var head [9]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, 0, nil, cutOff(err)
	}
	body, err = readBlock(r, maxChunk)
	return int(head[0]), int64(binary.BigEndian.Uint64(head[1:])), body, cutOff(err)
}

// onceCloser closes once, whoever calls.
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
