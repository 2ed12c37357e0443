package api

import (
	"cmp"
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/api/envd"
	"soulbox.dev/soulbox/internal/loopback"
	"soulbox.dev/soulbox/sandbox"
)

// Names under which a client sends a sandbox's traffic token. The header is E2B's; the query parameter is for links, and becomes the
// cookie.
const (
	TrafficHeader = "E2b-Traffic-Access-Token"
	TrafficQuery  = "traffic_token"
	trafficCookie = "soulbox-traffic"
)

const (
	maxHeader  = 64 << 10 // bytes of an answer's headers, which come from the guest
	cookieLife = 24 * time.Hour
)

// Gateway serves the ports of all sandboxes, and envd's services, at {port}-{id}.{domain}. On this machine's own names and addresses,
// headers name the sandbox and the port. It passes HTTP/1.1, HTTP/2 (also without TLS), WebSocket and streams. It is safe for concurrent
// use.
type Gateway struct {
	Manager *sandbox.Manager
	Base    *url.URL // scheme, domain and port by which clients reach it, such as https://box.example.com; nil if there is no domain
	Own     *url.URL // of the server itself, for what has no domain; nil if unknown
	Log     *slog.Logger
	// Insecure lets clients reach sandboxes that were made without an access token. On loopback it is the default; otherwise the operator
	// sets it.
	Insecure bool
	// OwnerValid returns an error if the sandboxes of an owner may no longer be reached by their tokens and signed URLs, and ends the
	// request of ctx as soon as that becomes true. If nil, they always may.
	OwnerValid func(ctx context.Context, owner string) error
	// NewKey says how to get a key, to clients of sandboxes whose owner has none any more; "" says nothing.
	NewKey string

	inside     *envd.Server
	transports map[transportKey]*http.Transport
	visitors   visitors
	stall      time.Duration
	closing    context.Context
	close      context.CancelFunc
}

// NewGateway makes a Gateway; base may be nil.
func NewGateway(m *sandbox.Manager, base *url.URL, log *slog.Logger) *Gateway {
	g := &Gateway{Manager: m, Base: base, Log: log, inside: envd.New(log), stall: stallTime}
	g.closing, g.close = context.WithCancel(context.Background())
	g.transports = g.newTransports()
	return g
}

// Close ends all requests that are in progress.
func (g *Gateway) Close() { g.close() }

// URL returns the URL of a port of a sandbox. Unless the port is public, the URL carries the token.
func (g *Gateway) URL(sb *sandbox.Sandbox, p sandbox.Port) string {
	u := *g.Base
	u.Host = fmt.Sprintf("%d-%s.%s", p.Port, sb.ID(), g.Base.Host)
	u.Path = "/"
	if !p.Public {
		u.RawQuery = url.Values{TrafficQuery: {sb.TrafficToken()}}.Encode()
	}
	return u.String()
}

// Headers that name a sandbox and its port if the host does not.
const (
	SandboxHeader = "E2b-Sandbox-Id"
	PortHeader    = "E2b-Sandbox-Port"
)

// Names below the domain that are not sandboxes: the control plane, and a shared host of all sandboxes, which headers tell apart.
const (
	controlLabel = "api"
	sharedLabel  = "sandbox"
)

// FileURL returns a URL with which anyone can read or write one file of a sandbox until a time. It is at the sandbox's own name, or at the
// server's if there is no domain.
func (g *Gateway) FileURL(sb *sandbox.Sandbox, path, operation string, until time.Time) string {
	u := url.URL{}
	if g.Base != nil {
		u = *g.Base
		u.Host, u.Path = fmt.Sprintf("%d-%s.%s", envd.Port, sb.ID(), g.Base.Host), "/files"
	} else {
		u = *g.Own.JoinPath("v1", "sandboxes", sb.ID(), "files")
	}
	u.RawQuery = envd.SignedQuery(path, operation, "", sb.AccessToken(), until).Encode()
	return u.String()
}

// Files serves the URLs of FileURL at the server's own name, as /v1/sandboxes/{id}/files. Its headers keep browsers from running there what
// comes from a sandbox.
func (g *Gateway) Files() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.PathValue("id")
		if !sandbox.ValidID(id) {
			notFound("").write(w, r)
			return
		}
		inner := r.Clone(r.Context())
		inner.URL.Path, inner.URL.RawPath = "/files", ""
		w.Header().Set("Content-Security-Policy", "sandbox")
		g.serve(asAttachment{w}, inner, id, envd.Port)
	})
}

