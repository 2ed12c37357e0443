package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/api"
	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/gvisor"
	"soulbox.dev/soulbox/internal/loopback"
	"soulbox.dev/soulbox/mcpserver"
)

// httpConfig is what flags say about the HTTP server.
type httpConfig struct {
	config
	listen      string
	allowRemote bool
	origins     list
	hosts       list
	publicURL   string
	domain      string
	tls         tlsConfig
	operator    string
	issuer      string
	audience    string
	idle        time.Duration
	rate        float64
}

const (
	drainTime    = 10 * time.Second // for calls in flight when the server ends
	shutdownTime = drainTime + 10*time.Second
)

func parseHTTP(args []string, getenv func(string) string, stderr io.Writer) (c httpConfig, err error) {
	c.onExit = "keep"
	var all *flag.FlagSet
	err = c.parse("http", args, getenv, stderr, c.serving, func(f *flag.FlagSet) {
		all = f
		f.BoolVar(&c.insecure, insecureFlag, false,
			"sandboxes that are made with secure=false are reached by their id alone, without a token; default only where the server is "+
				"on loopback and has no --public-url")
		f.StringVar(&c.listen, "listen", "127.0.0.1:8787", "`address` to listen on")
		f.BoolVar(&c.allowRemote, "allow-remote", false, "listen on more than loopback; needs keys or an OpenID provider, and --origin")
		f.Var(&c.origins, "origin", "`origin` of web pages that may use the server, such as https://ide.example.com; may be repeated")
		f.Var(&c.hosts, "allow-host",
			"`name` by which clients may call the server, besides loopback and the hosts of --origin; may be repeated")
		f.StringVar(&c.publicURL, "public-url", "",
			"`URL` by which clients reach the server, such as https://box.example.com; default the address it listens on")
		f.StringVar(&c.domain, "domain", "",
			"`domain` under which sandboxes are served as {port}-{sandbox}.{domain}, and the E2B API as api.{domain}, such as "+
				"box.example.com; its wildcard must lead here, as *.localhost does by itself in browsers and curl")
		c.tls.flags(f)
		f.StringVar(&c.operator, "operator", "operator", "`owner` whose key may read /metrics, once keys are needed")
		f.StringVar(&c.issuer, "oidc-issuer", "", "`URL` of an OpenID provider whose tokens are accepted besides keys")
		f.StringVar(&c.audience, "oidc-audience", "", "`audience` that its tokens must have")
		f.DurationVar(&c.idle, "session-idle", 30*time.Minute, "after which an unused session ends")
		f.Float64Var(&c.rate, "rate", 200, "requests per second of one owner")
	})
	if err != nil {
		return c, err
	}
	c.insecure = c.insecure || !c.allowRemote && c.publicURL == "" && !isGiven(all, insecureFlag)
	return c, c.check()
}

const insecureFlag = "allow-insecure-sandboxes"

// check refuses settings that make no sense, or would serve strangers.
func (c *httpConfig) check() error {
	host, err := c.checkNames()
	if err != nil {
		return usageError{err}
	}
	if loopback.IsItself(host) {
		return nil
	}
	if !c.allowRemote {
		return usageError{fmt.Errorf("--listen %q is not on loopback: give --allow-remote too if everyone who can reach it may try keys",
			c.listen)}
	}
	if len(c.origins) == 0 {
		return usageError{errors.New("--allow-remote needs --origin: each origin whose web pages may use the server; without such pages " +
			"give the server's own URL")}
	}
	if c.issuer != "" {
		return nil
	}
	keys, err := (&access.Keys{Dir: c.stateDir}).List()
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(keys, func(k access.Key) bool { return k.Valid(time.Now()) }) {
		return errors.New("--allow-remote needs a key: make one with 'soulbox-mcp key create --owner NAME'")
	}
	return nil
}

