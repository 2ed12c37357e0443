package main

import (
	queue "container/list"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// counted is a listener whose connections count towards the descriptor budget.
type counted struct {
	net.Listener
	d    *descriptorBudget
	kind kind

	over  chan struct{}
	close func() error
}

// counted makes a listener whose connections are counted.
func (d *descriptorBudget) counted(l net.Listener, k kind) net.Listener {
	c := &counted{Listener: l, d: d, kind: k, over: make(chan struct{})}
	c.close = sync.OnceValue(func() error { close(c.over); return l.Close() })
	return c
}

// Listen is net.Listen for the ports of sandboxes.
func (d *descriptorBudget) Listen(network, address string) (net.Listener, error) {
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, err
	}
	return d.counted(l, port), nil
}

// acceptAgain is the time between two checks whether a connection can be accepted.
const acceptAgain = 50 * time.Millisecond

// Accept implements net.Listener. While there are no descriptors, clients wait in the kernel's queue.
func (c *counted) Accept() (net.Conn, error) {
	for {
		if c.d.mayAccept(c.kind) {
			conn, err := c.Listener.Accept()
			if err == nil {
				return c.d.add(conn, c.kind), nil
			}
			if !passing(err) {
				return nil, err
			}
			c.d.relieveOnce()
		}
		select {
		case <-c.over:
			return nil, net.ErrClosed
		case <-time.After(acceptAgain):
		}
	}
}

// passing reports whether an error is a temporary one of the machine.
func passing(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Close implements net.Listener.
func (c *counted) Close() error { return c.close() }

// accepted is a counted connection.
type accepted struct {
	net.Conn
	d      *descriptorBudget
	kind   kind
	from   netip.Addr
	opened time.Time

	began atomic.Bool // a byte has arrived

	// Guarded by d.mu.
	closed bool
	proven bool // the client has shown a key, or needs none
	active int  // requests being served
	at     *queue.Element
}

// headTime bounds how long the head of a request may take to arrive, and a body that the handler did not read. aheadTime bounds how long a
// connection may be open before its first byte: clients open more connections than they need at once, and net/http would break those off
// after headTime.
const (
	headTime  = 10 * time.Second
	aheadTime = time.Minute
)

// SetReadDeadline implements net.Conn.
func (a *accepted) SetReadDeadline(t time.Time) error {
	if ahead := a.opened.Add(aheadTime); a.kind != port && !a.began.Load() && t.After(time.Now()) && ahead.After(t) {
		t = ahead
	}
	return a.Conn.SetReadDeadline(t)
}

// Read implements io.Reader.
func (a *accepted) Read(p []byte) (int, error) {
	n, err := a.Conn.Read(p)
	if n > 0 && a.kind != port && a.began.CompareAndSwap(false, true) {
		err = errors.Join(err, a.Conn.SetReadDeadline(time.Now().Add(headTime)))
	}
	return n, err
}

// CloseWrite ends the sending direction; the other end can still be read.
func (a *accepted) CloseWrite() error {
	if half, ok := a.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// SetWriteBuffer bounds, in bytes, what the kernel buffers for a client that does not read.
func (a *accepted) SetWriteBuffer(bytes int) error {
	if tcp, ok := a.Conn.(*net.TCPConn); ok {
		return tcp.SetWriteBuffer(bytes)
	}
	return errors.ErrUnsupported
}

// Close implements net.Conn.
func (a *accepted) Close() error {
	a.d.mu.Lock()
	if !a.closed {
		a.closed = true
		a.d.wake(a)
		a.d.total--
		if a.kind == port {
			a.d.raw--
		}
	}
	a.d.mu.Unlock()
	return a.Conn.Close()
}

// begin records that a request's head has arrived; end records that the request is served.
func (a *accepted) begin() {
	a.d.mu.Lock()
	defer a.d.mu.Unlock()
	a.active++
	a.d.wake(a)
}

func (a *accepted) end() {
	a.d.mu.Lock()
	defer a.d.mu.Unlock()
	if a.active--; a.active == 0 && !a.closed && a.kind != port {
		a.d.rest(a)
	}
}

// prove records that the client has shown a key.
func (a *accepted) prove() {
	a.d.mu.Lock()
	defer a.d.mu.Unlock()
	resting := a.at != nil
	a.d.wake(a)
	a.proven = true
	if resting {
		a.d.rest(a)
	}
}

// acceptedOf finds the counted connection under a connection of net/http.
func acceptedOf(c net.Conn) *accepted {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	a, _ := c.(*accepted)
	return a
}