// asAttachment makes browsers save an answer instead of showing it.
type asAttachment struct{ http.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (a asAttachment) WriteHeader(code int) {
	h := a.Header()
	if shown, ok := strings.CutPrefix(h.Get("Content-Disposition"), "inline"); ok {
		h.Set("Content-Disposition", "attachment"+shown)
	}
	a.ResponseWriter.WriteHeader(code)
}

// Write implements io.Writer.
func (a asAttachment) Write(p []byte) (int, error) {
	if h := a.Header(); strings.HasPrefix(h.Get("Content-Disposition"), "inline") {
		a.WriteHeader(http.StatusOK)
	}
	return a.ResponseWriter.Write(p)
}

// Flush implements http.Flusher, which connect requires.
func (a asAttachment) Flush() { _ = http.NewResponseController(a.ResponseWriter).Flush() } // without a Flusher the data is sent at the end

// Unwrap lets http.ResponseController set deadlines.
func (a asAttachment) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// Handler serves requests for sandboxes and passes all others to next. A host that names a sandbox takes precedence over headers.
func (g *Gateway) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, port, ours := g.address(r)
		if !ours {
			next.ServeHTTP(w, r)
			return
		}
		if port < 1 || port > 65535 || !sandbox.ValidID(id) {
			http.Error(w, "Invalid sandbox ID or port: a host is {port}-{sandbox id} before the domain; elsewhere the headers "+
				SandboxHeader+" and "+PortHeader+" name them.", http.StatusBadRequest)
			return
		}
		g.serve(w, r, id, port)
	})
}

// address returns the sandbox and the port of a request; ours is false if the request is not for a sandbox. A port that cannot be read is
// 0.
func (g *Gateway) address(r *http.Request) (id string, port int, ours bool) {
	host := loopback.Bare(r.Host)
	label := ""
	if g.Base != nil {
		label, ours = strings.CutSuffix(host, "."+strings.ToLower(g.Base.Hostname()))
	}
	if ours && label == controlLabel {
		return "", 0, false
	}
	text := ""
	if ours && label != sharedLabel {
		parts := strings.SplitN(label, "-", 3) // after another hyphen clients may add anything
		if len(parts) > 1 {
			text, id = parts[0], parts[1]
		}
	} else {
		_, err := netip.ParseAddr(host)
		named := r.Header.Values(SandboxHeader)
		if !ours && (err != nil && !loopback.IsItself(host) || len(named) == 0) {
			return "", 0, false
		}
		if ports := r.Header.Values(PortHeader); len(ports) == 1 {
			text = ports[0]
		} else if len(ports) == 0 {
			text = strconv.Itoa(envd.Port)
		}
		if len(named) == 1 {
			id, _, _ = strings.Cut(named[0], "-")
		}
	}
	port, err := strconv.Atoi(text)
	if err != nil || strconv.Itoa(port) != text {
		port = 0
	}
	return id, port, true
}

// autoLife is how long a sandbox lives at least after a request has woken it; longer if it was made with a longer life.
const autoLife = 5 * time.Minute

// serve answers a request for a port of a sandbox.
func (g *Gateway) serve(w http.ResponseWriter, r *http.Request, id string, port int) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(g.closing, cancel)()
	r = r.WithContext(ctx)
	sb, err := g.Manager.Any(id)
	if err != nil {
		notFound(id).write(w, r)
		return
	}
	if info := sb.Info(); info.State.Ended() || info.State == sandbox.Paused && !info.AutoResume {
		notFound(id).write(w, r)
		return
	}
	leave, ok := g.visitors.admit(r.RemoteAddr)
	if !ok {
		failure{SandboxID: id, Code: http.StatusServiceUnavailable,
			Message: fmt.Sprintf("Your address has %d open requests and tunnels, which is the limit; close some", maxVisitor)}.write(w, r)
		return
	}
	defer leave()
	if port == envd.Port {
		g.serveInside(w, r, sb)
		return
	}
	g.servePort(w, r, sb, port)
}

