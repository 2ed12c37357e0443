package agent

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"
)

// acceptedConn is a connection that nothing holds once it is closed.
type acceptedConn struct {
	narrowStream
	stop func() bool
}

// Close implements net.Conn: nothing more is read or written.
func (c *acceptedConn) Close() error {
	c.stop()
	_ = c.Stream.SetReadDeadline(time.Unix(1, 0))
	err := c.Stream.Close()
	c.letGo()
	return err
}

// CloseWrite ends what is written.
func (c *acceptedConn) CloseWrite() error { return c.Stream.Close() }

// Accept waits for the next connection that is made in the sandbox to an address of its loopback, which is listened on from the first
// Accept on. It is no use of the sandbox. When ctx ends the connection is at its end.
func (c *Client) Accept(ctx context.Context, address string) (net.Conn, error) {
	stream, err := OrGiveUp(ctx, func() (*yamux.Stream, error) { return c.open(Header{Stream: StreamAccept, Address: address}) }, c.giveUp)
	if err != nil {
		return nil, err
	}
	conn := &acceptedConn{narrowStream: narrowStream{stream, c.windows}}
	conn.stop = context.AfterFunc(ctx, func() {
		_ = stream.SetReadDeadline(time.Unix(1, 0))
		_ = stream.Close()
		_ = stream.SetDeadline(time.Unix(1, 0))
		conn.letGo()
	})
	var a Answer
	if err := ReadMessage(conn, &a); err != nil {
		_ = conn.Close()
		return nil, c.streamError(ctx, StreamAccept, err)
	}
	if a.Error != nil {
		_ = conn.Close()
		if errors.Is(a.Error, unix.EADDRINUSE) {
			return nil, errors.Join(a.Error, ErrLimit)
		}
		return nil, a.Error
	}
	return conn, nil
}
