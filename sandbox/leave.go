package sandbox

import (
	"context"
	"errors"
)

// leave gives up a sandbox, which stays as it is, running or on disk, until the next server adopts it. It reports whether it did.
func (s *Sandbox) leave() bool {
	s.mu.Lock()
	if s.isLeft() {
		s.mu.Unlock()
		return true
	}
	if s.ending != nil || !s.rec.onDisk() && (!s.rec.Keep || s.rec.State != Running && s.rec.State != Paused) {
		s.mu.Unlock()
		return false
	}
	close(s.left)
	s.mu.Unlock()
	s.cancel(ErrClosed)
	s.turn <- struct{}{} // wait for a change that is under way; no turn is given after this one
	totals, seen := s.meter.totals(), s.meter.haveSeen()
	s.mu.Lock()
	s.rec.Totals, s.rec.Seen = totals, seen
	client, lock, r := s.client, s.lock, s.rec
	s.mu.Unlock()
	if err := s.m.store.save(r); err != nil {
		s.m.log.Warn("save what a sandbox has used", "sandbox", s.id, "error", err) // its last sample tells nearly as much
	}
	wait := s.ports.stop()
	if client != nil {
		_ = client.Close() // the agent handles the end of its pipe
	}
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

// pauseAtExit pauses the sandbox to disk if it is not there yet. If that fails, the sandbox runs on without a server until the next one
// adopts it.
func pauseAtExit(s *Sandbox) {
	r := s.current()
	if r.onDisk() || r.State != Running && r.State != Paused || s.isLeft() {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, exitTime)
	defer cancel()
	o := PauseOptions{ToDisk: true, AutoResume: !r.Times.NoAutoResume, Cause: CauseShutdown}
	if r.State == Paused { // keep how it was paused
		o.AutoResume, o.Cause = r.Pause.AutoResume, Cause(r.Cause)
	}
	err := s.pause(ctx, o)
	if err != nil && !errors.Is(err, ErrState) && !errors.Is(err, ErrClosed) {
		s.m.log.Error("pause sandbox at the end of its server; it runs on", "sandbox", s.id, "error", err)
	}
}
