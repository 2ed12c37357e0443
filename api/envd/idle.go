package envd

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"
)

// Idle ends the connection of a request on which nothing moves for a long time. It is safe for concurrent use while the request is served.
type Idle struct {
	c     *http.ResponseController
	limit time.Duration

	mu    sync.Mutex
	last  time.Time
	ended bool // by Cut or Over: later moves do not belong to this request
}

// NewIdle makes an Idle that waits for the first move.
func NewIdle(w http.ResponseWriter, limit time.Duration) *Idle {
	return &Idle{c: http.NewResponseController(w), limit: limit}
}

// Moves says that something has moved.
func (i *Idle) Moves() { i.move() }

// move is Moves, and reports whether the request is still served.
func (i *Idle) move() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if now := time.Now(); !i.ended && now.Sub(i.last) > time.Second {
		i.last = now
		i.until(now.Add(i.limit))
	}
	return !i.ended
}

// Cut ends the connection now, whatever moves later.
func (i *Idle) Cut() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.ended {
		i.ended = true
		i.until(time.Unix(1, 0))
	}
}

// Over removes the deadlines, for the next request on the connection. If a write has failed before, net/http does not use the connection
// again.
func (i *Idle) Over() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.ended = true
	i.until(time.Time{})
}

func (i *Idle) until(t time.Time) {
	_ = errors.Join(i.c.SetReadDeadline(t), i.c.SetWriteDeadline(t)) // without deadlines the request continues unbounded
}

// Waits keeps the connection open during a wait of any length, until over is called.
func (i *Idle) Waits() (over func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var next func()
	next = func() {
		if ctx.Err() == nil && i.move() {
			time.AfterFunc(i.limit/2, next)
		}
	}
	timer := time.AfterFunc(i.limit/2, next)
	return func() { cancel(); timer.Stop() }
}

// Reader returns a reader on which every read counts as a move.
func (i *Idle) Reader(r io.Reader) io.Reader { return movingReader{r, i} }

type movingReader struct {
	io.Reader
	idle *Idle
}

// Read implements io.Reader.
func (m movingReader) Read(p []byte) (int, error) {
	m.idle.Moves()
	return m.Reader.Read(p)
}

// writer returns a response on which every write counts as a move.
func (i *Idle) writer(w http.ResponseWriter) http.ResponseWriter { return movingWriter{w, i} }

type movingWriter struct {
	http.ResponseWriter
	idle *Idle
}

// Write implements io.Writer.
func (m movingWriter) Write(p []byte) (int, error) {
	m.idle.Moves()
	return m.ResponseWriter.Write(p)
}
