package agent

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"
)

// acceptedConn is a connection of which no memory is kept after Close.
type acceptedConn struct {
	narrowStream
	stop func() bool
}

// Close implements net.Conn: it ends both reading and writing.
func (c *acceptedConn) Close() error {
	c.stop()
	_ = c.Stream.SetReadDeadline(time.Unix(1, 0))
	err := c.Stream.Close()
	c.letGo()
	return err
}

// CloseWrite closes the writing half.
func (c *acceptedConn) CloseWrite() error { return c.Stream.Close() }

// Accept waits for the next connection that a program in the sandbox makes to an address of its loopback. The agent listens on the address
// from the first Accept on. Accept does not count as use of the sandbox. The connection ends when ctx ends.
func (c *Client) Accept(ctx context.Context, address string) (net.Conn, error) {
	stream, err := UntilDone(ctx, func() (*yamux.Stream, error) { return c.open(Header{Stream: StreamAccept, Address: address}) }, c.giveUp)
	if err != nil {
		return nil, err
	}
	conn := &acceptedConn{narrowStream: newNarrowStream(stream, c.windows)}
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
