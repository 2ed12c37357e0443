package mcpserver

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
)

const (
	writeTime = 30 * time.Second // for one message, to a client that reads slowly
	retryMS   = 500              // after which a client should reconnect to a broken stream

	maxKept        = 256 << 10 // bytes kept of one stream, for a client that reconnects
	maxKeptStreams = 1000      // streams that one conversation keeps after their end
	keptTime       = 5 * time.Minute
)

// event is a message of a stream as sent over the wire.
type event struct {
	seq  int
	data []byte
	note bool
}

// stream is the answer to one HTTP request: a single JSON body if nothing precedes it, else server-sent events. In the revisions with
// sessions a client may leave and come back for what it has missed.
type stream struct {
	id        string
	events    bool          // the client accepts a stream of events
	resumable bool          // events have ids and are kept
	priming   bool          // the first event is empty and only carries an id (2025-11-25)
	allowed   func() bool   // nil, or reports whether the client may still listen; called at each keep-alive
	refused   func()        // called once when it may not
	handle    func() string // nil, or the session's handle, which the client must know
	told      string        // the handle that the client was last given
	opened    func()        // nil, or called when the answer becomes a stream of events
	call      string        // name by which a client that got no answer asks for it again; "" means none
	kept      *atomic.Int64 // nil, or the bytes that all streams of the owner keep
	ended     atomic.Bool

	mu      sync.Mutex
	w       http.ResponseWriter // nil while no client is attached
	away    chan struct{}       // closed when the current client is detached
	isOpen  bool                // the answer is a stream of events
	missed  []event             // kept for a client that comes back
	size    int
	seq     int
	endedAt time.Time
	beats   *time.Timer
	beat    time.Duration
}

// newStream makes the answer to r. If there is no answer after a third of beat, it becomes a stream, so that no client or proxy gives up.
func newStream(w http.ResponseWriter, r *http.Request, beat time.Duration) *stream {
	accept := r.Header.Get("Accept")
	st := &stream{id: randomID()[:16], w: w, beat: beat, away: make(chan struct{})}
	st.events = accept == "" || strings.Contains(accept, "text/event-stream") || strings.Contains(accept, "*/*")
	if st.events {
		st.beats = time.AfterFunc(beat/3, st.keepAlive)
	}
	return st
}

