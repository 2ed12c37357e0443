package agent

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
)

// RejoinMark is what an agent writes to a pipe before it starts a new session on it, and what the host answers. Everything before it, in
// either direction, belongs to an older session: gVisor saves the unread content of the machine's pipe with the machine (gVisor,
// fsimpl/host/save_restore.go).
var RejoinMark = []byte("\x00soulbox agent begins anew\n")

// rejoinBound is how many bytes of an older session either side reads before it gives up.
const rejoinBound = 16 << 20

// Rejoin is NewClient for the pipe of a machine that was restored with its memory.
func Rejoin(ctx context.Context, conn io.ReadWriteCloser, version string) (*Client, error) {
	closer := &onceCloser{ReadWriteCloser: conn}
	stop := context.AfterFunc(ctx, func() { _ = closer.Close() })
	reader := bufio.NewReaderSize(conn, MaxHello)
	err := SkipTo(reader, RejoinMark)
	if err == nil {
		_, err = conn.Write(RejoinMark)
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = closer.Close()
		return nil, fmt.Errorf("rejoin agent: %w: %w", err, ErrLost)
	}
	return NewClient(ctx, struct {
		io.Reader
		io.WriteCloser
	}{reader, closer}, version)
}

// SkipTo reads up to and including mark.
func SkipTo(r *bufio.Reader, mark []byte) error {
	var tail []byte
	for range rejoinBound {
		b, err := r.ReadByte()
		if err != nil {
			return cutOff(err)
		}
		if tail = append(tail, b); len(tail) > len(mark) {
			tail = tail[1:]
		}
		if b == mark[len(mark)-1] && bytes.Equal(tail, mark) {
			return nil
		}
	}
	return ErrTooLarge
}
