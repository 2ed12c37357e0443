package sandbox

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"

	"soulbox.dev/soulbox/agent"
)

// admit returns nil if a connection to this machine's loopback may come in: if the port is not public, only the server's own user and root
// may.
func (p *ports) admit(e *exposed, conn net.Conn) error {
	p.mu.Lock()
	public := e.Public
	p.mu.Unlock()
	if public {
		return nil
	}
	return checkPeer(conn)
}

// tellRefused tells a client why it is refused; if it is telling maxStrangers already, it only closes the connection.
func (e *exposed) tellRefused(conn net.Conn, why string) {
	select {
	case e.strangers <- struct{}{}:
	default:
		_ = conn.Close()
		return
	}
	e.conns.Go(func() {
		defer func() { <-e.strangers }()
		defer conn.Close()
		sayNot(conn, http.StatusForbidden, why)
	})
}

// splice connects a client to a port of the sandbox in both directions, and keeps half-closes, until both sides have closed or ctx ends.
func (p *ports) splice(ctx context.Context, conn net.Conn, port int) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	client, err := p.sb.Agent(ctx, "connect to a port of")
	if err != nil {
		sayNot(conn, http.StatusBadGateway, fmt.Sprintf("The sandbox of this port does not run: %v.\n", err))
		return
	}
	guest, release, err := p.dial(ctx, client, port)
	if err != nil {
		sayNot(conn, http.StatusBadGateway,
			fmt.Sprintf("Nothing listens on port %d of this sandbox. Start a server there (on 127.0.0.1 or 0.0.0.0), then try again.\n",
				port))
		return
	}
	defer release()
	defer context.AfterFunc(ctx, func() { _ = guest.Close() })()
	back := make(chan struct{})
	go func() {
		defer close(back)
		if _, err := io.Copy(stallingConn{conn, p.sb.m.opts.StallTime}, guest); err != nil {
			cancel()
			return
		}
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite() // if the client is gone, that shows below
		}
	}()
	if _, err := io.Copy(guest, conn); err != nil {
		cancel()
	}
	_ = guest.Close() // its writing half
	<-back
}

// dial connects to a server on either loopback of the sandbox. The connection lives until release is called; its bytes are counted.
func (p *ports) dial(ctx context.Context, client *agent.Client, port int) (conn net.Conn, release func(), err error) {
	var errs error
	for _, host := range []string{"127.0.0.1", "::1"} {
		// The context bounds the connection's life, so the time for the dial is bounded separately.
		life, cancel := context.WithCancel(ctx)
		timer := time.AfterFunc(dialTime, cancel)
		conn, err := client.Dial(life, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err == nil && timer.Stop() {
			return countedConn{conn, p.sb.meter}, cancel, nil
		}
		timer.Stop()
		cancel()
		errs = errors.Join(errs, err)
	}
	return nil, nil, errs
}

// countedConn counts the bytes of a connection as the sandbox's traffic.
type countedConn struct {
	net.Conn
	meter *meter
}

// Read implements io.Reader.
func (c countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.meter.count(0, int64(n))
	return n, err
}

// Write implements io.Writer.
func (c countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.meter.count(int64(n), 0)
	return n, err
}

// stallingConn ends a connection whose other side reads nothing for limit.
type stallingConn struct {
	net.Conn
	limit time.Duration
}

// Write implements io.Writer.
func (c stallingConn) Write(p []byte) (int, error) {
	_ = c.SetWriteDeadline(time.Now().Add(c.limit)) // if the connection has ended, the write below fails
	return c.Conn.Write(p)
}

// sayNot answers a client that speaks HTTP with a page; other clients only see the connection close.
func sayNot(conn net.Conn, code int, body string) {
	_ = conn.SetDeadline(time.Now().Add(peekTime)) // if the client is gone, the read fails
	r := bufio.NewReader(conn)
	line, err := r.ReadSlice('\n')
	if err != nil || !bytes.Contains(line, []byte(" HTTP/1.")) {
		return
	}
	_, _ = io.WriteString(conn, page(code, body)) // as above
	for err == nil {                              // read what the client still sends, so that it sees the page and not a reset
		_, err = r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			err = nil
		}
	}
}

// page is an HTTP/1.1 response after which the connection closes.
func page(code int, body string) string {
	return fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", code,
		http.StatusText(code), len(body), body)
}
