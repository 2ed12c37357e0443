package guest

import (
	"context"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
	"soulbox.dev/soulbox/agent"
)

// acceptWait is how long a connection waits for a host to take it; maxPending is how many connections may wait.
const (
	acceptWait = 30 * time.Second
	maxPending = 128
)

// acceptors are the addresses of the sandbox's loopback on which a host takes connections. They stay open from one host to the next. It is
// safe for concurrent use.
type acceptors struct {
	mu     sync.Mutex
	byAddr map[string]chan net.Conn
}

// on returns the channel of connections to an address; the first call begins to listen on the address.
func (a *acceptors) on(ctx context.Context, address string) (chan net.Conn, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if conns := a.byAddr[address]; conns != nil {
		return conns, nil
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil || net.ParseIP(host) == nil || !net.ParseIP(host).IsLoopback() {
		return nil, agent.Invalid("accept on %q: only the sandbox's own loopback can be listened on", agent.Clip(address, 80))
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	conns := make(chan net.Conn)
	if a.byAddr == nil {
		a.byAddr = map[string]chan net.Conn{}
	}
	a.byAddr[address] = conns
	context.AfterFunc(ctx, func() { _ = l.Close() })
	go func() {
		slots := make(chan struct{}, maxPending)
		for {
			slots <- struct{}{}
			conn, err := l.Accept()
			if err != nil { // the agent is closing, or out of descriptors: the next call listens again
				a.mu.Lock()
				delete(a.byAddr, address)
				a.mu.Unlock()
				_ = l.Close()
				return
			}
			go func() {
				defer func() { <-slots }()
				timer := time.NewTimer(acceptWait)
				defer timer.Stop()
				select {
				case conns <- conn:
				case <-timer.C:
					_ = conn.Close()
				case <-ctx.Done(): // the agent is at its end
					_ = conn.Close()
				}
			}()
		}
	}()
	return conns, nil
}

// serveAccept waits for a connection to an address of the loopback, and passes it to the host.
func (s *Server) serveAccept(ctx context.Context, stream *yamux.Stream, h agent.Header) {
	conns, err := s.acceptors.on(s.ctx, h.Address)
	if err != nil {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(err)})
		return
	}
	select {
	case conn := <-conns:
		defer conn.Close()
		defer s.second.hold()()
		defer context.AfterFunc(ctx, func() { // the host is gone
			_ = conn.Close()
			_ = stream.SetDeadline(time.Unix(1, 0))
		})()
		if agent.WriteMessage(stream, agent.Answer{}) == nil {
			giveOver(stream, conn)
		}
	case <-ctx.Done():
	}
}

// lingerTime is how long a connection may stay open after the host has closed its half.
const lingerTime = 5 * time.Second

// giveOver is splice, but the host decides the end: once it has closed its half, the sandbox has lingerTime to close its own.
func giveOver(stream *yamux.Stream, conn net.Conn) {
	var both sync.WaitGroup
	both.Go(func() {
		_, err := io.Copy(conn, stream)
		if half, ok := conn.(*net.TCPConn); ok && err == nil {
			_ = half.CloseWrite()
		}
		_ = conn.SetReadDeadline(time.Now().Add(lingerTime))
	})
	both.Go(func() {
		_, err := io.Copy(stream, conn)
		_ = stream.Close()
		if err != nil {
			_ = conn.Close()
		}
	})
	both.Wait()
}
