package mcpserver

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
)

// withoutSecrets is a URL that is safe to show.
func withoutSecrets(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "its address"
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// maxRedirects is how many redirects one request follows at most.
const maxRedirects = 5

// do sends a request and follows redirects. The method and body stay (Go would turn the request into a GET), the key is not sent to another
// server, and what was to go over TLS never goes over plain HTTP.
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
		_ = res.Body.Close() // the body does not matter
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
			next.Header.Del(headerHandle)
		}
		if r.GetBody != nil {
			if next.Body, err = r.GetBody(); err != nil {
				return nil, err
			}
		}
		r = next
	}
	return nil, errors.New("the server redirects too many times")
}

var errDowngrade = errors.New("the server redirects from https to http, which is not followed")

// withoutURL is the error of a request without its URL, which may contain secrets.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// request makes an HTTP request for a message.
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
	if m.Method == "initialize" && l.kept != "" {
		r.Header.Set(headerHandle, l.kept)
	}
	if l.session != "" && m.Method != "initialize" {
		r.Header.Set(mcp.HeaderSessionID, l.session)
		if l.version != "" {
			r.Header.Set(mcp.HeaderProtocolVersion, l.version)
		}
	}
	return r, nil
}

// backoff waits longer after each try, with a random part so that clients do not retry in step.
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

// readEvents reads a stream of server-sent events (HTML living standard, 9.2.6), as far as MCP uses them.
func readEvents(body io.Reader, handle func(string), each func(id string, data []byte) error) error {
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
		case bytes.HasPrefix(line, []byte(handleComment)):
			handle(string(line[len(handleComment):]))
		case bytes.HasPrefix(line, []byte("id:")):
			id = strings.TrimSpace(string(line[3:]))
		case bytes.HasPrefix(line, []byte("data:")):
			data = append(data, bytes.TrimSpace(line[5:])...)
		}
	}
}
