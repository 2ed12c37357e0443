package sandbox

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	maxExposed   = 64               // ports of one sandbox
	maxConns     = 512              // connections to one sandbox at once; more wait
	dialTime     = 10 * time.Second // for the sandbox to accept a connection
	maxStrangers = 4                // clients that are told at once that they are refused
	peekTime     = 2 * time.Second  // for a client to show whether it speaks HTTP, if nothing listens
	listenPoll   = 50 * time.Millisecond
	hostBuffer   = 128 << 10 // bytes that the host's kernel buffers for a client that does not read; the default would be some MB
	maxListening = 1 << 20   // bytes of the guest's list of sockets
)

// Port is a port of a sandbox that can be reached on this machine.
type Port struct {
	Port int `json:"port"`      // in the sandbox
	Host int `json:"host_port"` // on the host's loopback
	// Public means that a gateway serves the port to everybody, not only to clients that show the sandbox's traffic token.
	Public bool `json:"public,omitempty"`
}

// Address returns where the port is reached on this machine.
func (p Port) Address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(p.Host)) }

// exposed is a port that is being served.
type exposed struct {
	Port
	listener net.Listener
	cancel   context.CancelFunc
	conns    sync.WaitGroup
	// strangers bounds the clients that are being told why they are refused.
	strangers chan struct{}
	// gate ends when the connections that a gateway let through must end.
	gate     context.Context
	shutGate context.CancelFunc
}

// ports are the exposed ports of a sandbox, and the connections to all of its ports. It is safe for concurrent use. Its lock is taken
// before the sandbox's.
type ports struct {
	sb    *Sandbox
	slots chan struct{} // one for each connection

	mu      sync.Mutex
	open    map[int]*exposed
	stopped bool // for good
}

func newPorts(sb *Sandbox) ports {
	return ports{sb: sb, slots: make(chan struct{}, maxConns), open: map[int]*exposed{}}
}

func (e *exposed) openGate() { e.gate, e.shutGate = context.WithCancel(context.Background()) }

// Expose makes a port of the sandbox reachable through a gateway, and on the host's loopback at a number that stays the same as long as the
// sandbox lives. If the port is exposed already, its number stays, and public applies to it.
func (p *ports) Expose(port int, public bool) (Port, error) { return p.ExposeAt(port, public, 0) }

// ExposeAt is Expose at a loopback port of the host that the caller chose, and at no other; 0 leaves the choice to the server.
func (p *ports) ExposeAt(port int, public bool, host int) (Port, error) {
	if port < 1 || port > 65535 {
		return Port{}, fmt.Errorf("expose port %d: a port is from 1 to 65535: %w", port, ErrInvalid)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	r, err := p.sb.alive("expose a port of")
	if err != nil {
		return Port{}, err
	}
	if e := p.open[port]; e != nil {
		err := p.publish(e, public)
		return e.Port, err
	}
	if len(p.open) >= maxExposed {
		return Port{}, fmt.Errorf("expose port %d: %d are exposed already: %w", port, maxExposed, ErrInvalid)
	}
	same := func(p Port) bool { return p.Port == port }
	want := Port{Port: port, Public: public, Host: host}
	if i := slices.IndexFunc(r.Ports, same); i >= 0 { // it could not be exposed again when the sandbox was adopted
		want.Host = cmp.Or(host, r.Ports[i].Host)
	}
	e, err := p.serve(want)
	if err != nil && want.Host != 0 && host == 0 {
		e, err = p.serve(Port{Port: port, Public: public})
	}
	if err != nil {
		return Port{}, fmt.Errorf("expose port %d: %w", port, err)
	}
	err = p.record(func(all []Port) []Port { return append(slices.DeleteFunc(all, same), e.Port) }, "port %d is exposed", port)
	if err != nil {
		e.stop()
		return Port{}, err
	}
	p.open[port] = e
	return e.Port, nil
}

// record changes the list of ports in the sandbox's record, and logs that. The record of a sandbox that has ended, or was left to another
// server, stays as it is.
func (p *ports) record(change func([]Port) []Port, format string, args ...any) error {
	s := p.sb
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isAlive() {
		return s.wrong("change the ports of")
	}
	r := s.rec
	r.Ports = change(slices.Clone(r.Ports))
	if err := s.commit(r); err != nil {
		return err
	}
	s.logChange(format, args...)
	return nil
}

// publish makes an exposed port public or not public. p.mu is held.
func (p *ports) publish(e *exposed, public bool) error {
	if e.Public == public {
		return nil
	}
	err := p.record(func(all []Port) []Port {
		for i := range all {
			if all[i].Port == e.Port.Port {
				all[i].Public = public
			}
		}
		return all
	}, "port %d is public: %t", e.Port.Port, public)
	if err != nil {
		return err
	}
	e.Public = public
	e.shutGate() // connections that were made without the token end
	e.openGate()
	return nil
}

// TrafficToken is what a gateway's clients show to reach a port that is not public. It is a secret.
func (p *ports) TrafficToken() string { return p.sb.current().Traffic }

// Reachable reports whether a gateway can reach a port, and whether everybody can.
func (p *ports) Reachable(port int) (public, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.open[port]; e != nil {
		return e.Public, true
	}
	r := p.sb.current()
	return r.Ingress.Open == OpenPublic, r.Ingress.Open != "" && !r.ended()
}

// gate returns the context that bounds a gateway's connections to a port; nil if they are not allowed.
func (p *ports) gate(port int) context.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.open[port]; e != nil {
		return e.gate
	}
	if r := p.sb.current(); r.Ingress.Open == "" || r.ended() {
		return nil
	}
	return p.sb.ctx
}

