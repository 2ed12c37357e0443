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
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
)

// Bridge lets a client that only knows stdio use a server over HTTP. A call is carried out once: what had not reached the server when the
// connection broke is sent again, and what had is asked for again under its call id, which our server remembers. A session that the server
// no longer knows is begun anew. Zero values mean the documented defaults.
type Bridge struct {
	URL      string        // of the endpoint; required
	Key      string        // sent as bearer token; "" sends none
	Log      *slog.Logger  // default discards
	Patience time.Duration // how long a server that is away is waited for; default 2 min
	MaxLine  int           // bytes of one message; default 4 MiB
}

// headerCall names a call, so that a client whose connection broke gets its answer instead of calling twice.
const headerCall = "Soulbox-Call"

// bridge is one conversation.
type bridge struct {
	Bridge
	http *http.Client
	out  *writer
	ctx  context.Context // ends with the conversation
	work sync.WaitGroup
	// shown is the URL without what may be secret in it.
	shown string
	notes chan func() // that are still to be sent, in their order

	mu       sync.Mutex
	session  string
	version  string // the revision that initialize has settled
	hello    []byte // the client's initialize
	ready    bool   // it has said that it is initialized
	dedupes  bool   // the server remembers calls by their names
	watched  map[string]bool
	listened bool // to what the server says beside answers, once or more often
	inflight map[string]context.CancelFunc
	tools    map[string]*mcp.Tool // nil: not asked for yet

	renewing sync.Mutex // held while a session is begun anew
}

// Serve passes messages on until in ends or ctx does. Only a failing pipe is an error.
func (b Bridge) Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	b.MaxLine, b.Patience = cmp.Or(b.MaxLine, 4<<20), cmp.Or(b.Patience, 2*time.Minute)
	if b.Log == nil {
		b.Log = slog.New(slog.DiscardHandler)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 64
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	l := &bridge{Bridge: b, http: client, shown: withoutSecrets(b.URL), notes: make(chan func(), maxNotes), out: &writer{w: out}, ctx: ctx, watched: map[string]bool{}, inflight: map[string]context.CancelFunc{}}
	go l.sendNotes() // ends with ctx
	ended := make(chan error, 1)
	go func() { ended <- l.read(in) }() // a blocked read of stdin ends with the process
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
	}
	l.end(cancel)
	if werr := l.out.err(); werr != nil {
		return errors.Join(err, fmt.Errorf("write to client: %w", werr))
	}
	return err
}

// maxNotes bounds the notes that wait for a server that is away; more are dropped.
const maxNotes = 1000

// withoutSecrets is a URL that can be shown to anybody.
func withoutSecrets(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "its address"
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// sendNotes sends what wants no answer, in its order.
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

// maxRedirects is how many redirects one request follows.
const maxRedirects = 5

// do sends a request and follows redirects: the message stays a message (Go would make a GET of it), the key is not shown to another
// server, and nothing goes over plain HTTP that was to go over TLS.
func (l *bridge) do(r *http.Request) (*http.Response, error) {
	for range maxRedirects {
		res, err := l.http.Do(r)
		if err != nil {
			return nil, err
		}
		switch res.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			return res, nil
		}
		to, err := res.Location()
		_ = res.Body.Close() // it says nothing
		if err != nil {
			return nil, fmt.Errorf("redirect: %w", err)
		}
		if r.URL.Scheme == "https" && to.Scheme != "https" {
			return nil, errDowngrade
		}
		next := r.Clone(r.Context())
		next.URL, next.Host = to, ""
		if to.Host != r.URL.Host || to.Scheme != r.URL.Scheme {
			next.Header.Del("Authorization")
			next.Header.Del(mcp.HeaderSessionID)
		}
		if r.GetBody != nil {
			if next.Body, err = r.GetBody(); err != nil {
				return nil, err
			}
		}
		r = next
	}
	return nil, errors.New("the server redirects without end")
}

var errDowngrade = errors.New("the server redirects from https to http, which is not followed")

// end lets calls in flight finish, and takes leave of the server.
func (l *bridge) end(cancel context.CancelFunc) {
	done := make(chan struct{})
	go func() { l.work.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
	}
	l.mu.Lock()
	session := l.session
	l.mu.Unlock()
	if session != "" {
		ctx, stop := context.WithTimeout(context.WithoutCancel(l.ctx), yieldTime)
		if r, err := l.request(ctx, http.MethodDelete, nil, message{}); err == nil {
			if res, err := l.do(r); err == nil {
				_ = res.Body.Close() // a session that is not taken leave of ends by itself
			}
		}
		stop()
	}
	cancel()
}

