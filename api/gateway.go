package api

import (
	"cmp"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"html"

	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"soulbox.dev/soulbox/sandbox"
)

// Names by which a client shows a sandbox' traffic token. The header is E2B's; the query is for links, and becomes the cookie.
const (
	TokenHeader = "E2b-Traffic-Access-Token"
	TokenQuery  = "traffic_token"
	tokenCookie = "soulbox-traffic"
)

const (
	proxyIdle  = 60 * time.Second // of a connection to a sandbox that may be used again
	maxHeader  = 64 << 10         // bytes of an answer's headers, which the guest fills
	cookieLife = 24 * time.Hour
)

// Gateway serves the exposed ports of all sandboxes at {port}-{id}.{domain}. It passes HTTP/1.1, HTTP/2 (also without TLS), WebSocket and
// streams. It is safe for concurrent use.
type Gateway struct {
	Manager *sandbox.Manager
	Base    *url.URL // scheme, domain and port by which clients reach it, such as https://box.example.com
	Log     *slog.Logger

	plain, multiplexed http.RoundTripper
	closing            context.Context
	close              context.CancelFunc
}

// NewGateway makes a Gateway.
func NewGateway(m *sandbox.Manager, base *url.URL, log *slog.Logger) *Gateway {
	g := &Gateway{Manager: m, Base: base, Log: log}
	g.closing, g.close = context.WithCancel(context.Background())
	g.plain = &http.Transport{DialContext: g.dial, IdleConnTimeout: proxyIdle, MaxIdleConnsPerHost: 16, DisableCompression: true, MaxResponseHeaderBytes: maxHeader}
	two := new(http.Protocols)
	two.SetUnencryptedHTTP2(true)
	g.multiplexed = &http.Transport{DialContext: g.dial, IdleConnTimeout: proxyIdle, Protocols: two, DisableCompression: true, MaxResponseHeaderBytes: maxHeader}
	return g
}

// Close ends all requests that are being passed on.
func (g *Gateway) Close() { g.close() }

// URL is where a port of a sandbox is reached. Unless it is public the URL carries the token.
func (g *Gateway) URL(sb *sandbox.Sandbox, p sandbox.Port) string {
	u := *g.Base
	u.Host = fmt.Sprintf("%d-%s.%s", p.Port, sb.ID(), g.Base.Host)
	u.Path = "/"
	if !p.Public {
		u.RawQuery = url.Values{TokenQuery: {sb.TrafficToken()}}.Encode()
	}
	return u.String()
}

// Handler serves the ports of sandboxes, and leaves all other hosts to next.
func (g *Gateway) Handler(next http.Handler) http.Handler {
	domain := strings.ToLower(g.Base.Hostname())
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		label, ok := strings.CutSuffix(strings.TrimSuffix(strings.ToLower(host), "."), "."+domain)
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		defer context.AfterFunc(g.closing, cancel)()
		g.serve(w, r.WithContext(ctx), label)
	})
}

// failure is an answer of the gateway itself, as E2B's clients know it.
type failure struct {
	SandboxID string `json:"sandboxId"`
	Message   string `json:"message"`
	Port      int    `json:"port,omitempty"`
	Code      int    `json:"code"`
}

func (f failure) write(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if isBrowser(r) {
		h.Set("Content-Type", "text/html; charset=utf-8")
		w.WriteHeader(f.Code)
		_, _ = fmt.Fprintf(w, "<html><head><title>SoulBox</title></head><body><h1>%d</h1><p>%s</p></body></html>\n", f.Code, html.EscapeString(f.Message)) // a client that is gone misses nothing
		return
	}
	h.Set("Content-Type", "application/json")
	w.WriteHeader(f.Code)
	_ = json.NewEncoder(w).Encode(f) // as above
}

// serve answers a request for the host {label}.{domain}: {port}-{id}, and behind another hyphen whatever a client adds.
func (g *Gateway) serve(w http.ResponseWriter, r *http.Request, label string) {
	parts := strings.SplitN(label, "-", 3)
	port, err := strconv.Atoi(parts[0])
	if err != nil || port < 1 || port > 65535 || len(parts) < 2 || !sandbox.ValidID(parts[1]) {
		http.Error(w, "This host names no port of a sandbox: it is {port}-{sandbox id} before the domain.", http.StatusBadRequest)
		return
	}
	f := failure{SandboxID: parts[1], Code: http.StatusBadGateway}
	sb, err := g.Manager.Any(parts[1])
	if err != nil || sb.Info().State.Ended() {
		f.Message = "The sandbox was not found"
		f.write(w, r)
		return
	}
	p, exposed := sb.Exposed(port)
	if !exposed || !p.Public {
		secret := sb.TrafficToken()
		if !g.admits(r, secret) {
			f.Code, f.Message = http.StatusForbidden, "This port needs the sandbox' traffic token, as header "+TokenHeader+" or in the URL that port_expose gave"
			f.write(w, r)
			return
		}
		// A browser keeps the token as a cookie, and shows an address that can be passed on. Programs have none.
		if r.URL.Query().Has(TokenQuery) && r.Method == http.MethodGet && r.Header.Get("Upgrade") == "" && isBrowser(r) {
			g.remember(w, r, secret)
			return
		}
	}
	if !exposed {
		f.Port, f.Message = port, "The port is not exposed: call port_expose"
		f.write(w, r)
		return
	}
	g.proxy(sb.ID(), port).ServeHTTP(w, r)
}