// ErrNothingListens means that nothing in the sandbox listens on the port.
var ErrNothingListens = errors.New("nothing listens on the port")

// ErrBusy means that the sandbox has as many connections as it may have, or that its owner's account is full.
var ErrBusy = errors.New("too many connections to the sandbox")

// Dial connects a gateway to a port of the sandbox that is exposed or open. Closing the connection ends both directions; it also ends when
// the port is closed or when its Public changes. If the sandbox or its owner has as many connections as allowed, Dial waits for a while;
// then the error is ErrBusy.
func (p *ports) Dial(ctx context.Context, port int) (net.Conn, error) {
	client, err := p.sb.Agent(ctx, "connect to a port of")
	if err != nil {
		return nil, err
	}
	gate := p.gate(port)
	if gate == nil {
		return nil, fmt.Errorf("port %d: %w", port, ErrNotExposed)
	}
	busy := time.NewTimer(dialTime)
	defer busy.Stop()
	select {
	case p.slots <- struct{}{}:
	case <-gate.Done():
		return nil, fmt.Errorf("port %d: %w", port, ErrNotExposed)
	case <-busy.C:
		return nil, fmt.Errorf("port %d: %w", port, ErrBusy)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	giveBack, err := p.sb.connection(ctx, p.sb.m.opts.ConnWait)
	if err != nil {
		<-p.slots
		return nil, fmt.Errorf("port %d: %w: %w", port, ErrBusy, err)
	}
	// The connection outlives the request that it is made for.
	life, cancel := context.WithCancel(gate)
	stop := context.AfterFunc(ctx, cancel)
	stream, release, err := p.dial(life, client, port)
	if !stop() && err == nil {
		release()
		err = context.Cause(ctx)
	}
	if err != nil {
		cancel()
		giveBack()
		<-p.slots
		return nil, fmt.Errorf("port %d: %w: %w", port, ErrNothingListens, err)
	}
	return &portConn{Conn: stream, life: life, end: sync.OnceFunc(func() {
		cancel()
		release()
		giveBack()
		<-p.slots
	})}, nil
}

// portConn is a connection to a port of a sandbox.
type portConn struct {
	net.Conn
	life context.Context
	end  func()
}

// Read fails once the connection is to end: what the server in the sandbox sends when it sees that, such as a proper end of the stream,
// must not reach the client.
func (c *portConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.life.Err() != nil {
		return 0, net.ErrClosed
	}
	return n, err
}

// Close ends both directions.
func (c *portConn) Close() error {
	c.end()
	return nil
}

// ErrNotExposed means that a port is not exposed.
var ErrNotExposed = errors.New("port is not exposed")

// Unexpose undoes Expose and ends the connections to the port.
func (p *ports) Unexpose(port int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.open[port]
	if e == nil {
		return fmt.Errorf("close port %d: %w", port, ErrNotExposed)
	}
	err := p.record(func(all []Port) []Port {
		return slices.DeleteFunc(all, func(p Port) bool { return p.Port == port })
	}, "port %d is not exposed any more", port)
	if err != nil {
		return err
	}
	delete(p.open, port)
	e.stop()
	p.sb.m.work.Go(e.conns.Wait)
	return nil
}

// Ports lists the exposed ports.
func (p *ports) Ports() []Port {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []Port
	for _, port := range slices.Sorted(maps.Keys(p.open)) {
		list = append(list, p.open[port].Port)
	}
	return list
}

// serve starts to listen for a port, at port.Host if that is not 0.
func (p *ports) serve(port Port) (*exposed, error) {
	l, err := p.sb.m.opts.Listen("tcp", port.Address())
	if err != nil {
		return nil, err
	}
	port.Host = l.Addr().(*net.TCPAddr).Port
	ctx, cancel := context.WithCancel(context.Background())
	e := &exposed{Port: port, listener: l, cancel: cancel, strangers: make(chan struct{}, maxStrangers)}
	e.openGate()
	e.conns.Go(func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // such as out of descriptors: there may be some later
				time.Sleep(listenPoll)
				continue
			}
			if !p.accept(ctx, e, conn) {
				return
			}
		}
	})
	return e, nil
}