// serveInside answers a request for what is in a sandbox.
func (g *Gateway) serveInside(w http.ResponseWriter, r *http.Request, sb *sandbox.Sandbox) {
	target := envd.Target{Sandbox: sb, Free: g.free(sb.Info())}
	if !g.inside.Admits(w, r, target) || !g.ownerValid(w, r, sb) {
		return
	}
	release, ok := g.charged(w, r, sb, envd.Port)
	if !ok {
		return
	}
	defer release()
	if sb.Info().State == sandbox.Paused && !target.Proven(r) { // without proof, a health check must not wake it
		notFound(sb.ID()).write(w, r)
		return
	}
	if g.wake(w, r, sb) {
		g.inside.Serve(w, r, target)
	}
}

// servePort answers a request for what listens on an exposed port.
func (g *Gateway) servePort(w http.ResponseWriter, r *http.Request, sb *sandbox.Sandbox, port int) {
	public, open := sb.Reachable(port)
	if !open || !public {
		secret := sb.TrafficToken()
		if !g.hasToken(r, secret) {
			failure{SandboxID: sb.ID(), Code: http.StatusForbidden, Message: "This port needs the sandbox's traffic token, as header " +
				TrafficHeader + " or in the URL that port_expose gave"}.write(w, r)
			return
		}
		if !g.ownerValid(w, r, sb) {
			return
		}
		// A browser gets the token as a cookie, and an address without it, which can be passed on. Programs get no cookie.
		if r.URL.Query().Has(TrafficQuery) && r.Method == http.MethodGet && r.Header.Get("Upgrade") == "" && isBrowser(r) {
			g.remember(w, r, secret)
			return
		}
	}
	if !open {
		failure{SandboxID: sb.ID(), Port: port, Code: http.StatusBadGateway,
			Message: "The port is not exposed: call port_expose"}.write(w, r)
		return
	}
	release, ok := g.charged(w, r, sb, port)
	if !ok {
		return
	}
	defer release()
	if g.wake(w, r, sb) {
		answer := stalling{w, g.stall}
		defer answer.clearDeadline()
		g.proxy(sb, port).ServeHTTP(answer, r)
	}
}

// insecure reports whether sandboxes may be made that need no token.
func (g *Gateway) insecure() bool { return g != nil && g.Insecure }

// free reports whether a sandbox needs no access token.
func (g *Gateway) free(i sandbox.Info) bool { return g.insecure() && i.Ingress.Insecure }

// ownerValid reports whether a sandbox's tokens are still valid, and answers the request if they are not.
func (g *Gateway) ownerValid(w http.ResponseWriter, r *http.Request, sb *sandbox.Sandbox) bool {
	if g.OwnerValid == nil {
		return true
	}
	if err := g.OwnerValid(r.Context(), sb.Info().Owner); err != nil {
		g.Log.Warn("refused a request", "why", "the sandbox's owner: "+err.Error(), "sandbox", sb.ID(), "from", r.RemoteAddr)
		failure{SandboxID: sb.ID(), Code: http.StatusUnauthorized,
			Message: strings.TrimSuffix("The sandbox's owner has no valid key any more; "+g.NewKey, "; ")}.write(w, r)
		return false
	}
	return true
}

// wake wakes a paused sandbox if a request may wake it. If the sandbox cannot be woken, it answers the request and returns false.
func (g *Gateway) wake(w http.ResponseWriter, r *http.Request, sb *sandbox.Sandbox) bool {
	if sb.Info().State != sandbox.Paused {
		return true
	}
	_, err := sb.Agent(r.Context(), "wake")
	if err == nil {
		life := max(autoLife, sb.Info().Times.First)
		if _, err := sb.Update(r.Context(), sandbox.Update{AtLeast: &life}); err != nil {
			g.Log.Debug("give a sandbox that was woken time", "sandbox", sb.ID(), "error", err) // a limit may forbid more time
		}
		return true
	}
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler)
	}
	f := notFound(sb.ID())
	switch {
	case errors.Is(err, sandbox.ErrNoRoom), errors.Is(err, sandbox.ErrTooMany):
		f.Code, f.Message = http.StatusTooManyRequests, "The sandbox is paused, and cannot be resumed now: "+err.Error()
	case !errors.Is(err, sandbox.ErrState):
		g.Log.Error("wake sandbox", "sandbox", sb.ID(), "error", err)
		f.Message = "The sandbox is paused, and could not be resumed"
	}
	f.write(w, r)
	return false
}

// cookie returns the name of the cookie with the token. With TLS no other host of the domain can set a cookie of that name (RFC 6265bis,
// 4.1.3.2).
func (g *Gateway) cookie() string {
	if g.secure() {
		return "__Host-" + trafficCookie
	}
	return trafficCookie
}