// cookie is the name of the cookie with the token. With TLS it is one that no other host of the domain can set (RFC 6265bis, 4.1.3.2).
func (g *Gateway) cookie() string {
	if g.Base.Scheme == "https" {
		return "__Host-" + tokenCookie
	}
	return tokenCookie
}

// admits says whether a request shows the token, by any of its means.
func (g *Gateway) admits(r *http.Request, secret string) bool {
	shown := append(r.Header.Values(TokenHeader), r.URL.Query()[TokenQuery]...)
	for _, c := range r.CookiesNamed(g.cookie()) {
		shown = append(shown, c.Value)
	}
	ok := false
	for _, t := range shown {
		ok = subtle.ConstantTimeCompare([]byte(t), []byte(secret)) == 1 || ok
	}
	return ok && secret != ""
}

func isBrowser(r *http.Request) bool { return strings.Contains(r.UserAgent(), "Mozilla/") }

// remember turns a token of a link into a cookie of that host, and takes it out of the address.
func (g *Gateway) remember(w http.ResponseWriter, r *http.Request, shown string) {
	http.SetCookie(w, &http.Cookie{
		Name: g.cookie(), Value: shown, Path: "/", MaxAge: int(cookieLife.Seconds()), HttpOnly: true, Secure: g.Base.Scheme == "https", SameSite: http.SameSiteLaxMode,
	})
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Referrer-Policy", "no-referrer")
	// Relative to this host, whatever the path looks like: "//elsewhere" would lead away.
	http.Redirect(w, r, "/"+strings.TrimLeft(withoutToken(r.URL).RequestURI(), "/"), http.StatusFound)
}

func withoutToken(u *url.URL) *url.URL {
	q := u.Query()
	if !q.Has(TokenQuery) {
		return u
	}
	q.Del(TokenQuery)
	c := *u
	c.RawQuery = q.Encode()
	return &c
}

// proxy passes a request on. What shows the token stays here.
func (g *Gateway) proxy(id string, port int) *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", net.JoinHostPort(id, strconv.Itoa(port))
			r.Out.Host = r.In.Host
			if q := r.Out.URL; q.Query().Has(TokenQuery) {
				r.Out.URL = withoutToken(q)
			}
			r.Out.Header.Del(TokenHeader)
			if cookies := otherCookies(r.In.Header.Values("Cookie"), g.cookie()); len(cookies) > 0 {
				r.Out.Header["Cookie"] = cookies
			} else {
				r.Out.Header.Del("Cookie")
			}
			r.SetXForwarded()
			r.Out.Header.Set("X-Forwarded-Proto", g.Base.Scheme)
		},
		Transport:     transport{g},
		FlushInterval: -1, // at once: events and long answers
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() != nil {
				panic(http.ErrAbortHandler) // the client is gone
			}
			g.Log.Debug("gateway", "sandbox", id, "port", port, "error", err)
			f := failure{SandboxID: id, Port: port, Code: http.StatusBadGateway, Message: "The sandbox is running but port is not open"}
			switch {
			case errors.Is(err, sandbox.ErrBusy):
				f.Code, f.Message = http.StatusServiceUnavailable, "The sandbox has as many connections as it may have"
			case !errors.Is(err, sandbox.ErrNothingListens):
				f.Message = "The server on this port of the sandbox broke off"
			}
			f.write(w, r)
		},
		ErrorLog: slog.NewLogLogger(g.Log.Handler(), slog.LevelDebug),
	}
}

// otherCookies takes one cookie out of Cookie headers, and leaves all others as they are.
func otherCookies(headers []string, name string) []string {
	var kept []string
	for _, h := range headers {
		parts := slices.DeleteFunc(strings.Split(h, ";"), func(part string) bool {
			n, _, _ := strings.Cut(part, "=")
			return strings.TrimSpace(n) == name
		})
		if h = strings.TrimSpace(strings.Join(parts, ";")); h != "" {
			kept = append(kept, h)
		}
	}
	return kept
}

// transport speaks HTTP/2 to servers that are spoken to in it by gRPC, which knows nothing else, and HTTP/1.1 to all others.
type transport struct{ *Gateway }

// RoundTrip implements http.RoundTripper.
func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		return t.multiplexed.RoundTrip(r)
	}
	return t.plain.RoundTrip(r)
}

// dial connects to a port of a sandbox; the address is its id and the port.
func (g *Gateway) dial(ctx context.Context, _, address string) (net.Conn, error) {
	id, text, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		return nil, err
	}
	sb, err := g.Manager.Any(id)
	if err != nil {
		return nil, err
	}
	return sb.Dial(ctx, port)
}

// Base makes the base of a gateway's URLs: the domain at the scheme and port of the server's own URL.
func Base(domain, server string) (*url.URL, error) {
	u, err := url.Parse(server)
	if err != nil {
		return nil, err
	}
	if domain == "" || strings.Trim(strings.ToLower(domain), "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" || strings.HasPrefix(domain, ".") || strings.HasSuffix(domain, ".") {
		return nil, fmt.Errorf("%q is not a domain, such as box.example.com", domain)
	}
	host := strings.ToLower(domain)
	if port := u.Port(); port != "" {
		host = net.JoinHostPort(host, port)
	}
	return &url.URL{Scheme: cmp.Or(u.Scheme, "http"), Host: host}, nil
}