// checkNames checks the addresses and URLs, and adds the hosts in them to those by which the server may be called. It returns the host to
// listen on.
func (c *httpConfig) checkNames() (host string, err error) {
	if host, err = checkListen(c.listen); err != nil {
		return "", err
	}
	if !(c.rate >= 0) || c.idle < 0 {
		return "", errors.New("--rate and --session-idle must not be negative")
	}
	if c.publicURL != "" {
		u, err := url.Parse(c.publicURL)
		if err != nil || !isWeb(u) {
			return "", fmt.Errorf("--public-url %q: give scheme and host, such as https://box.example.com", c.publicURL)
		}
		c.hosts = append(c.hosts, u.Hostname())
		c.publicURL = strings.TrimSuffix(c.publicURL, "/")
	}
	if err := c.tls.check(c.domain, c.publicURL); err != nil {
		return "", err
	}
	if (c.issuer == "") != (c.audience == "") {
		return "", errors.New("--oidc-issuer and --oidc-audience go together")
	}
	if u, err := url.Parse(c.issuer); c.issuer != "" && (err != nil || !isWeb(u)) {
		return "", fmt.Errorf("--oidc-issuer %q: give the URL of an OpenID provider, such as https://login.example.com", c.issuer)
	}
	for _, o := range c.origins {
		u, err := url.Parse(o)
		if err != nil || !isWeb(u) || strings.Trim(u.Path, "/") != "" {
			return "", fmt.Errorf("--origin %q: give scheme and host, such as https://ide.example.com", o)
		}
		c.hosts = append(c.hosts, u.Hostname())
	}
	return host, nil
}

// checkListen returns the host of an address to listen on.
func checkListen(address string) (host string, err error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" {
		return "", fmt.Errorf(
			"--listen %q: name a host and a port, such as 127.0.0.1:8787; to listen on all addresses say so: 0.0.0.0:8787", address)
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return "", fmt.Errorf("--listen %q: a port is a number from 0 to 65535", address)
	}
	return host, nil
}

// isWeb reports whether a URL is one of HTTP, with a host.
func isWeb(u *url.URL) bool { return (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" }

// runHTTP serves any number of clients until it gets a signal.
func runHTTP(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) (err error) {
	c, err := parseHTTP(args, getenv, stderr)
	if err != nil {
		return err
	}
	listener, err := listenTCP(c.listen) // first: a server that cannot listen must not touch the sandboxes of one that runs
	if err != nil {
		return err
	}
	defer listener.Close()
	at := c.tls.scheme() + "://" + listener.Addr().String()
	public := cmp.Or(c.publicURL, at)
	if c.own, err = url.Parse(public); err != nil {
		return err
	}
	if err := c.setDomain(public); err != nil {
		return err
	}
	s, err := newService(c.config, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	door := c.door(s.log)
	defer door.Watch()()
	endpoint := s.mcp.HTTP(c.endpoint(public, door))
	s.gateway.OwnerValid, s.gateway.NewKey = door.AdmitOwner, door.NewKey
	s.metrics.watch(s.manager, s.descriptors, endpoint.Sessions)
	control := c.control(s, door)
	defer control.Close()
	defer s.alsoLocal("http", getenv)()
	web, err := c.web(s, endpoint, control, public)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- serveOn(web, s.descriptors.counted(listener, stranger)) }()
	s.log.Info("serving", "version", version, "url", at+"/mcp", "state_dir", c.stateDir, "runsc", c.runsc)
	if _, err := fmt.Fprintln(stdout, at+"/mcp"); err != nil {
		s.log.Warn("tell the address", "error", err)
	}
	select {
	case err = <-ended:
		endpoint.Close(0)
		return err
	case <-ctx.Done():
	}
	s.log.Info("ending: no new connections; calls in flight have a moment to finish")
	over, cancel := context.WithTimeout(context.Background(), shutdownTime)
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- web.Shutdown(over) }()
	endpoint.Close(drainTime)
	s.gateway.Close() // streams of sandboxes do not end by themselves
	if err := <-stopped; err != nil {
		s.log.Info("connections that do not end by themselves are broken off", "error", err)
		return web.Close()
	}
	return nil
}

// listenTCP listens; its error says what else can be done.
func listenTCP(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		err = fmt.Errorf("%w: another server has it, perhaps a soulbox-mcp; end that, or name another address by --listen", err)
	case errors.Is(err, syscall.EACCES):
		err = fmt.Errorf("%w: ports below 1024 are root's; listen on another port, or allow it: "+
			"'sudo sysctl net.ipv4.ip_unprivileged_port_start=443'", err)
	}
	return l, err
}

func serveOn(web *http.Server, listener net.Listener) error {
	if web.TLSConfig != nil {
		return web.ServeTLS(listener, "", "")
	}
	return web.Serve(listener)
}

// web makes the HTTP server for all paths.
func (c httpConfig) web(s *service, endpoint *mcpserver.HTTP, control *api.Control, public string) (*http.Server, error) {
	web := newWeb(s.gateway.Handler(c.routes(s, endpoint, control, public)), s.log)
	web.Protocols.SetHTTP2(true)
	var err error
	web.TLSConfig, err = c.tls.config(c.stateDir, c.domain, s.manager, s.log)
	return web, err
}

