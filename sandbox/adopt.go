package sandbox

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
)

// adoptTime bounds the adoption of one sandbox.
const adoptTime = 20 * time.Second

// rescanEvery is how often a server that keeps sandboxes looks for ones that others have left; adoptTries is how often it tries to take one
// over that runs but does not answer, before it is given up for dead.
const (
	rescanEvery = 5 * time.Second
	adoptTries  = 6
	adoptAtOnce = 8
)

// isLeft says whether a server has left the sandbox running on purpose, and its time is not over.
func (r record) isLeft() bool { return r.Keep && r.State == Running && time.Now().Before(r.ExpiresAt) }

// reap clears what dead servers left, and takes over what servers left on purpose if this one keeps sandboxes, too; others leave it alone.
// A failure is logged and leaves the sandbox for later.
func (m *Manager) reap() {
	var mu sync.Mutex
	tries := map[string]int{}
	ticker := time.NewTicker(rescanEvery)
	defer ticker.Stop()
	for {
		orphans, err := m.store.orphans()
		if err != nil {
			m.log.Error("look for sandboxes of dead servers", "error", err)
		}
		var all sync.WaitGroup
		slots := make(chan struct{}, adoptAtOnce) // one that is silent must not hold up the others
		for id, lock := range orphans {
			slots <- struct{}{}
			all.Go(func() {
				defer func() { <-slots }()
				m.takeOver(id, lock, func() int {
					mu.Lock()
					defer mu.Unlock()
					tries[id]++
					return tries[id]
				})
			})
		}
		all.Wait()
		if !m.opts.Keep {
			return
		}
		select {
		case <-m.ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// takeOver adopts or reaps a sandbox that nobody owns.
func (m *Manager) takeOver(id string, lock *os.File, try func() int) {
	r, err := m.store.load(id)
	var io *fs.PathError
	if errors.As(err, &io) && !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrInvalid) && r.Keep { // it cannot be read now, or is of another version: not for us to end
		m.log.Error("read the state of a sandbox; it is left alone", "sandbox", id, "error", err)
		_ = lock.Close() // it was only read
		return
	}
	if err == nil && r.isLeft() {
		if m.opts.Keep {
			if err = m.adopt(r, lock); err == nil {
				m.log.Info("adopted sandbox", "sandbox", id)
				return
			}
		}
		if !m.opts.Keep || m.ctx.Err() != nil || try() < adoptTries {
			if err != nil {
				m.log.Warn("adopt sandbox; will try again", "sandbox", id, "error", err)
			}
			_ = lock.Close() // it was only read
			return
		}
		m.log.Error("cannot adopt sandbox; it is ended", "sandbox", id, "error", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), destroyTimeout)
	defer cancel()
	if err := m.opts.Runtime.Reap(ctx, m.store.path(id)); err != nil {
		m.log.Error("reap sandbox of a dead server", "sandbox", id, "error", err)
		_ = lock.Close() // the next start tries again
		return
	}
	if err := m.store.remove(id, lock); err != nil {
		m.log.Error("remove sandbox of a dead server", "sandbox", id, "error", err)
		return
	}
	m.log.Info("reaped sandbox of a dead server", "sandbox", id)
}

// adopt takes over a sandbox that a server left running on purpose. Nothing has changed when it fails.
func (m *Manager) adopt(r record, lock *os.File) (err error) {
	id := r.ID
	ctx, cancel := context.WithTimeout(m.ctx, adoptTime)
	defer cancel()
	machine, err := m.opts.Runtime.Attach(ctx, m.store.path(id))
	if err != nil {
		return err
	}
	client, err := agent.NewClient(ctx, machine.Pipe(), m.opts.Version)
	if err != nil {
		_ = machine.Pipe().Close() // the sandbox does not notice
		return err
	}
	if r.Traffic == "" { // of an older version; it is saved with the next change
		r.Traffic = rand.Text()
	}
	sb := m.newSandbox(r)
	sb.lock, sb.machine, sb.client = lock, machine, client
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
	sb.serveAgain()
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
	wait := s.stopPorts()
	_ = client.Close() // its end of the pipe is the agent's business
	wait()
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