func (l *bridge) read(in io.Reader) error {
	r := bufio.NewReaderSize(in, 64<<10)
	for {
		line, tooLong, err := readLine(r, l.MaxLine)
		if tooLong {
			l.fail(nil, codeInvalid, fmt.Sprintf("the message is longer than %d bytes; send large content in parts", l.MaxLine))
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
	_ = l.out.write(failure(id, &Error{Code: code, Message: text})) // a failing pipe shows at the end
}

// handle passes a message on. Notes, answers and the handshake keep their order; calls run beside each other.
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

// note sends what wants no answer. A cancellation also ends our own waiting; in 2026-07-28 that is all it takes.
func (l *bridge) note(m message, line []byte) {
	if m.Method == "notifications/cancelled" {
		var params struct {
			RequestID json.RawMessage `json:"requestId"`
		}
		_ = json.Unmarshal(m.Params, &params) // one that names nothing cancels nothing
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
		l.Log.Warn("the server is away; a note is dropped", "method", m.Method)
	}
}

// noteTries is how often a note, or an answer to the server's question, is sent to a server that is away.
const noteTries = 8

// send sends what wants no answer.
func (l *bridge) send(m message, line []byte) {
	for try := range noteTries {
		ctx, cancel := context.WithTimeout(l.ctx, readTime)
		r, err := l.request(ctx, http.MethodPost, line, m)
		if err == nil {
			var res *http.Response
			if res, err = l.do(r); err == nil {
				_ = res.Body.Close() // it says nothing
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

// withoutURL is an error of a request without its URL, which may hold secrets.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// request makes an HTTP request of a message.
func (l *bridge) request(ctx context.Context, method string, body []byte, m message) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, method, l.URL, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "application/json, text/event-stream")
	if method == http.MethodPost {
		r.Header.Set("Content-Type", "application/json")
	}
	if l.Key != "" {
		r.Header.Set("Authorization", "Bearer "+l.Key)
	}
	if m.modern() {
		r.Header.Set(mcp.HeaderProtocolVersion, m.head.Meta.Version)
		for k, v := range mcp.StandardHeaders(m.head.Meta.Version, mcp.MCPMethod(m.Method), m.Params) {
			r.Header.Set(k, v)
		}
		if m.head.TaskID != "" {
			r.Header.Set(mcp.HeaderName, m.head.TaskID)
		}
		return r, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.session != "" && m.Method != "initialize" {
		r.Header.Set(mcp.HeaderSessionID, l.session)
		if l.version != "" {
			r.Header.Set(mcp.HeaderProtocolVersion, l.version)
		}
	}
	return r, nil
}

// backoff waits longer each time, and never as long as others do.
func backoff(ctx context.Context, try int) error {
	d := min(50*time.Millisecond<<min(try, 7), 5*time.Second)
	timer := time.NewTimer(d/2 + rand.N(d))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// call carries one request to its answer, over as many connections as that takes. A tool is called once: what may have reached a server
// that does not know the call any more is not sent again.
func (l *bridge) call(ctx context.Context, m message, line []byte) {
	id, lastEvent, sent := randomID(), "", false
	patience := l.Patience
	if m.Method == "initialize" {
		patience = min(patience, helloTime)
	}
	deadline := time.Now().Add(patience)
	first := l.current()
	for try := 0; ; try++ {
		only := "" // the session that may be asked again
		if sent && m.tool() != "" {
			only = first
		}
		p := l.attempt(ctx, m, line, id, lastEvent, only)
		if p.answered || ctx.Err() != nil {
			return
		}
		if p.progress {
			deadline, try = time.Now().Add(patience), 0
		}
		sent = sent || p.sent
		if lastEvent = cmp.Or(p.lastEvent, lastEvent); p.forgotten {
			lastEvent = "" // what is not a tool's is asked anew
		}
		if sent && m.tool() != "" && (p.forgotten || lastEvent == "" && !l.remembers(m)) {
			p.final = unknownOutcome
		}
		if p.final != "" || time.Now().After(deadline) {
			missing := "the server at " + l.shown + " is not there; try again later"
			if sent && m.tool() != "" {
				missing = unknownOutcome
			}
			l.fail(m.ID, codeInternal, cmp.Or(p.final, missing))
			return
		}
		l.Log.Debug("try again", "method", m.Method, "try", try, "why", p.why)
		if !p.atOnce && backoff(ctx, try) != nil {
			return
		}
	}
}

// unknownOutcome is told of a call of which nobody knows what became.
const unknownOutcome = "the connection to the server broke in the middle of the call, which may have been carried out; look, with process_list or file_read, before you call it again"

// current is the session at hand.
func (l *bridge) current() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.session
}

// helloTime is how long the handshake may take: clients give up on a server that does not answer it.
const helloTime = 8 * time.Second

// remembers says whether the server keeps the answer of a call for a client that asks for it again.
func (l *bridge) remembers(m message) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dedupes && !m.modern()
}

// part is what came of one attempt.
type part struct {
	answered  bool
	progress  bool   // something came
	lastEvent string // id of the last event that came
	final     string // no further attempt can help
	atOnce    bool   // the next attempt need not wait
	sent      bool   // the server may have begun the call
	forgotten bool   // the server does not know the session, or the stream, any more
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
	if only != "" && r.Header.Get(mcp.HeaderSessionID) != only { // begun anew meanwhile
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
		var dial *net.OpError
		return part{why: withoutURL(err).Error(), sent: !errors.As(err, &dial) || dial.Op != "dial"}
	}
	defer res.Body.Close()
	return l.receive(ctx, res, m)
}

// receive reads what comes back for a request.
func (l *bridge) receive(ctx context.Context, res *http.Response, m message) part {
	switch res.StatusCode {
	case http.StatusNotFound:
		if s := res.Request.Header.Get(mcp.HeaderSessionID); s != "" {
			if err := l.renew(ctx, s); err != nil {
				return part{why: withoutURL(err).Error(), forgotten: true}
			}
			return part{why: "the session was begun anew", atOnce: true, forgotten: true}
		}
	case http.StatusTooManyRequests, http.StatusServiceUnavailable: // not begun, if it is the server that says so and not something before it
		body, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
		var refusal struct {
			Error *Error `json:"error"`
		}
		ours := err == nil && json.Unmarshal(body, &refusal) == nil && refusal.Error != nil && refusal.Error.Code == codeBusy
		return part{why: res.Status, sent: !ours}
	case http.StatusBadGateway, http.StatusGatewayTimeout:
		return part{why: res.Status, sent: true}
	case http.StatusUnauthorized:
		return part{final: "the server does not take this key: set SOULBOX_KEY, or --key-file, to one that 'soulbox-mcp key create' made there"}
	case http.StatusBadRequest:
		if res.Request.Header.Get(mcp.HeaderLastEventID) != "" {
			return part{why: "the stream is not kept any more", forgotten: true, sent: true}
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
		return part{final: "the server at " + l.shown + " answered " + res.Status + ", which is no MCP"}
	}
	got, err := parse(line.Bytes())
	switch {
	case err != nil || got.Method != "":
		return part{final: "the server at " + l.shown + " answered " + res.Status + ", which is no MCP"}
	case got.key() != m.key(): // refused before it was read
		if got.Error == nil {
			return part{final: "the server at " + l.shown + " answered another request"}
		}
		_ = l.out.write(failure(m.ID, got.Error)) // a failing pipe shows at the end
		return part{answered: true}
	}
	if m.Method == "initialize" {
		l.begun(res.Header, body)
	}
	_ = l.out.write(json.RawMessage(line.Bytes())) // a failing pipe shows at the end
	return part{answered: true}
}

// begun notes the session that initialize has begun.
func (l *bridge) begun(header http.Header, body []byte) {
	var answer struct {
		Result struct {
			Version string `json:"protocolVersion"`
		} `json:"result"`
	}
	_ = json.Unmarshal(body, &answer) // an error begins nothing
	l.mu.Lock()
	defer l.mu.Unlock()
	l.session, l.version, l.dedupes = header.Get(mcp.HeaderSessionID), answer.Result.Version, header.Get(headerCall) != ""
}

// events passes a stream's messages on, up to the answer.
func (l *bridge) events(body io.Reader, m message) (p part) {
	err := readEvents(body, func(id string, data []byte) error {
		p.progress = true
		p.lastEvent = cmp.Or(id, p.lastEvent)
		if len(data) == 0 {
			return nil
		}
		_ = l.out.write(json.RawMessage(data)) // a failing pipe shows at the end
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

// readEvents reads a stream of server-sent events (HTML living standard, 9.2.6), as far as MCP uses them.
func readEvents(body io.Reader, each func(id string, data []byte) error) error {
	r := bufio.NewReaderSize(body, 64<<10)
	id, data := "", []byte(nil)
	for {
		line, tooLong, err := readLine(r, 64<<20)
		if tooLong {
			return errors.New("an event is longer than 64 MiB")
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		line = bytes.TrimRight(line, "\r\n")
		switch {
		case len(line) == 0:
			if id != "" || data != nil {
				if err := each(id, data); err != nil {
					return err
				}
			}
			id, data = "", nil
		case bytes.HasPrefix(line, []byte("id:")):
			id = strings.TrimSpace(string(line[3:]))
		case bytes.HasPrefix(line, []byte("data:")):
			data = append(data, bytes.TrimSpace(line[5:])...)
		}
	}
}

// renew begins a session anew in place of one that the server no longer knows. Of many calls that notice, one does.
func (l *bridge) renew(ctx context.Context, old string) error {
	l.renewing.Lock()
	defer l.renewing.Unlock()
	l.mu.Lock()
	hello, current, ready := l.hello, l.session, l.ready
	var uris []string
	for uri, on := range l.watched {
		if on {
			uris = append(uris, uri)
		}
	}
	l.mu.Unlock()
	if current != old {
		return nil
	}
	m, err := parse(hello)
	if err != nil {
		return err
	}
	r, err := l.request(ctx, http.MethodPost, hello, m)
	if err != nil {
		return err
	}
	res, err := l.do(r)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil || res.StatusCode != http.StatusOK {
		return fmt.Errorf("begin the session anew: %s %w", res.Status, err)
	}
	l.begun(res.Header, body)
	l.Log.Warn("the server did not know the session any more; it was begun anew")
	if ready {
		l.send(message{Method: "notifications/initialized"}, []byte(`{"jsonrpc":"2.0","method":"notifications/initialized"}`))
	}
	for i, uri := range uris { // what the client was subscribed to, it is again
		line, err := encode(note{JSONRPC: mcp.JSONRPC_VERSION, ID: "soulbox-again-" + strconv.Itoa(i), Method: methodSubscribe, Params: map[string]string{"uri": uri}})
		if err != nil {
			return err
		}
		again, err := l.request(ctx, http.MethodPost, line, message{})
		if err != nil {
			return err
		}
		res, err := l.do(again)
		if err != nil {
			return err
		}
		_ = res.Body.Close() // what is not there any more has no updates
	}
	return nil
}

// listen passes on what the server says beside answers, for as long as the conversation lasts.
func (l *bridge) listen() {
	for try := 0; backoff(l.ctx, try) == nil; try++ {
		r, err := l.request(l.ctx, http.MethodGet, nil, message{})
		if err != nil {
			return
		}
		res, err := l.do(r)
		if err != nil {
			continue
		}
		switch res.StatusCode {
		case http.StatusOK:
			l.retell()
			if p := l.events(res.Body, message{}); p.progress {
				try = 0
			}
		case http.StatusNotFound:
			if err := l.renew(l.ctx, r.Header.Get(mcp.HeaderSessionID)); err != nil {
				l.Log.Debug("listen", "error", err)
			}
		case http.StatusMethodNotAllowed:
			_ = res.Body.Close()
			return
		}
		_ = res.Body.Close()
	}
}

// retell tells the client that everything it watches may have changed: what did while nobody listened is not known.
func (l *bridge) retell() {
	l.mu.Lock()
	again := l.listened
	l.listened = true
	var uris []string
	for uri, on := range l.watched {
		if on {
			uris = append(uris, uri)
		}
	}
	l.mu.Unlock()
	for _, uri := range uris {
		if again {
			_ = l.out.write(newNote(noteUpdated, map[string]string{"uri": uri})) // a failing pipe shows at the end
		}
	}
}

// tool is what the server says of a tool, which tells the headers that its calls need. One that is not known needs none.
func (l *bridge) tool(ctx context.Context, m message) *mcp.Tool {
	l.mu.Lock()
	known := l.tools
	l.mu.Unlock()
	if known == nil {
		known = l.askTools(ctx, m)
		l.mu.Lock()
		l.tools = known
		l.mu.Unlock()
	}
	if t := known[m.tool()]; t != nil {
		return t
	}
	return &mcp.Tool{}
}

func (l *bridge) askTools(ctx context.Context, m message) map[string]*mcp.Tool {
	var meta struct {
		Meta json.RawMessage `json:"_meta"`
	}
	if json.Unmarshal(m.Params, &meta) != nil {
		return nil
	}
	line, err := encode(note{JSONRPC: mcp.JSONRPC_VERSION, ID: "soulbox-tools", Method: string(mcp.MethodToolsList), Params: meta})
	if err != nil {
		return nil
	}
	ask, err := parse(line)
	if err != nil {
		return nil
	}
	r, err := l.request(ctx, http.MethodPost, line, ask)
	if err != nil {
		return nil
	}
	res, err := l.do(r)
	if err != nil {
		return nil // the call itself tells what is wrong
	}
	defer res.Body.Close()
	var answer struct {
		Result struct {
			Tools []*mcp.Tool `json:"tools"`
		} `json:"result"`
	}
	if json.NewDecoder(io.LimitReader(res.Body, 4<<20)).Decode(&answer) != nil {
		return nil
	}
	known := map[string]*mcp.Tool{}
	for _, t := range answer.Result.Tools {
		known[t.Name] = t
	}
	return known
}