// accept looks after a connection to the host's loopback, and reports whether more may come.
func (p *ports) accept(ctx context.Context, e *exposed, conn net.Conn) (more bool) {
	if err := p.admit(e, conn); err != nil {
		e.tellRefused(conn,
			fmt.Sprintf("This port is not public, and your connection is refused: %v. Open it as the user whose server this is, "+
				"or expose the port as public.\n", err))
		return true
	}
	select {
	case p.slots <- struct{}{}:
	case <-ctx.Done():
		_ = conn.Close()
		return false
	}
	if tcp, ok := conn.(interface{ SetWriteBuffer(bytes int) error }); ok {
		_ = tcp.SetWriteBuffer(hostBuffer) // if the connection has ended, that shows later
	}
	// The next ones wait in the listener, where they use no descriptor of the server.
	giveBack, err := p.sb.connection(ctx, p.sb.m.opts.ConnWait)
	e.conns.Go(func() {
		defer func() { <-p.slots }()
		defer conn.Close()
		if err != nil {
			sayNot(conn, http.StatusServiceUnavailable, fmt.Sprintf("There is no room for this connection: %v.\n", err))
			return
		}
		defer giveBack()
		p.splice(ctx, conn, e.Port.Port)
	})
	return true
}

// restore serves the ports that another server served.
func (p *ports) restore() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return
	}
	for _, port := range p.sb.current().Ports {
		e, err := p.serve(port)
		if err != nil {
			p.sb.m.log.Error("expose port again", "sandbox", p.sb.id, "port", port.Port, "error", err)
			continue
		}
		p.open[port.Port] = e
	}
}

// stop closes all ports for good. Call wait after the agent's pipe is closed. stop is called without locks.
func (p *ports) stop() (wait func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := slices.Collect(maps.Values(p.open))
	clear(p.open)
	p.stopped = true
	for _, e := range all {
		e.stop()
	}
	return func() {
		for _, e := range all {
			e.conns.Wait()
		}
	}
}

// stop closes the port without waiting: until the guest's pipe is closed, a connection may hang on a guest that reads nothing.
func (e *exposed) stop() {
	_ = e.listener.Close() // ends Accept
	e.cancel()
	e.shutGate()
}

// Listening lists the TCP ports on which the user's programs listen in the sandbox.
func (p *ports) Listening(ctx context.Context) ([]int, error) {
	client, err := p.sb.Look("look for listening ports in")
	if err != nil {
		return nil, err
	}
	found := map[int]bool{}
	for _, name := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		r, _, err := client.ReadFile(ctx, name, 0, maxListening)
		if err != nil {
			return nil, err
		}
		body, err := io.ReadAll(r)
		_ = r.Close() // it has been read
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(body)) {
			if port, ok := listeningPort(line); ok {
				found[port] = true
			}
		}
	}
	if p.sb.current().Network.On() {
		delete(found, proxyPort)
	}
	return slices.Sorted(maps.Keys(found)), nil
}

// listeningPort parses a line of /proc/net/tcp (proc(5)): "sl local_address rem_address st"; state 0A is a listening socket.
func listeningPort(line string) (int, bool) {
	fields := strings.Fields(line)
	if len(fields) < 4 || fields[3] != "0A" {
		return 0, false
	}
	_, port, _ := strings.Cut(fields[1], ":")
	b, err := hex.DecodeString(port)
	if err != nil || len(b) != 2 {
		return 0, false
	}
	return int(b[0])<<8 | int(b[1]), true
}

// AwaitPort waits until something listens on a port, for at most wait, and reports whether it does.
func (p *ports) AwaitPort(ctx context.Context, port int, wait time.Duration) (bool, error) {
	for end := time.Now().Add(wait); ; {
		list, err := p.Listening(ctx)
		if err != nil || slices.Contains(list, port) || !time.Now().Before(end) {
			return slices.Contains(list, port), err
		}
		timer := time.NewTimer(min(listenPoll, time.Until(end)))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return false, context.Cause(ctx)
		}
	}
}
