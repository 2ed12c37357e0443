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

func (e *exposed) openGate() { e.gate, e.shutGate = context.WithCancel(context.Background()) }

// Expose makes a port of the sandbox reachable through a gateway, and on the host's loopback at a number that stays the same as long as the
// sandbox lives. If the port is exposed already, its number stays, and public applies to it.
func (s *Sandbox) Expose(port int, public bool) (Port, error) { return s.ExposeAt(port, public, 0) }

// ExposeAt is Expose at a loopback port of the host that the caller chose, and at no other; 0 leaves the choice to the server.
func (s *Sandbox) ExposeAt(port int, public bool, host int) (Port, error) {
	if port < 1 || port > 65535 {
		return Port{}, fmt.Errorf("expose port %d: a port is from 1 to 65535: %w", port, ErrInvalid)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rec.State != Running && s.rec.State != Paused || s.isLeft() {
		return Port{}, s.wrong("expose a port of")
	}
	if e := s.ports[port]; e != nil {
		return e.Port, s.publish(e, public)
	}
	if len(s.ports) >= maxExposed {
		return Port{}, fmt.Errorf("expose port %d: %d are exposed already: %w", port, maxExposed, ErrInvalid)
	}
	r := s.rec
	r.Ports = slices.Clone(r.Ports)
	want := Port{Port: port, Public: public, Host: host}
	if i := slices.IndexFunc(r.Ports,
		func(p Port) bool { return p.Port == port }); i >= 0 { // it could not be exposed again when the sandbox was adopted
		want.Host = cmp.Or(host, r.Ports[i].Host)
		r.Ports = slices.Delete(r.Ports, i, i+1)
	}
	e, err := s.serve(want)
	if err != nil && want.Host != 0 && host == 0 {
		e, err = s.serve(Port{Port: port, Public: public})
	}
	if err != nil {
		return Port{}, fmt.Errorf("expose port %d: %w", port, err)
	}
	r.Ports = append(r.Ports, e.Port)
	if err := s.m.store.save(r); err != nil {
		e.stop()
		return Port{}, err
	}
	s.rec = r
	s.ports[port] = e
	s.logChange("port %d is exposed", port)
	return e.Port, nil
}

// publish makes an exposed port public or not public. s.mu is held.
func (s *Sandbox) publish(e *exposed, public bool) error {
	if e.Public == public {
		return nil
	}
	r := s.rec
	r.Ports = slices.Clone(r.Ports)
	for i := range r.Ports {
		if r.Ports[i].Port == e.Port.Port {
			r.Ports[i].Public = public
		}
	}
	if err := s.m.store.save(r); err != nil {
		return err
	}
	s.rec = r
	e.Public = public
	e.shutGate() // connections that were made without the token end
	e.openGate()
	s.logChange("port %d is public: %t", e.Port.Port, public)
	return nil
}

// TrafficToken is what a gateway's clients show to reach a port that is not public. It is a secret.
func (s *Sandbox) TrafficToken() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec.Traffic
}

// ErrNothingListens means that nothing in the sandbox listens on the port.
var ErrNothingListens = errors.New("nothing listens on the port")

// ErrBusy means that the sandbox has as many connections as it may have, or that its owner's account is full.
var ErrBusy = errors.New("too many connections to the sandbox")

