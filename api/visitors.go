package api

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/api/envd"
	"soulbox.dev/soulbox/sandbox"
)

const (
	maxVisitor = 128              // requests and tunnels of one address at once
	stallTime  = 60 * time.Second // how long a client may read nothing while there is something to send
)

// visitors counts the requests and tunnels of each address. It is safe for concurrent use.
type visitors struct {
	mu sync.Mutex
	by map[netip.Prefix]int
}

// admit counts one more until leave is called, if the address may have it. An address of this machine belongs to a local user or to a proxy
// in front of the gateway, and has no bound.
func (v *visitors) admit(remote string) (leave func(), ok bool) {
	from, err := netip.ParseAddrPort(remote)
	if err != nil || from.Addr().Unmap().IsLoopback() {
		return func() {}, true
	}
	addr, bits := from.Addr().Unmap().WithZone(""), 32
	if addr.Is6() {
		bits = 64 // one customer has at least a /64
	}
	network, err := addr.Prefix(bits)
	if err != nil {
		return func() {}, true // cannot happen: the bits fit the address
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.by[network] >= maxVisitor {
		return nil, false
	}
	if v.by == nil {
		v.by = map[netip.Prefix]int{}
	}
	v.by[network]++
	return sync.OnceFunc(func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.by[network]--; v.by[network] == 0 {
			delete(v.by, network)
		}
	}), true
}

// isHealth reports whether a request only asks whether a sandbox lives. Such a request must work even when the owner's account is full.
func isHealth(r *http.Request, port int) bool {
	return port == envd.Port && r.Method == http.MethodGet && r.URL.Path == "/health"
}

// charge takes the cost of a request for a port from the account of the sandbox's owner. A connection into the sandbox costs more.
func (g *Gateway) charge(sb *sandbox.Sandbox, r *http.Request, port int) (release func(), err error) {
	if isHealth(r, port) {
		return func() {}, nil
	}
	buffers := int64(0)
	if port == envd.Port {
		buffers = insideBuffers(r.URL.Path)
	}
	return takeRequest(r.Context(), g.Manager, sb.Info().Owner, buffers)
}

// charged is charge; if the account is full, it answers the request and returns false.
func (g *Gateway) charged(w http.ResponseWriter, r *http.Request, sb *sandbox.Sandbox, port int) (release func(), ok bool) {
	release, err := g.charge(sb, r, port)
	if err == nil {
		return release, true
	}
	if port != envd.Port || !envd.Refuse(w, r, http.StatusServiceUnavailable, err.Error()) {
		failure{SandboxID: sb.ID(), Port: port, Code: http.StatusServiceUnavailable, Message: err.Error()}.write(w, r)
	}
	return nil, false
}

// insideBuffers returns how many bytes of buffers a request to envd's services holds at most.
func insideBuffers(path string) int64 {
	if strings.HasSuffix(path, "/files") {
		return agent.FileBuffers
	}
	return agent.StreamBuffers
}

// charge takes the cost of a request from its owner's account. Requests that only read, or that free something, are not charged, so that
// they work when the account is full.
func (c *Control) charge(r *http.Request, owner string) (release func(), err error) {
	switch {
	case strings.Contains(r.URL.Path, "/envd/"):
		if path := "/" + r.PathValue("path"); r.Method != http.MethodGet || path != "/health" {
			return takeRequest(r.Context(), c.Manager, owner, insideBuffers(path))
		}
	case r.Method == http.MethodPut && r.PathValue("hash") != "":
		return takeRequest(r.Context(), c.Manager, owner, agent.FileBuffers)
	case r.Method != http.MethodGet && r.Method != http.MethodHead && r.Method != http.MethodDelete &&
		!strings.HasSuffix(r.URL.Path, "/pause"):
		return takeRequest(r.Context(), c.Manager, owner, 0)
	}
	return func() {}, nil
}

// takeRequest takes the cost of one request from an owner's account. It waits for a while if the account is full.
func takeRequest(ctx context.Context, m *sandbox.Manager, owner string, buffers int64) (release func(), err error) {
	return m.Accounts().TakeAll(ctx, m.ConnWait(), owner, access.Part{Of: access.Connections, N: 1},
		access.Part{Of: access.Buffers, N: buffers})
}

// stalling ends an answer, or the tunnel that it becomes, when its client has read nothing for too long.
type stalling struct {
	http.ResponseWriter
	limit time.Duration
}

// Write implements io.Writer.
func (s stalling) Write(p []byte) (int, error) {
	defer s.setDeadline()()
	return s.ResponseWriter.Write(p)
}

// FlushError sends what is still buffered.
func (s stalling) FlushError() error {
	defer s.setDeadline()()
	return http.NewResponseController(s.ResponseWriter).Flush()
}

// setDeadline bounds the time of a write; over is clearDeadline, because in HTTP/2 a deadline ends the answer even while there is nothing
// to write.
func (s stalling) setDeadline() (over func()) {
	_ = http.NewResponseController(s.ResponseWriter).SetWriteDeadline(time.Now().Add(s.limit)) // without deadlines it continues unbounded
	return s.clearDeadline
}

// Unwrap lets http.ResponseController find the wrapped writer.
func (s stalling) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// Hijack implements http.Hijacker.
func (s stalling) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(s.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	return stallingConn{conn, s.limit}, rw, nil
}

// clearDeadline removes the deadline for the next request.
func (s stalling) clearDeadline() {
	_ = http.NewResponseController(s.ResponseWriter).SetWriteDeadline(time.Time{}) // a tunnel has no deadline to remove
}

type stallingConn struct {
	net.Conn
	limit time.Duration
}

// Write implements io.Writer.
func (c stallingConn) Write(p []byte) (int, error) {
	_ = c.SetWriteDeadline(time.Now().Add(c.limit)) // a closed connection gives its error below
	return c.Conn.Write(p)
}
