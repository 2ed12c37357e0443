package agent

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"time"
)

// rejoinMark is what an agent says on a pipe that it begins to serve anew, and what its host answers. What comes before it, in either
// direction, belongs to an older session: gVisor saves with a machine what was in its pipe and not read yet (gVisor,
// fsimpl/host/save_restore.go).
var rejoinMark = []byte("\x00soulbox agent begins anew\n")

// rejoinBound is how much of an older session either side reads before it gives up, in bytes.
const rejoinBound = 16 << 20

// ServeStdio serves the pipe that the agent was started with until Done. A machine that is restored has another host at the other end of
// the same descriptors, in the middle of a session: a signal says so. Then the session ends, the mark is said, and a new one begins.
func (s *Server) ServeStdio(in, out *os.File, again <-chan os.Signal) {
	for serve := s.Serve; ; serve = s.ServeAnew {
		pipe := &stdio{in: in, out: out}
		go func() {
			if err := serve(pipe); err != nil { // its end is not ours: another host may attach
				s.log("session on stdio: %v", err)
			}
		}()
		select {
		case <-again:
		case <-s.Done():
			return
		}
		if err := pipe.retire(); err != nil {
			s.log("begin anew: %v", err)
		}
	}
}

// ServeAnew is Serve for a host that calls Rejoin.
func (s *Server) ServeAnew(conn io.ReadWriteCloser) error {
	if _, err := conn.Write(rejoinMark); err != nil {
		return err
	}
	reader := bufio.NewReaderSize(conn, maxHello)
	if err := skipTo(reader, rejoinMark); err != nil {
		return fmt.Errorf("begin anew: %w", err)
	}
	return s.serve(conn, reader)
}

// stdio is one session's view of a pipe whose descriptors outlast it.
type stdio struct {
	in, out *os.File

	mu      sync.RWMutex // held for reading by who reads or writes
	retired bool
	short   bool // the last read, by the only one who reads, took all that was there
}

// past is a deadline that interrupts whoever reads or writes.
var past = time.Unix(1, 0)

// Read implements io.Reader.
func (s *stdio) Read(p []byte) (int, error) {
	if s.short {
		runtime.Gosched() // what was read is taken care of before more is asked for, which will not be there
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.retired {
		return 0, io.EOF
	}
	n, err := s.in.Read(p)
	s.short = n < len(p)
	return n, err
}

// Write implements io.Writer.
func (s *stdio) Write(p []byte) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.retired {
		return 0, io.ErrClosedPipe
	}
	return s.out.Write(p)
}

// Close implements io.Closer: whoever reads or writes is interrupted. The descriptors stay open.
func (s *stdio) Close() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.retired { // they are another session's by now
		return nil
	}
	return errors.Join(s.in.SetDeadline(past), s.out.SetDeadline(past))
}

// retire takes the descriptors away from the session, for the next: nobody of this one reads or writes any more when it returns.
func (s *stdio) retire() error {
	err := s.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retired = true
	return errors.Join(err, s.in.SetDeadline(time.Time{}), s.out.SetDeadline(time.Time{}))
}

// Rejoin is NewClient for the pipe of a machine that was restored with its memory.
func Rejoin(ctx context.Context, conn io.ReadWriteCloser, version string) (*Client, error) {
	closer := &onceCloser{ReadWriteCloser: conn}
	stop := context.AfterFunc(ctx, func() { _ = closer.Close() })
	reader := bufio.NewReaderSize(conn, maxHello)
	err := skipTo(reader, rejoinMark)
	if err == nil {
		_, err = conn.Write(rejoinMark)
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

// skipTo reads up to the end of mark.
func skipTo(r *bufio.Reader, mark []byte) error {
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