// Dial connects a gateway to a port of the sandbox that is exposed or open. Closing the connection ends both directions; it also ends when
// the port is closed or when its Public changes. If the sandbox or its owner has as many connections as allowed, Dial waits for a while;
// then the error is ErrBusy.
func (s *Sandbox) Dial(ctx context.Context, port int) (net.Conn, error) {
	client, err := s.Agent(ctx, "connect to a port of")
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	gate := s.gate(port)
	s.mu.Unlock()
	if gate == nil {
		return nil, fmt.Errorf("port %d: %w", port, ErrNotExposed)
	}
	busy := time.NewTimer(dialTime)
	defer busy.Stop()
	select {
	case s.connSlots <- struct{}{}:
	case <-gate.Done():
		return nil, fmt.Errorf("port %d: %w", port, ErrNotExposed)
	case <-busy.C:
		return nil, fmt.Errorf("port %d: %w", port, ErrBusy)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	giveBack, err := s.connection(ctx, s.m.opts.ConnWait)
	if err != nil {
		<-s.connSlots
		return nil, fmt.Errorf("port %d: %w: %w", port, ErrBusy, err)
	}
	// The connection outlives the request that it is made for.
	life, cancel := context.WithCancel(gate)
	stop := context.AfterFunc(ctx, cancel)
	stream, release, err := s.dial(life, client, port)
	if !stop() && err == nil {
		release()
		err = context.Cause(ctx)
	}
	if err != nil {
		cancel()
		giveBack()
		<-s.connSlots
		return nil, fmt.Errorf("port %d: %w: %w", port, ErrNothingListens, err)
	}
	return &portConn{Conn: stream, life: life, end: sync.OnceFunc(func() {
		cancel()
		release()
		giveBack()
		<-s.connSlots
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
func (s *Sandbox) Unexpose(port int) error {
	s.mu.Lock()
	e := s.ports[port]
	if e == nil {
		s.mu.Unlock()
		return fmt.Errorf("close port %d: %w", port, ErrNotExposed)
	}
	r := s.rec
	r.Ports = slices.DeleteFunc(slices.Clone(r.Ports), func(p Port) bool { return p.Port == port })
	err := s.m.store.save(r)
	if err == nil {
		s.rec = r
		delete(s.ports, port)
		s.logChange("port %d is not exposed any more", port)
	}
	s.mu.Unlock()
	if err == nil {
		e.stop()
		s.m.work.Go(e.conns.Wait)
	}
	return err
}

// Ports lists the exposed ports.
func (s *Sandbox) Ports() []Port {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Port
	for _, port := range slices.Sorted(maps.Keys(s.ports)) {
		list = append(list, s.ports[port].Port)
	}
	return list
}

// serve starts to listen for a port, at p.Host if that is not 0. s.mu is held.
func (s *Sandbox) serve(p Port) (*exposed, error) {
	l, err := s.m.opts.Listen("tcp", p.Address())
	if err != nil {
		return nil, err
	}
	if s.ports == nil {
		s.ports = map[int]*exposed{}
	}
	p.Host = l.Addr().(*net.TCPAddr).Port
	ctx, cancel := context.WithCancel(context.Background())
	e := &exposed{Port: p, listener: l, cancel: cancel, strangers: make(chan struct{}, maxStrangers)}
	e.openGate()
	slots := s.connSlots
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
			if err := s.lets(e, conn); err != nil {
				e.turnAway(conn,
					fmt.Sprintf("This port is not public, and your connection is refused: %v. Open it as the user whose server this is, "+
						"or expose the port as public.\n", err))
				continue
			}
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				_ = conn.Close()
				return
			}
			if tcp, ok := conn.(interface{ SetWriteBuffer(bytes int) error }); ok {
				_ = tcp.SetWriteBuffer(hostBuffer) // if the connection has ended, that shows later
			}
			giveBack, err := s.connection(ctx,
				s.m.opts.ConnWait) // the next ones wait in the listener, where they use no descriptor of the server
			e.conns.Go(func() {
				defer func() { <-slots }()
				defer conn.Close()
				if err != nil {
					sayNot(conn, http.StatusServiceUnavailable, fmt.Sprintf("There is no room for this connection: %v.\n", err))
					return
				}
				defer giveBack()
				s.splice(ctx, conn, p.Port)
			})
		}
	})
	return e, nil
}

// serveAgain serves the ports of an adopted sandbox. s.mu is held.
func (s *Sandbox) serveAgain() {
	for _, p := range s.rec.Ports {
		e, err := s.serve(p)
		if err != nil {
			s.m.log.Error("expose port again", "sandbox", s.id, "port", p.Port, "error", err)
			continue
		}
		s.ports[p.Port] = e
	}
}

// stopPorts closes all ports. Call wait after the agent's pipe is closed. stopPorts is called without locks.
func (s *Sandbox) stopPorts() (wait func()) {
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.ports))
	s.ports = nil
	s.mu.Unlock()
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
func (s *Sandbox) Listening(ctx context.Context) ([]int, error) {
	client, err := s.Look("look for listening ports in")
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
	if s.current().Network.On() {
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
func (s *Sandbox) AwaitPort(ctx context.Context, port int, wait time.Duration) (bool, error) {
	for end := time.Now().Add(wait); ; {
		list, err := s.Listening(ctx)
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
