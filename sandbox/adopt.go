package sandbox

import (
	"context"
	"fmt"
	"os"
	"time"

	"soulbox.dev/soulbox/agent"
)

// adoptTime bounds the adoption of one sandbox.
const adoptTime = 20 * time.Second

// adopt takes over a sandbox that a server left running on purpose. Nothing has changed when it fails.
func (m *Manager) adopt(id string, lock *os.File) (err error) {
	r, err := m.store.load(id)
	if err != nil {
		return err
	}
	if !r.Keep || r.State != Running || !time.Now().Before(r.ExpiresAt) {
		return fmt.Errorf("it was not to outlive its server, or its time is over: %w", ErrInvalid)
	}
	ctx, cancel := context.WithTimeout(m.ctx, adoptTime)
	defer cancel()
	machine, err := m.opts.Runtime.Attach(ctx, m.store.path(id))
	if err != nil {
		return err
	}
	client, err := agent.NewClient(ctx, machine.Pipe(), m.opts.Version)
	if err != nil {
		_ = machine.Pipe().Close() // the sandbox is reaped next
		return err
	}
	sb := &Sandbox{m: m, id: id, owner: r.Owner, cancel: func(error) {}, booted: make(chan struct{}), left: make(chan struct{}), ended: make(chan struct{}),
		rec: r, lock: lock, machine: machine, client: client}
	close(sb.booted)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		_ = client.Close()
		return ErrClosed
	}
	m.sandboxes[id] = sb
	sb.mu.Lock()
	defer sb.mu.Unlock()
	sb.record("adopted by a new server")
	sb.live()
	return nil
}

// leave lets go of a running sandbox, which goes on without this server until the next adopts it. It reports whether it did.
func (s *Sandbox) leave() bool {
	s.mu.Lock()
	if s.isLeft() {
		s.mu.Unlock()
		return true
	}
	if !s.rec.Keep || s.rec.State != Running {
		s.mu.Unlock()
		return false
	}
	close(s.left)
	s.expiry.Stop()
	client, lock := s.client, s.lock
	s.mu.Unlock()
	_ = client.Close() // its end of the pipe is the agent's business
	if err := lock.Close(); err != nil {
		s.m.log.Error("leave sandbox", "sandbox", s.id, "error", err)
	}
	s.m.log.Info("left sandbox to the next server", "sandbox", s.id)
	return true
}

func (s *Sandbox) isLeft() bool {
	select {
	case <-s.left:
		return true
	default:
		return false
	}
}
