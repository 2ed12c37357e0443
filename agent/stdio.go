package agent

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
)

// RejoinMark is what an agent says on a pipe that it begins to serve anew, and what its host answers. What comes before it, in either
// direction, belongs to an older session: gVisor saves with a machine what was in its pipe and not read yet (gVisor,
// fsimpl/host/save_restore.go).
var RejoinMark = []byte("\x00soulbox agent begins anew\n")

// rejoinBound is how much of an older session either side reads before it gives up, in bytes.
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

// SkipTo reads up to the end of mark.
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
