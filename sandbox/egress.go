package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/time/rate"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/agent"
)

// never lists the addresses that no sandbox can reach: those of this machine, its networks and its cloud (IANA special-purpose address
// registries).
var never = func() (all []netip.Prefix) {
	for _, p := range []string{
		"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16",
		"198.18.0.0/15", "224.0.0.0/3",
		"::/127", "64:ff9b:1::/48", "100::/64", "2002::/16", "2001::/23", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
	} {
		all = append(all, netip.MustParsePrefix(p))
	}
	return all
}()

// nat64 is the prefix of IPv6 addresses that hold an IPv4 address in their last four bytes (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// isPublic reports whether an address is on the public Internet.
func isPublic(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if nat64.Contains(a) {
		b := a.As16()
		a = netip.AddrFrom4([4]byte(b[12:]))
	}
	return a.IsValid() && !slices.ContainsFunc(never, func(p netip.Prefix) bool { return p.Contains(a) })
}

// isOwn reports whether an address belongs to this machine or, if it is IPv6, to a network that this machine is on: such addresses look as
// global as any other. It reads the interfaces on every call, because they change.
func isOwn(a netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return true
	}
	a = a.Unmap().WithZone("")
	for _, own := range addrs {
		p, err := netip.ParsePrefix(own.String())
		if err == nil && (p.Addr().Unmap() == a || a.Is6() && p.Bits() > 0 && p.Masked().Contains(a)) {
			return true
		}
	}
	return false
}

// RefusePrivate is a Control function for a net.Dialer that connects to public addresses only.
func RefusePrivate(_, address string, _ syscall.RawConn) error {
	ip, err := netip.ParseAddrPort(address)
	if err != nil || !isPublic(ip.Addr()) || isOwn(ip.Addr()) {
		return fmt.Errorf("%s is an address of this machine or of a private network: %w", address, ErrRefused)
	}
	return nil
}

// ErrRefused means that a sandbox may not make a connection.
var ErrRefused = errors.New("the network of this sandbox does not allow it")

// ProxyAddress is where the proxy of a sandbox with a network listens, on its loopback.
const ProxyAddress = "127.0.0.1:3128"

const proxyPort = 3128

// proxyEnv is the environment by which programs find the proxy.
func proxyEnv() map[string]string {
	env := map[string]string{}
	for _, name := range []string{"http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"} {
		env[name] = "http://" + ProxyAddress
	}
	for _, name := range []string{"no_proxy", "NO_PROXY"} {
		env[name] = "localhost,127.0.0.1,::1"
	}
	env["NODE_USE_ENV_PROXY"] = "1"
	return env
}

// Bounds of a sandbox's connections to the network.
const (
	maxEgress     = 256 // in the sandbox, and as many on the host
	maxEgressIdle = 32  // idle connections on the host, kept for reuse
	maxEgressHost = 64  // to one host
	parked        = 8   // calls that wait for a connection: a burst is accepted at once
	egressDial    = 15 * time.Second
	egressIdle    = 5 * time.Minute
	egressHeaders = 64 << 10
)

// egress is the proxy of a sandbox.
type egress struct {
	network func() (Network, context.Context) // the rules now, and a context that ends when they change
	meter   *meter
	note    func(format string, args ...any)
	log     *slog.Logger
	notes   *rate.Limiter // limits the notes about refusals, which the guest causes
	plain   *http.Transport
	slots   chan struct{}                                                                       // one for each connection to the network
	take    func() (release func(), err error)                                                  // takes one from the owner's account
	reach   func(ctx context.Context, d *net.Dialer, network, address string) (net.Conn, error) // net.Dialer.DialContext, except in tests
}

// newEgress makes a proxy; the caller sets the fields that depend on the sandbox.
func newEgress() *egress {
	e := &egress{meter: &meter{}, log: slog.New(slog.DiscardHandler), notes: rate.NewLimiter(rate.Every(10*time.Second), 10),
		note:  func(string, ...any) {},
		slots: make(chan struct{}, maxEgress), take: func() (func(), error) { return func() {}, nil },
		reach: func(ctx context.Context, d *net.Dialer, network, address string) (net.Conn, error) {
			return d.DialContext(ctx, network, address)
		}}
	e.plain = &http.Transport{DialContext: e.dial, IdleConnTimeout: 30 * time.Second, MaxIdleConns: maxEgressIdle, MaxIdleConnsPerHost: 4,
		MaxConnsPerHost:    maxEgressHost,
		DisableCompression: true, MaxResponseHeaderBytes: egressHeaders, ResponseHeaderTimeout: egressIdle}
	return e
}