// write implements sender for notifications and questions. The first one makes the answer a stream. A client that accepts no stream misses
// them.
func (st *stream) write(v any) error {
	if !st.events {
		return nil
	}
	line, err := encode(v)
	if err != nil {
		return fmt.Errorf("%w: %w", errEncode, err)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.open()
	return st.send(line, true)
}

// finish writes the answer.
func (st *stream) finish(status int, v any) error {
	body, err := encode(v)
	if err != nil {
		return fmt.Errorf("%w: %w", errEncode, err)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.call != "" && st.events && !st.isOpen { // kept in case the client does not get it
		st.keep(event{seq: 1, data: bytes.TrimSuffix(body, []byte("\n"))})
	}
	st.tellHandle()
	if st.isOpen {
		err = st.send(body, false)
	} else if st.w != nil {
		st.w.Header().Set("Content-Type", "application/json")
		st.deadline()
		st.w.WriteHeader(status)
		_, err = st.w.Write(body)
	}
	st.end()
	return err
}

// end ends the stream: nothing follows. st.mu is held.
func (st *stream) end() {
	st.endedAt = time.Now()
	st.ended.Store(true)
	if st.beats != nil {
		st.beats.Stop()
	}
	st.detach()
}

// detach lets the current client go; nothing more is written to it. st.mu is held.
func (st *stream) detach() {
	if st.w != nil {
		st.w = nil
		close(st.away)
	}
}

// open makes the answer a stream of events. st.mu is held.
func (st *stream) open() {
	if st.isOpen {
		return
	}
	st.tellHandle()
	st.isOpen = true
	if st.opened != nil {
		st.opened()
	}
	st.headers()
	if st.priming {
		st.missed = append(st.missed, event{seq: st.seq})
		// The next write notices a client that is gone.
		_ = st.put(fmt.Appendf(nil, "id: %s-%d\nretry: %d\ndata: \n\n", st.id, st.seq, retryMS))
	}
}

func (st *stream) headers() {
	if st.w == nil {
		return
	}
	h := st.w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-cache, no-transform")
	h.Set("X-Accel-Buffering", "no")
	st.w.WriteHeader(http.StatusOK)
}

// send writes an event to the current client and keeps it for one that comes back. st.mu is held.
func (st *stream) send(line []byte, isNote bool) error {
	st.seq++
	e := event{seq: st.seq, data: bytes.TrimSuffix(line, []byte("\n")), note: isNote}
	if st.resumable {
		st.keep(e)
	}
	return st.put(st.encode(e))
}

// keep adds an event to those kept, and bounds them: the oldest notifications go first, the answer never. st.mu is held.
func (st *stream) keep(e event) {
	if e.note && st.kept != nil && st.kept.Load()+int64(len(e.data)) > maxOwnKept {
		return // the owner keeps too much already; a client that comes back misses this, but never an answer
	}
	st.missed = append(st.missed, e)
	st.grow(len(e.data))
	for len(st.missed) > 1 && st.size > maxKept && st.missed[0].seq != e.seq {
		st.grow(-len(st.missed[0].data))
		st.missed = st.missed[1:]
	}
}

func (st *stream) grow(n int) {
	st.size += n
	if st.kept != nil {
		st.kept.Add(int64(n))
	}
}

// forget drops what is kept.
func (st *stream) forget() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.grow(-st.size)
	st.missed = nil
}

func (st *stream) encode(e event) []byte {
	var b bytes.Buffer
	if st.resumable {
		fmt.Fprintf(&b, "id: %s-%d\n", st.id, e.seq)
	}
	b.WriteString("event: message\ndata: ")
	b.Write(e.data)
	b.WriteString("\n\n")
	return b.Bytes()
}

// put writes to the current client. If that fails, the client is detached, which is no error if the stream can be resumed.
func (st *stream) put(p []byte) error {
	if st.w == nil {
		if st.resumable {
			return nil
		}
		return errGone
	}
	st.deadline()
	_, err := st.w.Write(p)
	if err == nil {
		err = http.NewResponseController(st.w).Flush()
	}
	if err != nil {
		st.detach()
		if st.resumable {
			return nil
		}
	}
	return err
}

var errGone = gone{"the client has gone"}

func (st *stream) deadline() {
	_ = http.NewResponseController(st.w).SetWriteDeadline(time.Now().Add(writeTime)) // only a ResponseWriter of a test has no deadline
}

// keepAlive sends a comment, so that no proxy ends the stream, and checks whether the client may still have the stream.
func (st *stream) keepAlive() {
	st.mu.Lock()
	allowed, refused := st.allowed, st.refused
	st.mu.Unlock()
	if allowed != nil && !allowed() {
		refused()
		return
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended.Load() {
		return
	}
	if st.w != nil {
		st.open()
		_ = st.put([]byte(": keep-alive\n\n")) // put detaches a client that cannot be written to
	}
	st.beats.Reset(st.beat)
}

// wait returns when the current client is answered, detached or gone. Afterwards nothing is written to it.
func (st *stream) wait(ctx context.Context) {
	st.mu.Lock()
	away := st.away
	st.mu.Unlock()
	select {
	case <-away:
	case <-ctx.Done():
		st.mu.Lock()
		defer st.mu.Unlock()
		if st.away == away {
			st.detach()
		}
	}
}

// resume attaches a client that comes back, and sends it what it has missed since the event it names.
func (st *stream) resume(w http.ResponseWriter, since int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.detach() // the old connection may still count as attached
	st.w, st.away, st.isOpen = w, make(chan struct{}), true
	st.headers()
	for _, e := range st.missed {
		if e.seq > since {
			_ = st.put(st.encode(e)) // put detaches a client that cannot be written to
		}
	}
	if st.ended.Load() {
		st.detach()
	}
}

// findCall finds the stream of an earlier call by its name.
func (c *conversation) findCall(call string) *stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, st := range c.streams {
		if call != "" && st.call == call {
			return st
		}
	}
	return nil
}

// forgetStreams drops the streams that ended at least age ago.
func (c *conversation) forgetStreams(age time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var gone []*stream
	c.streams = slices.DeleteFunc(c.streams, func(st *stream) bool {
		old := st.ended.Load() && time.Since(st.endedAt) >= age
		if old {
			gone = append(gone, st)
		}
		return old
	})
	forgetAll(gone)
}

// findStream finds the stream of a Last-Event-ID.
func (c *conversation) findStream(lastEvent string) (st *stream, since int, found bool) {
	id, seq, ok := strings.Cut(lastEvent, "-")
	since, err := strconv.Atoi(seq)
	if !ok || err != nil {
		return nil, 0, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, st := range c.streams {
		if st.id == id {
			return st, since, true
		}
	}
	return nil, 0, false
}

// remember keeps a stream for clients that come back. Of the ended ones only the latest are kept. Lock order: stream.mu, conversation.mu.
func (c *conversation) remember(st *stream) {
	c.mu.Lock()
	over := -maxKeptStreams
	for _, old := range c.streams {
		if old.ended.Load() {
			over++
		}
	}
	var gone []*stream
	c.streams = slices.DeleteFunc(c.streams, func(old *stream) bool {
		if over <= 0 || !old.ended.Load() {
			return false
		}
		over--
		gone = append(gone, old)
		return true
	})
	c.streams = append(c.streams, st)
	c.mu.Unlock()
	forgetAll(gone)
}

// forgetAll drops ended streams. It does so in a goroutine, since the caller may hold the lock of another stream.
func forgetAll(gone []*stream) {
	if len(gone) > 0 {
		go func() {
			for _, st := range gone {
				st.forget()
			}
		}()
	}
}

// Disconnect ends the HTTP response of the current call while the call continues; the client comes back for the answer (SEP-1699). If the
// client cannot do that, Disconnect does nothing.
func (s *Session) Disconnect() {
	st, ok := s.out.(*stream)
	if !ok || !st.resumable || !st.events {
		return
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.open()
	st.detach()
}

// statusOf is the HTTP status of an answer. 2026-07-28 gives classes of errors their own status; earlier revisions always use 200.
func statusOf(m message, response any) int {
	e, failed := response.(mcp.JSONRPCError)
	if !failed || !m.modern() {
		return http.StatusOK
	}
	switch e.Error.Code {
	case codeNoMethod:
		return http.StatusNotFound
	case mcp.HEADER_MISMATCH, codeCapability, mcp.UNSUPPORTED_PROTOCOL_VERSION, codeInvalid, codeParams, codeParse:
		return http.StatusBadRequest
	}
	return http.StatusOK
}
