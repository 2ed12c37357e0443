package client

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"

	"connectrpc.com/connect"
	pb "soulbox.dev/soulbox/api/envd/spec/process"
	"soulbox.dev/soulbox/api/envd/spec/process/processconnect"
)

// tell calls the server that has the process, or the next one if that server is gone. It does not repeat a call that may have arrived,
// unless twice says that repeating it does no harm.
func (s *ProcessHandle) tell(ctx context.Context, twice bool, do func(processconnect.ProcessClient) error) error {
	for pause, began := firstPause, time.Now(); ; pause = min(2*pause, lastPause) {
		c := s.current()
		err := do(c.processes(s.sandbox))
		if err == nil {
			return nil
		}
		var dial *net.OpError
		refused := errors.As(err, &dial) && dial.Op == "dial"
		busy := connect.IsWireError(err) && connect.CodeOf(err) == connect.CodeResourceExhausted // too many requests at once
		if connect.IsWireError(err) && !busy || ctx.Err() != nil || !busy && !refused && !twice || time.Since(began) > patience {
			return s.unlessPaused(ctx, c, err)
		}
		select { // Follow finds the next server
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// maxInput is how many bytes are written to a process at once.
const maxInput = 2 << 20

// Write writes to the process's stdin or its terminal. It blocks while the process does not read.
func (s *ProcessHandle) Write(ctx context.Context, p []byte) error {
	s.inputs.Lock()
	defer s.inputs.Unlock()
	for len(p) > 0 {
		part := p[:min(len(p), maxInput)]
		in := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: part}}
		if s.pty {
			in.Input = &pb.ProcessInput_Pty{Pty: part}
		}
		err := s.tell(ctx, false, func(c processconnect.ProcessClient) error {
			_, err := c.SendInput(ctx, asked(s, &pb.SendInputRequest{Process: by(s.PID), Input: in}))
			return err
		})
		if err != nil {
			return err
		}
		p = p[len(part):]
	}
	return nil
}

// CloseInput closes the process's stdin.
func (s *ProcessHandle) CloseInput(ctx context.Context) error {
	s.inputs.Lock()
	defer s.inputs.Unlock()
	return s.tell(ctx, true, func(c processconnect.ProcessClient) error {
		_, err := c.CloseStdin(ctx, asked(s, &pb.CloseStdinRequest{Process: by(s.PID)}))
		return err
	})
}

// Resize changes the size of the terminal.
func (s *ProcessHandle) Resize(ctx context.Context, size Size) error {
	return s.tell(ctx, true, func(c processconnect.ProcessClient) error {
		_, err := c.Update(ctx, asked(s, &pb.UpdateRequest{Process: by(s.PID), Pty: pty(size)}))
		return err
	})
}

// Signal sends a signal to the process's group.
func (s *ProcessHandle) Signal(ctx context.Context, sig syscall.Signal) error {
	return s.tell(ctx, false, func(c processconnect.ProcessClient) error { return s.signal(ctx, c, sig) })
}

func (s *ProcessHandle) signal(ctx context.Context, c processconnect.ProcessClient, sig syscall.Signal) error {
	_, err := c.SendSignal(ctx, asked(s, &pb.SendSignalRequest{Process: by(s.PID), Signal: pb.Signal(sig)}))
	return err
}

// unlessPaused returns the error of a call, or ErrPaused if the call was refused because the sandbox is paused.
func (s *ProcessHandle) unlessPaused(ctx context.Context, c *Client, err error) error {
	if connect.CodeOf(err) == connect.CodeFailedPrecondition {
		if box, berr := c.Sandbox(ctx, s.sandbox); berr == nil && box.State == "paused" {
			return ErrPaused
		}
	}
	if err != nil {
		err = c.plainError(err)
	}
	return err
}

// Process returns the process that the handle follows.
func (s *ProcessHandle) Process() Process { return Process{PID: s.PID, ID: s.id} }

// Kill ends the process and everything that it has started, on whichever server has its sandbox now. It is for callers that no longer
// follow the process. It does not wake a paused sandbox, but returns ErrPaused.
func (s *ProcessHandle) Kill(ctx context.Context) error {
	c := s.current()
	for {
		err := s.signal(ctx, c.processes(s.sandbox), syscall.SIGKILL)
		if err == nil || connect.IsWireError(err) || ctx.Err() != nil {
			return s.unlessPaused(ctx, c, err)
		}
		select {
		case <-time.After(firstPause):
		case <-ctx.Done():
			return c.plainError(err)
		}
		if next, err := s.again(ctx); err == nil {
			c = next
		}
	}
}

// Release lets the process continue without followers, even if it was started with Linger.
func (s *ProcessHandle) Release(ctx context.Context) error {
	return s.tell(ctx, true, func(c processconnect.ProcessClient) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel() // closes the stream
		res, err := c.Connect(ctx, asked(s, &pb.ConnectRequest{Process: by(s.PID)}))
		if err == nil && !res.Receive() {
			err = ended(res.Err())
		}
		return err
	})
}

// Signal sends a signal to a process of a sandbox and to its group.
func (c *Client) Signal(ctx context.Context, sandbox string, p Process, sig syscall.Signal) error {
	s := &ProcessHandle{PID: p.PID, id: p.ID}
	if err := s.signal(ctx, c.processes(sandbox), sig); err != nil {
		return c.plainError(err)
	}
	return nil
}