// serveNetwork runs the proxy of a sandbox until ctx ends.
func (s *Sandbox) serveNetwork(ctx context.Context, client *agent.Client) {
	e := newEgress()
	e.network, e.meter, e.log = s.network, s.meter, s.m.log
	e.note = func(format string, args ...any) { s.log.note(LevelWarn, format, args...) }
	e.take = func() (func(), error) { return s.m.opts.Accounts.Take(s.owner, access.Connections, 1) }
	defer e.plain.CloseIdleConnections()
	l := &parkedListener{ctx: ctx, client: client, conns: make(chan net.Conn), slots: make(chan struct{}, maxEgress),
		take: func() (func(), error) { return s.connection(ctx, 0) }}
	var once sync.Once
	l.failed = func(err error) {
		once.Do(func() { s.log.note(LevelWarn, "the network of this sandbox does not work; it is tried again: %v", err) })
	}
	server := &http.Server{Handler: e, ReadHeaderTimeout: 30 * time.Second, MaxHeaderBytes: egressHeaders, IdleTimeout: time.Minute,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(s.m.log.Handler(), slog.LevelDebug)}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	l.start()
	if err := server.Serve(l); err != nil && ctx.Err() == nil {
		s.log.note(LevelWarn, "the network of this sandbox does not work: %v", err)
	}
	l.wait.Wait()
}

// parkedListener accepts the connections that programs in the sandbox make to the proxy.
type parkedListener struct {
	ctx    context.Context
	client *agent.Client
	conns  chan net.Conn
	slots  chan struct{}                      // one for each accepted connection, whatever its use
	take   func() (release func(), err error) // takes one from the owner's account
	failed func(error)                        // called with the reason why there are no connections
	wait   sync.WaitGroup
}

func (l *parkedListener) start() {
	for range parked {
		l.wait.Go(func() {
			for l.next() {
			}
		})
	}
}

// next waits for a connection, and reports whether there may be more. If another program in the sandbox uses the address, next tries again.
func (l *parkedListener) next() bool {
	select {
	case l.slots <- struct{}{}:
	case <-l.ctx.Done():
		return false
	}
	free := sync.OnceFunc(func() { <-l.slots })
	conn, err := l.client.Accept(l.ctx, ProxyAddress)
	if err != nil {
		free()
		if l.ctx.Err() != nil || errors.Is(err, agent.ErrLost) {
			return false
		}
		l.failed(err)
		select {
		case <-time.After(time.Second):
			return true
		case <-l.ctx.Done():
			return false
		}
	}
	release, err := l.take()
	if err != nil {
		_, _ = io.WriteString(conn, page(http.StatusServiceUnavailable, "SoulBox: "+err.Error()+
			".\n")) // into a buffer; if the client is gone, nothing is lost
		_ = conn.Close()
		free()
		return true
	}
	held := &slotConn{conn, func() { release(); free() }}
	select {
	case l.conns <- held:
		return true
	case <-l.ctx.Done():
		_ = held.Close()
		return false
	}
}

// slotConn releases what was taken for the connection when it is closed; Close may be called more than once.
type slotConn struct {
	net.Conn
	free func()
}

// Close implements net.Conn.
func (c *slotConn) Close() error {
	c.free()
	return c.Conn.Close()
}

// Accept implements net.Listener.
func (l *parkedListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener and does nothing: the context closes the listener.
func (l *parkedListener) Close() error { return nil }

// Addr implements net.Listener.
func (l *parkedListener) Addr() net.Addr { return &net.TCPAddr{} }

// ServeHTTP implements http.Handler as a proxy (RFC 9110, 9.3.6 and RFC 9112, 3.2.2).
func (e *egress) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method == http.MethodConnect:
		e.connect(w, r)
	case r.URL.Scheme == "http" && r.URL.Host != "":
		proxy := &httputil.ReverseProxy{Rewrite: func(p *httputil.ProxyRequest) { p.Out.Host = p.In.Host }, Transport: e.plain,
			FlushInterval: -1, ErrorLog: slog.NewLogLogger(e.log.Handler(), slog.LevelDebug),
			ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) { e.fail(w, r.URL.Host, false, err) }}
		proxy.ServeHTTP(w, r)
	default:
		http.Error(w, "SoulBox: this is the proxy to the network; it takes http:// addresses and CONNECT.", http.StatusBadRequest)
	}
}

// fail tells the client why there is no connection. If the rules refuse a plain request, fail only closes the connection, as a host that
// refuses it would.
func (e *egress) fail(w http.ResponseWriter, to string, tunnel bool, err error) {
	if errors.Is(err, ErrRefused) {
		if e.notes.Allow() {
			e.note("a connection to %s was refused: %s", agent.Inert([]byte(to)), agent.Inert([]byte(err.Error())))
		}
		if !tunnel { // a response would look like the host's own, and clients that want no more than a response would call it a success
			panic(http.ErrAbortHandler)
		}
		http.Error(w, "SoulBox: "+err.Error()+".", http.StatusForbidden)
		return
	}
	if errors.Is(err, access.ErrFull) || errors.Is(err, errCrowded) {
		http.Error(w, "SoulBox: "+err.Error()+".", http.StatusServiceUnavailable)
		return
	}
	why := err.Error()
	var dns *net.DNSError
	if errors.As(err, &dns) { // do not reveal the host's resolver
		why = fmt.Sprintf("%s: %s", dns.Name, dns.Err)
	}
	if e.notes.Allow() && !errors.Is(err, context.Canceled) {
		e.note("no connection to %s: %s", agent.Inert([]byte(to)), agent.Inert([]byte(why)))
	}
	http.Error(w, "SoulBox: "+why, http.StatusBadGateway)
}