// setDomain decides where sandboxes are reached.
func (c *httpConfig) setDomain(public string) (err error) {
	if c.domain == "" {
		return nil
	}
	if c.gateway, err = api.Base(c.domain, public); err != nil {
		return usageError{fmt.Errorf("--domain: %w", err)}
	}
	own := "api." + strings.ToLower(c.domain)
	if u, err := url.Parse(public); err == nil && strings.HasSuffix(strings.ToLower(u.Hostname()), "."+strings.ToLower(c.domain)) &&
		strings.ToLower(u.Hostname()) != own {
		return usageError{fmt.Errorf("--domain %q contains the server's own name %s: only %s may be below it, the others are sandboxes'",
			c.domain, u.Hostname(), own)}
	}
	c.hosts = append(c.hosts, c.domain, own)
	return nil
}

// control makes the E2B API.
func (c httpConfig) control(s *service, door *access.Door) *api.Control {
	control := &api.Control{Manager: s.manager, Store: s.templates, Builds: s.builds, Gateway: s.gateway, NoNetwork: c.noNetwork,
		Log: s.log, Owner: door.Caller, MayAsk: door.MayAsk, MayRead: door.MayRead,
		Self: client.Server{Version: version, Kind: "http"}}
	if u, err := url.Parse(c.publicURL); err == nil && c.publicURL != "" {
		control.URL = u
	}
	return control
}

// door decides who may use the server. Once there is a key or a provider, clients need a token.
func (c httpConfig) door(log *slog.Logger) *access.Door {
	door := &access.Door{Keys: &access.Keys{Dir: c.stateDir}, Closed: c.allowRemote, Admitted: admitted, NewKey: newKeyHint, Log: log,
		Allowances: access.Allowances{Rate: c.rate}}
	if c.issuer != "" {
		door.Provider = &access.Provider{Issuer: c.issuer, Audience: c.audience}
	}
	door.Required() // logs that there are keys
	return door
}

// endpoint are the options of MCP's endpoint; the door is in them in the form that mcpserver needs.
func (c httpConfig) endpoint(at string, door *access.Door) mcpserver.HTTPOptions {
	a := mcpserver.Admission{Origins: c.origins, Hosts: c.hosts, Log: door.Log, Until: untilOf, Required: door.Required,
		Authenticate: door.Authenticate, NewKey: door.NewKey}
	if door.Provider != nil {
		a.Metadata = at + metadataPath
	}
	return mcpserver.HTTPOptions{Admission: a, SessionIdle: c.idle, Allowances: &door.Allowances}
}

// newKeyHint says how to make a key.
const newKeyHint = "soulbox-mcp key create makes one"

const metadataPath = "/.well-known/oauth-protected-resource"

// routes handles all paths of the server.
func (c httpConfig) routes(s *service, endpoint *mcpserver.HTTP, control *api.Control, at string) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/mcp", s.metrics.count(endpoint))
	guard := endpoint.Admission.Guard
	for _, method := range []string{"GET", "POST", "OPTIONS"} {
		mux.Handle(method+" /v1/sandboxes/{id}/files", s.metrics.count(endpoint.Admission.HostGuard(s.gateway.Files())))
	}
	for pattern, handler := range control.Routes() {
		mux.Handle(pattern, guard(handler))
	}
	mux.Handle("GET /health", guard(s.health()))
	mux.Handle("GET /metrics", endpoint.Admission.Private(c.operator, s.metrics.handler()))
	if c.issuer != "" {
		metadata := guard(answerJSON(func() (any, error) {
			return map[string]any{"resource": at + "/mcp", "authorization_servers": []string{c.issuer},
				"bearer_methods_supported": []string{"header"}}, nil
		}))
		mux.Handle("GET "+metadataPath, metadata)
		mux.Handle("GET "+metadataPath+"/mcp", metadata)
	}
	return mux
}

// health reports whether the server works, and how much memory is free. It reveals nothing about any sandbox.
func (s *service) health() http.Handler {
	began, hard := time.Now(), (&gvisor.Runtime{}).HardLimits()
	return answerJSON(func() (any, error) {
		free, err := s.manager.FreeMemory()
		if err != nil {
			return nil, err
		}
		return map[string]any{"status": "ok", "version": version, "uptime_s": int64(time.Since(began).Seconds()),
			"free_memory_mb": free >> 30 << 10, "hard_limits": hard}, nil
	})
}

func answerJSON(of func() (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		v, err := of()
		status := http.StatusOK
		if err != nil {
			v, status = map[string]any{"status": "failing", "error": err.Error()}, http.StatusServiceUnavailable
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(v) // an error means that the client is gone
	})
}