func (g *Gateway) secure() bool { return g.Base != nil && g.Base.Scheme == "https" }

// hasToken reports whether a request carries the token: as header, query parameter or cookie.
func (g *Gateway) hasToken(r *http.Request, secret string) bool {
	shown := append(r.Header.Values(TrafficHeader), r.URL.Query()[TrafficQuery]...)
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

// remember turns the token of a link into a cookie of that host, and redirects to the address without it.
func (g *Gateway) remember(w http.ResponseWriter, r *http.Request, shown string) {
	http.SetCookie(w, &http.Cookie{
		Name: g.cookie(), Value: shown, Path: "/", MaxAge: int(cookieLife.Seconds()), HttpOnly: true, Secure: g.secure(),
		SameSite: http.SameSiteLaxMode,
	})
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Referrer-Policy", "no-referrer")
	// The path must stay on this host: "//elsewhere" would lead to another one.
	http.Redirect(w, r, "/"+strings.TrimLeft(withoutToken(r.URL).RequestURI(), "/"), http.StatusFound)
}

func withoutToken(u *url.URL) *url.URL {
	q := u.Query()
	if !q.Has(TrafficQuery) {
		return u
	}
	q.Del(TrafficQuery)
	c := *u
	c.RawQuery = q.Encode()
	return &c
}

// proxy passes a request on to the sandbox, without the token.
func (g *Gateway) proxy(sb *sandbox.Sandbox, port int) *httputil.ReverseProxy {
	id, in := sb.ID(), sb.Info().Ingress
	secure := slices.Contains(in.TLS, port)
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", net.JoinHostPort(id, strconv.Itoa(port))
			if secure {
				r.Out.URL.Scheme = "https"
			}
			if r.Out.Host = r.In.Host; in.Host != "" {
				r.Out.Host = strings.ReplaceAll(in.Host, "${PORT}", strconv.Itoa(port))
			}
			r.Out.Header.Del(SandboxHeader)
			r.Out.Header.Del(PortHeader)
			if q := r.Out.URL; q.Query().Has(TrafficQuery) {
				r.Out.URL = withoutToken(q)
			}
			r.Out.Header.Del(TrafficHeader)
			if cookies := otherCookies(r.In.Header.Values("Cookie"), g.cookie()); len(cookies) > 0 {
				r.Out.Header["Cookie"] = cookies
			} else {
				r.Out.Header.Del("Cookie")
			}
			r.SetXForwarded()
			if g.Base != nil {
				r.Out.Header.Set("X-Forwarded-Proto", g.Base.Scheme)
			}
		},
		Transport:     transport{g},
		FlushInterval: -1, // flush at once: for events and long answers
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() != nil {
				panic(http.ErrAbortHandler) // the client is gone
			}
			g.Log.Debug("gateway", "sandbox", id, "port", port, "error", err)
			f := failure{SandboxID: id, Port: port, Code: http.StatusBadGateway, Message: "The sandbox is running but port is not open"}
			var full *access.FullError
			switch {
			case errors.As(err, &full):
				f.Code, f.Message = http.StatusServiceUnavailable, full.Error()
			case errors.Is(err, sandbox.ErrBusy):
				f.Code, f.Message = http.StatusServiceUnavailable, "The sandbox has reached its limit of connections"
			case !errors.Is(err, sandbox.ErrNothingListens):
				f.Message = "The server on this port of the sandbox closed the connection"
			}
			f.write(w, r)
		},
		ErrorLog: slog.NewLogLogger(g.Log.Handler(), slog.LevelDebug),
	}
}

// otherCookies removes one cookie from Cookie headers and leaves all others as they are.
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

// Base makes the base of a gateway's URLs: the domain, with the scheme and port of the server's own URL.
func Base(domain, server string) (*url.URL, error) {
	u, err := url.Parse(server)
	if err != nil {
		return nil, err
	}
	if domain == "" || strings.Trim(strings.ToLower(domain), "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" ||
		strings.HasPrefix(domain, ".") || strings.HasSuffix(domain, ".") {
		return nil, fmt.Errorf("%q is not a domain, such as box.example.com", domain)
	}
	host := strings.ToLower(domain)
	if port := u.Port(); port != "" {
		host = net.JoinHostPort(host, port)
	}
	return &url.URL{Scheme: cmp.Or(u.Scheme, "http"), Host: host}, nil
}
