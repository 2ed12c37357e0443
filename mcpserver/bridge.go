package mcpserver

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"soulbox.dev/soulbox/internal/loopback"
)

// Bridge lets a client that only knows stdio use a server over HTTP. Each call is carried out once: if it had not reached the server when
// the connection broke, it is sent again; if it had, its answer is asked for again under its call id, which our server remembers. If the
// server no longer knows the session, a new one is begun. Zero values mean the documented defaults.
type Bridge struct {
	URL    string       // of the endpoint; required
	Key    string       // sent as bearer token; "" sends none
	NewKey string       // says how to get and set a key, in the error of a refused request; "" says nothing
	Log    *slog.Logger // default discards

	patience time.Duration // how long to wait for a server that is away
}

// headerCall names a call, so that a client whose connection broke gets the answer instead of calling twice.
const headerCall = "Soulbox-Call"

// bridge is one conversation.
type bridge struct {
	Bridge
	http *http.Client
	out  *writer
	ctx  context.Context // ends with the conversation
	// leaving ends, through last, when the client sends no more. From then on a server that is away is no longer waited for.
	leaving context.Context
	last    context.CancelFunc
	work    sync.WaitGroup
	// shown is the URL without possible secrets.
	shown string
	notes chan func() // notifications still to be sent, in order

	mu       sync.Mutex
	session  string
	version  string // the revision that initialize has agreed on
	hello    []byte // the client's initialize
	kept     string // the handle: what another session may continue with
	ready    bool   // the client has said that it is initialized
	dedupes  bool   // the server remembers calls by their names
	watched  map[string]bool
	listened bool // the stream of the server's own messages was opened at least once
	inflight map[string]context.CancelFunc
	tools    map[string]*mcp.Tool // nil: not requested yet

	renewing sync.Mutex // held while a new session is begun
}

// Serve passes messages on until in or ctx ends. Only a broken pipe is an error.
func (b Bridge) Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	b.patience = cmp.Or(b.patience, 45*time.Second) // clients give up after a minute, and would not learn why
	if b.Log == nil {
		b.Log = slog.New(slog.DiscardHandler)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 64
	transport.Proxy, transport.DialContext = loopback.Proxy, loopback.Dial(&net.Dialer{Timeout: dialTime, KeepAlive: dialTime})
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request,
		[]*http.Request) error {
		return http.ErrUseLastResponse
	}}
	l := &bridge{Bridge: b, http: client, shown: withoutSecrets(b.URL), notes: make(chan func(), maxNotes), out: &writer{w: out}, ctx: ctx,
		watched: map[string]bool{}, inflight: map[string]context.CancelFunc{}}
	l.leaving, l.last = context.WithCancel(ctx)
	defer l.last()
	go l.sendNotes() // ends with ctx
	ended := make(chan error, 1)
	go func() { ended <- l.read(in) }() // a blocked read of stdin ends with the process
	over, stop := context.WithCancel(context.Background())
	defer stop()
	givenUp := l.out.watch(over, in)
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
	case <-givenUp.Done():
	}
	l.out.leave()
	l.end(cancel, givenUp)
	if werr := l.out.err(); werr != nil {
		return errors.Join(err, fmt.Errorf("write to client: %w", werr))
	}
	return err
}

// dialTime is how long a connection to the server may take, and how often a silent one is asked.
const dialTime = 30 * time.Second

// maxNotes bounds the notifications that wait for a server that is away; more are dropped.
const maxNotes = 1000

// sendNotes sends messages that need no answer, in order.
func (l *bridge) sendNotes() {
	for {
		select {
		case send := <-l.notes:
			send()
		case <-l.ctx.Done():
			return
		}
	}
}