// connect makes a tunnel.
func (e *egress) connect(w http.ResponseWriter, r *http.Request) {
	out, err := e.dial(r.Context(), "tcp", r.Host)
	if err != nil {
		e.fail(w, r.Host, true, err)
		return
	}
	defer out.Close()
	in, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		e.fail(w, r.Host, true, err)
		return
	}
	defer in.Close()
	defer context.AfterFunc(r.Context(), func() { _ = errors.Join(out.Close(), in.Close()) })()
	if _, err := io.WriteString(in, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	var both sync.WaitGroup
	both.Go(func() {
		_, err := io.Copy(out, buffered)
		if half, ok := out.(interface{ CloseWrite() error }); ok && err == nil {
			_ = half.CloseWrite()
			return
		}
		_ = out.Close()
	})
	both.Go(func() {
		_, _ = io.Copy(in, out) // whichever side ends it, both end
		_ = in.Close()
		_ = out.Close()
	})
	both.Wait()
}

// dial connects to a host on the network, if the rules allow it. The address is checked when it is connected to, whatever the name resolves
// to by then.
func (e *egress) dial(ctx context.Context, _, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("%q is no host and port: %w", address, ErrRefused)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return nil, fmt.Errorf("%q is no port: %w", port, ErrRefused)
	}
	addr, err := netip.ParseAddr(host)
	name := ""
	if err != nil {
		if name, err = hostName(host); err != nil {
			return nil, errors.Join(ErrRefused, err)
		}
	} else if addr = addr.Unmap().WithZone(""); !isPublic(addr) {
		return nil, fmt.Errorf("%s is an address of this machine or of a private network: %w", addr, ErrRefused)
	}
	rules, changed := e.network()
	byName := rules.permits(name, addr)
	if !byName && name != "" && !rules.hasRanges() || !byName && name == "" {
		return nil, fmt.Errorf("%s: %w", host, ErrRefused)
	}
	d := net.Dialer{Timeout: egressDial, Control: func(network, to string, c syscall.RawConn) error {
		ip, err := netip.ParseAddrPort(to)
		if err == nil {
			err = RefusePrivate(network, to, c)
		}
		if err != nil {
			return err
		}
		if !byName && !rules.permits("", ip.Addr().Unmap()) {
			return fmt.Errorf("%s: %w", to, ErrRefused)
		}
		return nil
	}}
	target := name
	if name == "" {
		target = addr.String()
	}
	release, err := e.place()
	if err != nil {
		return nil, err
	}
	conn, err := e.reach(ctx, &d, "tcp", net.JoinHostPort(target, port))
	if err != nil {
		release()
		return nil, err
	}
	c := &worldConn{Conn: conn, meter: e.meter, release: release}
	c.unwatch = context.AfterFunc(changed, func() { _ = conn.Close() })
	return c, nil
}

// errCrowded means that a sandbox has as many connections to the network as it may have.
var errCrowded = fmt.Errorf("the sandbox has %d connections to the network, the most one may have; close some", maxEgress)

// place takes what one connection to the network needs. If there is no room, idle connections are closed first.
func (e *egress) place() (release func(), err error) {
	if release, err = e.placeNow(); err != nil {
		e.plain.CloseIdleConnections()
		release, err = e.placeNow()
	}
	return release, err
}

func (e *egress) placeNow() (release func(), err error) {
	select {
	case e.slots <- struct{}{}:
	default:
		return nil, errCrowded
	}
	give, err := e.take()
	if err != nil {
		<-e.slots
		return nil, err
	}
	return sync.OnceFunc(func() { give(); <-e.slots }), nil
}

// worldConn is a connection to the network: it counts its bytes, and ends when nothing is transferred for egressIdle.
type worldConn struct {
	net.Conn
	meter   *meter
	unwatch func() bool
	release func()
}

// Close implements net.Conn.
func (c *worldConn) Close() error {
	c.unwatch()
	defer c.release()
	return c.Conn.Close()
}

// Read implements io.Reader: it counts bytes that come in to the sandbox.
func (c *worldConn) Read(p []byte) (int, error) {
	_ = c.SetReadDeadline(time.Now().Add(egressIdle)) // if the connection has ended, the read below fails
	n, err := c.Conn.Read(p)
	c.meter.count(int64(n), 0)
	return n, err
}

// Write implements io.Writer.
func (c *worldConn) Write(p []byte) (int, error) {
	_ = c.SetDeadline(time.Now().Add(egressIdle)) // of reads too: a response may come after all is sent
	n, err := c.Conn.Write(p)
	c.meter.count(0, int64(n))
	return n, err
}

// CloseWrite ends the direction from the sandbox.
func (c *worldConn) CloseWrite() error {
	if half, ok := c.Conn.(*net.TCPConn); ok {
		return half.CloseWrite()
	}
	return nil
}
