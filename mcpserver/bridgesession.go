package mcpserver

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"github.com/mark3labs/mcp-go/mcp"
)

// begun records the session that initialize has begun.
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

// renew replaces a session that the server no longer knows with a new one. If many calls notice that, only one does it.
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
		return fmt.Errorf("begin a new session: %s %w", res.Status, err)
	}
	l.begun(res.Header, body)
	l.Log.Warn("the server no longer knew the session; a new one was begun")
	if ready {
		l.send(message{Method: "notifications/initialized"}, []byte(`{"jsonrpc":"2.0","method":"notifications/initialized"}`))
	}
	for i, uri := range uris { // renew the client's subscriptions
		line, err := encode(note{JSONRPC: mcp.JSONRPC_VERSION, ID: "soulbox-again-" + strconv.Itoa(i), Method: methodSubscribe,
			Params: map[string]string{"uri": uri}})
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
		_ = res.Body.Close() // what no longer exists has no updates
	}
	return nil
}

// listen passes on the server's own messages, which answer nothing, for as long as the conversation lasts.
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

// retell tells the client that everything it watches may have changed: changes made while the bridge did not listen are unknown.
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
			_ = l.out.write(newNote(noteUpdated, map[string]string{"uri": uri})) // a broken pipe is reported when the bridge ends
		}
	}
}

// tool is the server's description of a tool, which says what headers its calls need. A tool that is not known needs none.
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
		return nil // the call itself will report what is wrong
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
