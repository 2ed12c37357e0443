package guest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
)

// ServeStdio serves the pipe that the agent was started with, until Done. After a restore the same descriptors lead to another host while a
// session is open, and a signal tells that. Then ServeStdio ends the session, writes the mark and begins a new session.
func (s *Server) ServeStdio(in, out *os.File, again <-chan os.Signal) {
	for serve := s.Serve; ; serve = s.ServeAnew {
		pipe := &stdio{in: in, out: out}
		go func() {
			if err := serve(pipe); err != nil { // the error ends only this session: another host may attach
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
	if _, err := conn.Write(agent.RejoinMark); err != nil {
		return err
	}
	reader := bufio.NewReaderSize(conn, agent.MaxHello)
	if err := agent.SkipTo(reader, agent.RejoinMark); err != nil {
		return fmt.Errorf("begin anew: %w", err)
	}
	return s.serve(conn, reader)
}

// stdio is one session's view of a pipe whose descriptors outlast the session.
type stdio struct {
	in, out *os.File

	mu      sync.RWMutex // held for reading during a read or write
	retired bool
	short   bool // the last read, by the only reader, took everything that was available
}

// past is a deadline that interrupts reads and writes.
var past = time.Unix(1, 0)

// Read implements io.Reader.
func (s *stdio) Read(p []byte) (int, error) {
	if s.short {
		runtime.Gosched() // handle what was read before the next read, which would find nothing
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

// Close implements io.Closer: it interrupts reads and writes. The descriptors stay open.
func (s *stdio) Close() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.retired { // they belong to another session by now
		return nil
	}
	return errors.Join(s.in.SetDeadline(past), s.out.SetDeadline(past))
}

// retire takes the descriptors away from the session, for the next one: when it returns, this session reads and writes no more.
func (s *stdio) retire() error {
	err := s.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retired = true
	return errors.Join(err, s.in.SetDeadline(time.Time{}), s.out.SetDeadline(time.Time{}))
}
