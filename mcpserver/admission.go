package mcpserver

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"soulbox.dev/soulbox/internal/loopback"
)

// Admission decides who owns a request and whether its source is allowed. The zero value admits every request on loopback.
type Admission struct {
	// Authenticate finds the owner of a bearer token; an error says, for the log, why the token is not valid. Nil: tokens are ignored.
	Authenticate func(ctx context.Context, token string) (owner string, err error)
	// Until returns a context that ends when the credential of a request is no longer valid; what the request began ends with it. If Until
	// is nil, or returns nil, it never ends.
	Until func(ctx context.Context) context.Context
	// Required reports whether a request without a token is refused; if not, its owner is the user of this machine. Nil: never.
	Required func() bool
	// Origins are the origins of web pages that are allowed, such as https://ide.example.com, besides the server's own on loopback.
	Origins []string
	// Hosts are the names by which this server may be called, besides those of loopback. A page with another name that resolves to this
	// machine (DNS rebinding) is refused.
	Hosts []string
	// Metadata is the URL of the protected resource metadata (RFC 9728), given to clients without a token; "" means none.
	Metadata string
	// NewKey says how to get a key, for clients that have none; "" says nothing.
	NewKey string
	Log    *slog.Logger // default discards
}

// ErrDenied is the error for a token that is not, or no longer, valid.
var ErrDenied = errors.New("the token is not valid")

// Guard refuses requests with a foreign host name or from a foreign web page.
func (a Admission) Guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a.admitSource(w, r) {
			next.ServeHTTP(w, r)
		}
	})
}

// HostGuard checks only the host name. It is for handlers whose requests carry a proof of their own, which a web page does not send by
// itself, so requests of web pages are allowed.
func (a Admission) HostGuard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !a.knowsHost(r.Host) {
			a.log(r, "foreign host")
			refuse(w, http.StatusForbidden, nil, codeInvalid, foreignHost)
			return
		}
		next.ServeHTTP(w, r)
	})
}

const foreignHost = "this server does not have that name; add it by --allow-host"

// Private is Guard for what only one owner may see: if tokens are required, other owners are refused.
func (a Admission) Private(owner string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, ok := a.admit(w, r)
		if !ok {
			return
		}
		if who != owner && a.Required != nil && a.Required() {
			refuse(w, http.StatusForbidden, nil, codeInvalid, "this is for the operator only")
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (a Admission) admitSource(w http.ResponseWriter, r *http.Request) bool {
	switch {
	case !a.knowsHost(r.Host):
		a.log(r, "foreign host")
		refuse(w, http.StatusForbidden, nil, codeInvalid, foreignHost)
	case !a.knowsOrigin(r.Header.Values("Origin"), r.Host):
		a.log(r, "foreign origin")
		refuse(w, http.StatusForbidden, nil, codeInvalid, "this web page may not use the server; name its origin by --origin")
	default:
		return !a.cors(w, r)
	}
	return false
}

// cors lets admitted web pages read answers (Fetch standard, 3.2), and answers their preflight requests.
func (a Admission) cors(w http.ResponseWriter, r *http.Request) (answered bool) {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return false
	}
	h := w.Header()
	h.Set("Access-Control-Allow-Origin", origin)
	h.Add("Vary", "Origin")
	h.Set("Access-Control-Expose-Headers", "Mcp-Session-Id, WWW-Authenticate, Retry-After")
	if r.Method != http.MethodOptions {
		return false
	}
	h.Set("Access-Control-Allow-Methods", "GET, POST, DELETE")
	if wanted := r.Header.Get("Access-Control-Request-Headers"); wanted != "" {
		h.Set("Access-Control-Allow-Headers", wanted)
	}
	h.Set("Access-Control-Max-Age", "600")
	w.WriteHeader(http.StatusNoContent)
	return true
}

func (a Admission) log(r *http.Request, why string) {
	if a.Log != nil {
		a.Log.Warn("refused a request", "why", why, "from", r.RemoteAddr, "method", r.Method, "path", r.URL.Path)
	}
}

// admit checks a request, and returns its owner.
func (a Admission) admit(w http.ResponseWriter, r *http.Request) (owner string, ok bool) {
	if !a.admitSource(w, r) {
		return "", false
	}
	owner, err := a.owner(r)
	if err == nil {
		return owner, true
	}
	a.log(r, err.Error())
	challenge := "Bearer"
	if a.Metadata != "" {
		challenge += ` resource_metadata="` + a.Metadata + `"`
	}
	if r.Header.Get("Authorization") != "" {
		sep := " "
		if a.Metadata != "" {
			sep = ", "
		}
		challenge += sep + `error="invalid_token"`
	}
	w.Header().Set("WWW-Authenticate", challenge)
	if r.ContentLength != 0 && r.ProtoMajor == 1 {
		w.Header().Set("Connection", "close") // else net/http would wait for the body before it answers
	}
	text := "give a valid key as Authorization: Bearer KEY"
	if a.NewKey != "" {
		text += "; " + a.NewKey
	}
	refuse(w, http.StatusUnauthorized, nil, codeInvalid, text)
	return "", false
}

var errNoToken = errors.New("no token")

// owner finds the owner of a request.
func (a Admission) owner(r *http.Request) (string, error) {
	given := r.Header.Values("Authorization")
	if a.Authenticate == nil || len(given) == 0 {
		if a.Required != nil && a.Required() {
			return "", errNoToken
		}
		return "", nil
	}
	scheme, token, _ := strings.Cut(given[0], " ")
	if len(given) > 1 || !strings.EqualFold(scheme, "Bearer") || token == "" {
		return "", ErrDenied
	}
	return a.Authenticate(r.Context(), strings.TrimSpace(token))
}

// until is how long what a request began may continue.
func (a Admission) until(r *http.Request) context.Context {
	if a.Until != nil {
		if ctx := a.Until(r.Context()); ctx != nil {
			return ctx
		}
	}
	return context.Background()
}

// still reports whether an admitted request would still be admitted.
func (a Admission) still(r *http.Request) bool {
	_, err := a.owner(r)
	return err == nil
}

// portOf is the port of a host: the one it names, else the scheme's default.
func portOf(host, scheme string) string {
	if _, port, err := net.SplitHostPort(host); err == nil {
		return port
	}
	if scheme == "https" {
		return "443"
	}
	return "80"
}

func (a Admission) knowsHost(host string) bool {
	name := loopback.Bare(host)
	return loopback.IsItself(name) || slices.ContainsFunc(a.Hosts, func(h string) bool { return loopback.Bare(h) == name })
}

// knowsOrigin admits requests of no web page (no header), of this server's own pages, and of the listed origins. A page on another port of
// this machine is not trusted: it may come, for instance, from a server in a sandbox.
func (a Admission) knowsOrigin(origins []string, host string) bool {
	if len(origins) == 0 {
		return true
	}
	if len(origins) > 1 {
		return false
	}
	u, err := url.Parse(origins[0])
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return false
	}
	local := loopback.IsItself(loopback.Bare(u.Host)) && loopback.IsItself(loopback.Bare(host))
	if local && portOf(u.Host, u.Scheme) == portOf(host, "http") {
		return true
	}
	return slices.ContainsFunc(a.Origins, func(o string) bool { return strings.EqualFold(strings.TrimSuffix(o, "/"), origins[0]) })
}
