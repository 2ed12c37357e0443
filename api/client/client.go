package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"soulbox.dev/soulbox/internal/loopback"
)

// Options say which server a Client calls, and as which owner.
type Options struct {
	URL    string // of the server, such as https://box.example.com
	Socket string // of a server on this machine, instead of a URL
	Key    string // of the owner; a socket needs none
	Owner  string // the owner to act as, at a socket
	Agent  string // this program and its version
	// Trace, if not nil, is called for every request when its answer begins; status is 0 if there is no answer. It never sees the key.
	Trace func(method, path string, status int, took time.Duration)
}

// Client calls one server. It is safe for concurrent use.
type Client struct {
	base  *url.URL
	o     Options
	plain *http.Client
}

const (
	dialTime = 10 * time.Second
	pingTime = 15 * time.Second
)

// New makes a Client. It does not connect yet.
func New(o Options) (*Client, error) {
	transport := &http.Transport{Proxy: loopback.Proxy, ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 16,
		IdleConnTimeout: 30 * time.Second, DisableCompression: true,
		HTTP2: &http.HTTP2Config{SendPingTimeout: pingTime, PingTimeout: pingTime}} // detects a connection that has died silently
	dialer := &net.Dialer{Timeout: dialTime}
	transport.DialContext = loopback.Dial(dialer)
	if o.Socket != "" {
		o.URL, transport.Proxy = "http://localhost", nil
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", o.Socket)
		}
	}
	u, err := url.Parse(o.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil {
		return nil, fmt.Errorf("%q is not the URL of a server; give one such as https://box.example.com", o.URL)
	}
	u.Path = strings.TrimSuffix(strings.TrimSuffix(u.Path, "/"), "/mcp")
	u.RawQuery, u.Fragment = "", ""
	c := &Client{base: u, o: o}
	c.plain = &http.Client{Transport: signed{c, transport},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return c, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.plain.CloseIdleConnections() }

// Where returns the server's address: its URL or its socket.
func (c *Client) Where() string {
	if c.o.Socket != "" {
		return c.o.Socket
	}
	return c.base.String()
}

// signed adds the headers that identify the client to requests.
type signed struct {
	*Client
	next http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (s signed) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(APIHeader, strconv.Itoa(API))
	if s.o.Agent != "" {
		r.Header.Set("User-Agent", s.o.Agent)
	}
	if s.o.Key != "" {
		r.Header.Set("X-API-Key", s.o.Key)
	}
	if s.o.Owner != "" {
		r.Header.Set(OwnerHeader, s.o.Owner)
	}
	began := time.Now()
	res, err := s.next.RoundTrip(r)
	status := 0
	if err == nil {
		status = res.StatusCode
		err = fits(res.Header)
	}
	if s.o.Trace != nil {
		s.o.Trace(r.Method, r.URL.Path, status, time.Since(began))
	}
	if err != nil && res != nil {
		_ = res.Body.Close()
		res = nil
	}
	return res, err
}

// ErrServerOld means that the server speaks an older API than this client.
var ErrServerOld = errors.New("the server is older than this client: update soulbox-mcp there, or use a soulbox of its version")

func fits(h http.Header) error {
	text := h.Get(APIHeader)
	if v, err := strconv.Atoi(text); text != "" && (err != nil || v < API) {
		return ErrServerOld
	}
	return nil
}

// Error is a server's refusal of a request.
type Error struct {
	Status  int
	Message string
}

// Error implements error.
func (e *Error) Error() string { return e.Message }

// refusal makes an Error. E2B's API refuses a user that the sandbox does not have with the status of a wrong key; refusal makes that a bad
// request.
func refusal(status int, message string) *Error {
	for _, begin := range []string{"invalid username: ", "error looking up user "} {
		if who, ok := strings.CutPrefix(message, begin); ok && status == http.StatusUnauthorized {
			who, _, _ = strings.Cut(who, ": ")
			return &Error{http.StatusBadRequest, "the sandbox has no user " + who + ": name one of its /etc/passwd, or give a number"}
		}
	}
	return &Error{status, message}
}

// IsNotFound reports whether an error means that something does not exist.
func IsNotFound(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusNotFound
}

// Unreachable reports whether an error means that the server does not respond.
func Unreachable(err error) bool {
	var e *Error
	return err != nil && !errors.As(err, &e) && !errors.Is(err, ErrServerOld) && !errors.Is(err, context.Canceled) &&
		!errors.Is(err, context.DeadlineExceeded)
}

const maxError = 1 << 20 // bytes of an answer that is an error

// errorOf reads the error of an answer.
func errorOf(res *http.Response) error {
	body, err := io.ReadAll(io.LimitReader(res.Body, maxError))
	var told struct{ Message string }
	if err == nil && json.Unmarshal(body, &told) == nil && told.Message != "" {
		return refusal(res.StatusCode, told.Message)
	}
	if res.StatusCode == http.StatusNotFound {
		return &Error{res.StatusCode, "what answers there is not a SoulBox server, or one too old for this client"}
	}
	return &Error{res.StatusCode, "the server answers " + res.Status}
}

// send sends a request and returns its answer unless that is an error. The caller closes the body.
func (c *Client) send(ctx context.Context, method, path string, query url.Values, kind string, body io.Reader) (*http.Response, error) {
	u := c.base.JoinPath(path)
	u.RawQuery = query.Encode()
	r, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	if kind != "" {
		r.Header.Set("Content-Type", kind)
	}
	res, err := c.plain.Do(r)
	if err != nil {
		var ue *url.Error // repeats the method and the URL
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return nil, fmt.Errorf("%s: %w", c.Where(), untrusted(err))
	}
	if res.StatusCode >= 300 {
		defer res.Body.Close()
		return nil, errorOf(res)
	}
	return res, nil
}

// call sends JSON and reads JSON; in and out may be nil.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	_, err := c.callWith(ctx, method, path, query, in, out)
	return err
}

func (c *Client) callWith(ctx context.Context, method, path string, query url.Values, in, out any) (http.Header, error) {
	var body io.Reader
	kind := ""
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body, kind = bytes.NewReader(text), "application/json"
	}
	res, err := c.send(ctx, method, path, query, kind, body)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if out == nil {
		_, err = io.Copy(io.Discard, res.Body)
		return res.Header, err
	}
	if err := json.NewDecoder(res.Body).Decode(out); err != nil {
		return nil, fmt.Errorf("read the answer of %s: %w", c.Where(), err)
	}
	return res.Header, nil
}

// Server describes the server.
func (c *Client) Server(ctx context.Context) (s Server, err error) {
	err = c.call(ctx, "GET", "/v1/server", nil, nil, &s)
	return s, err
}

// Caller returns the name under which the server knows this client.
func (c *Client) Caller(ctx context.Context) (string, error) {
	var teams []struct{ Name string }
	if err := c.call(ctx, "GET", "/teams", nil, nil, &teams); err != nil || len(teams) == 0 {
		return "", err
	}
	return teams[0].Name, nil
}