// end lets calls in flight finish, and ends the session at the server. Calls that wait for a server that is away get an error.
func (l *bridge) end(cancel context.CancelFunc, givenUp context.Context) {
	l.last()
	done := make(chan struct{})
	go func() { l.work.Wait(); close(done) }()
	select {
	case <-done:
	case <-givenUp.Done():
	case <-time.After(10 * time.Second):
	}
	session := l.current()
	if session != "" {
		ctx, stop := context.WithTimeout(context.WithoutCancel(l.ctx), yieldTime)
		if r, err := l.request(ctx, http.MethodDelete, nil, message{}); err == nil {
			if res, err := l.do(r); err == nil {
				_ = res.Body.Close() // a session that is not ended here expires
			}
		}
		stop()
	}
	cancel()
	if givenUp.Err() == nil { // calls that have not ended get an error
		select {
		case <-done:
		case <-givenUp.Done():
		case <-time.After(time.Second):
		}
	}
}

func (l *bridge) read(in io.Reader) error {
	r := bufio.NewReaderSize(in, 64<<10)
	for {
		line, tooLong, err := readLine(r, maxMessage)
		if tooLong {
			l.fail(nil, codeInvalid, fmt.Sprintf("the message is longer than %d bytes; send large content in parts", maxMessage))
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

func (l *bridge) fail(id json.RawMessage, code int, text string) {
	_ = l.out.write(failure(id, &Error{Code: code, Message: text})) // a broken pipe is reported when the bridge ends
}

// handle passes a message on. Notifications, answers and the handshake keep their order; calls run concurrently.
func (l *bridge) handle(line []byte) {
	m, err := parse(line)
	if err != nil {
		l.fail(nil, malformed(line, err).Code, err.Error())
		return
	}
	if !m.isRequest() {
		l.note(m, line)
		return
	}
	ctx, cancel := context.WithCancel(l.ctx)
	l.mu.Lock()
	l.inflight[m.key()] = cancel
	switch m.Method {
	case "initialize":
		l.hello = line
	case methodSubscribe, methodUnsubscribe:
		l.watched[m.head.URI] = m.Method == methodSubscribe
	}
	l.mu.Unlock()
	call := func() {
		defer cancel()
		l.call(ctx, m, line)
		l.mu.Lock()
		delete(l.inflight, m.key())
		l.mu.Unlock()
	}
	if inline[m.Method] {
		call()
	} else {
		l.work.Go(call)
	}
}

// note sends a message that needs no answer. A cancellation also ends our own waiting; in 2026-07-28 nothing else is needed.
func (l *bridge) note(m message, line []byte) {
	if m.Method == "notifications/cancelled" {
		var params struct {
			RequestID json.RawMessage `json:"requestId"`
		}
		_ = json.Unmarshal(m.Params, &params) // one that names no request cancels nothing
		l.mu.Lock()
		cancel := l.inflight[string(params.RequestID)]
		stateless := l.session == ""
		l.mu.Unlock()
		if cancel != nil {
			defer cancel()
		}
		if stateless {
			return
		}
	}
	select {
	case l.notes <- func() { l.send(m, line) }:
	default:
		l.Log.Warn("the server is away; a notification is dropped", "method", m.Method)
	}
}

// noteTries is how often a notification, or an answer to the server's question, is sent to a server that is away.
const noteTries = 8

// send sends a message that needs no answer.
func (l *bridge) send(m message, line []byte) {
	for try := range noteTries {
		ctx, cancel := context.WithTimeout(l.ctx, readTime)
		r, err := l.request(ctx, http.MethodPost, line, m)
		if err == nil {
			var res *http.Response
			if res, err = l.do(r); err == nil {
				_ = res.Body.Close() // the body does not matter
				if res.StatusCode >= http.StatusInternalServerError || res.StatusCode == http.StatusTooManyRequests {
					err = errors.New(res.Status)
				}
			}
		}
		cancel()
		if err == nil {
			break
		}
		l.Log.Warn("send note", "method", m.Method, "error", withoutURL(err))
		if backoff(l.ctx, try) != nil {
			return
		}
	}
	if m.Method == "notifications/initialized" {
		l.mu.Lock()
		first := !l.ready && l.session != ""
		l.ready = true
		l.mu.Unlock()
		if first {
			go l.listen() // ends with the conversation
		}
	}
}

// call carries one request to its answer, over as many connections as that takes. A tool is called once: a call that may have reached a
// server which no longer knows it is not sent again.
func (l *bridge) call(ctx context.Context, m message, line []byte) {
	id, lastEvent, sent := randomID(), "", false
	patience := l.patience
	if m.Method == "initialize" {
		patience = min(patience, helloTime)
	}
	deadline := time.Now().Add(patience)
	first := l.current()
	for try := 0; ; try++ {
		only := "" // the only session that may be asked again
		if sent && m.tool() != "" {
			only = first
		}
		p := l.attempt(ctx, m, line, id, lastEvent, only)
		over := l.ctx.Err() != nil // the conversation is over, and so is this call
		if p.answered || ctx.Err() != nil && !over {
			return
		}
		if p.progress {
			deadline, try = time.Now().Add(patience), 0
		}
		sent = sent || p.sent
		if lastEvent = cmp.Or(p.lastEvent, lastEvent); p.forgotten {
			lastEvent = "" // a request that calls no tool is sent again
		}
		if sent && m.tool() != "" && (p.forgotten || lastEvent == "" && !l.remembers(m)) {
			p.final = unknownOutcome
		}
		if p.final != "" || over || time.Now().After(deadline) || l.leaving.Err() != nil && p.away {
			missing := "the server at " + l.shown + " is not there; try again later"
			if sent && m.tool() != "" {
				missing = unknownOutcome
			}
			l.fail(m.ID, codeInternal, cmp.Or(p.final, missing))
			return
		}
		l.Log.Debug("try again", "method", m.Method, "try", try, "why", p.why)
		if !p.atOnce && l.pause(ctx, try) != nil {
			return
		}
	}
}

// pause waits before the next attempt, but not beyond the moment the client leaves.
func (l *bridge) pause(ctx context.Context, try int) error {
	if l.leaving.Err() != nil {
		return backoff(ctx, try)
	}
	wait, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(l.leaving, stop)()
	_ = backoff(wait, try) // if cut short, the next attempt is the last one to a server that is away
	return ctx.Err()
}

// unknownOutcome is the error for a call whose outcome is unknown.
const unknownOutcome = "the connection to the server broke in the middle of the call, which may have been carried out; look, with " +
	"process_list or file_read, before you call it again"

// current is the id of the current session.
func (l *bridge) current() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.session
}

// helloTime bounds the handshake: clients give up on a server that does not answer it.
const helloTime = 8 * time.Second

// remembers reports whether the server keeps the answer of a call for a client that asks for it again.
func (l *bridge) remembers(m message) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dedupes && !m.modern()
}

// part is the result of one attempt.
type part struct {
	answered  bool
	progress  bool   // something arrived
	lastEvent string // id of the last event that arrived
	final     string // the error, if no further attempt can help
	atOnce    bool   // the next attempt need not wait
	sent      bool   // the server may have begun the call
	forgotten bool   // the server no longer knows the session, or the stream
	away      bool   // no server answered
	why       string
}

func (l *bridge) attempt(ctx context.Context, m message, line []byte, id, lastEvent, only string) part {
	method, body := http.MethodPost, line
	if lastEvent != "" {
		method, body = http.MethodGet, nil
	}
	r, err := l.request(ctx, method, body, m)
	if err != nil {
		return part{final: err.Error()}
	}
	if only != "" && r.Header.Get(mcp.HeaderSessionID) != only { // a new session was begun meanwhile
		return part{final: unknownOutcome}
	}
	if lastEvent != "" {
		r.Header.Set(mcp.HeaderLastEventID, lastEvent)
	} else if r.Header.Get(mcp.HeaderSessionID) != "" {
		r.Header.Set(headerCall, id)
	}
	if m.modern() && m.tool() != "" {
		for k, v := range mcp.GenerateParamHeaders(l.tool(ctx, m), m.Params) {
			r.Header.Set(k, v)
		}
	}
	res, err := l.do(r)
	if err != nil {
		if errors.Is(err, errDowngrade) {
			return part{final: err.Error()}
		}
		var untrusted *tls.CertificateVerificationError
		if errors.As(err, &untrusted) {
			return part{final: fmt.Sprintf("the certificate of %s is not trusted: %v; name a file with its authority by SSL_CERT_FILE",
				l.shown,
				untrusted.Err)}
		}
		var dial *net.OpError
		return part{why: withoutURL(err).Error(), sent: !errors.As(err, &dial) || dial.Op != "dial", away: true}
	}
	defer res.Body.Close()
	return l.receive(ctx, res, m)
}

// receive reads the response to a request.
func (l *bridge) receive(ctx context.Context, res *http.Response, m message) part {
	l.keepHandle(res.Header.Get(headerHandle))
	switch res.StatusCode {
	case http.StatusNotFound:
		if s := res.Request.Header.Get(mcp.HeaderSessionID); s != "" {
			if err := l.renew(ctx, s); err != nil {
				return part{why: withoutURL(err).Error(), forgotten: true, away: true}
			}
			return part{why: "a new session was begun", atOnce: true, forgotten: true}
		}
	case http.StatusTooManyRequests,
		http.StatusServiceUnavailable: // not begun, if the server itself says so and not something in front of it
		body, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
		var refusal struct {
			Error *Error `json:"error"`
		}
		ours := err == nil && json.Unmarshal(body, &refusal) == nil && refusal.Error != nil && refusal.Error.Code == codeBusy
		return part{why: res.Status, sent: !ours}
	case http.StatusBadGateway, http.StatusGatewayTimeout:
		return part{why: res.Status, sent: true, away: true}
	case http.StatusUnauthorized:
		return part{final: strings.TrimSuffix("the server does not accept this key: "+l.NewKey, ": ")}
	case http.StatusBadRequest:
		if res.Request.Header.Get(mcp.HeaderLastEventID) != "" {
			return part{why: "the stream is no longer kept", forgotten: true, sent: true}
		}
	}
	if strings.HasPrefix(res.Header.Get("Content-Type"), "text/event-stream") {
		return l.events(res.Body, m)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, 64<<20))
	if err != nil {
		return part{why: err.Error(), sent: true}
	}
	var line bytes.Buffer
	if json.Compact(&line, body) != nil || line.Len() == 0 {
		return part{final: "the server at " + l.shown + " answered " + res.Status + ", which is not MCP"}
	}
	got, err := parse(line.Bytes())
	switch {
	case err != nil || got.Method != "":
		return part{final: "the server at " + l.shown + " answered " + res.Status + ", which is not MCP"}
	case got.key() != m.key(): // refused before it was read
		if got.Error == nil {
			return part{final: "the server at " + l.shown + " answered another request"}
		}
		_ = l.out.write(failure(m.ID, got.Error)) // a broken pipe is reported when the bridge ends
		return part{answered: true}
	}
	if m.Method == "initialize" {
		l.begun(res.Header, body)
	}
	_ = l.out.write(json.RawMessage(line.Bytes())) // a broken pipe is reported when the bridge ends
	return part{answered: true}
}

// events passes a stream's messages on, up to the answer.
func (l *bridge) events(body io.Reader, m message) (p part) {
	err := readEvents(body, l.keepHandle, func(id string, data []byte) error {
		p.progress = true
		p.lastEvent = cmp.Or(id, p.lastEvent)
		if len(data) == 0 {
			return nil
		}
		_ = l.out.write(json.RawMessage(data)) // a broken pipe is reported when the bridge ends
		got, err := parse(data)
		p.answered = p.answered || err == nil && got.Method == "" && got.key() == m.key()
		return nil
	})
	if p.why = "the stream ended"; err != nil {
		p.why = err.Error()
	}
	p.sent = true
	return p
}
