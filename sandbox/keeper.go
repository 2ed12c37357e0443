package sandbox

import (
	"context"
	"errors"
	"time"

	"soulbox.dev/soulbox/agent"
)

// keeper ends or pauses a sandbox when its time is over.
type keeper struct {
	s     *Sandbox
	again chan struct{} // tells run to look again
}

// look makes run look again, because a time has changed.
func (k *keeper) look() { poke(k.again) }

// poke makes the goroutine that waits on a channel look again.
func poke(waits chan struct{}) {
	select {
	case waits <- struct{}{}:
	default: // it is going to look anyway
	}
}

// run does what is due, as long as the sandbox lives and this server has it.
func (k *keeper) run() {
	s := k.s
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-k.again:
		case <-timer.C:
		}
		at, cause := k.due()
		if at.IsZero() {
			continue // it has ended, and ctx with it
		}
		if wait := time.Until(at); wait > 0 {
			timer.Reset(wait)
			continue
		}
		timer.Reset(k.expire(at, cause))
	}
}

// due returns when the next thing is due, and why.
func (k *keeper) due() (time.Time, Cause) {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	return k.dueNow()
}

// dueNow is due with s.mu held.
func (k *keeper) dueNow() (time.Time, Cause) {
	s := k.s
	r := s.rec
	if r.State == Paused || r.onDisk() {
		return r.RemoveAt, CauseForgotten
	}
	if r.State != Running {
		return time.Time{}, ""
	}
	if r.Times.Idle > 0 && s.client != nil && s.changing == nil {
		if idle := k.lastUse().Add(r.Times.Idle); idle.Before(r.ExpiresAt) {
			return idle, CauseIdle
		}
	}
	return r.ExpiresAt, CauseTimeout
}

// lastUse is when the sandbox was last used: now, if a call is under way. s.mu is held.
func (k *keeper) lastUse() time.Time {
	s := k.s
	calls, last := s.client.Activity()
	if calls > 0 {
		return time.Now()
	}
	for _, at := range []time.Time{s.meter.lastTraffic(), s.rec.Changed} {
		if at.After(last) {
			last = at
		}
	}
	return last
}

// expire does what is due, and returns when to look again. An extension during the grace still counts.
func (k *keeper) expire(at time.Time, cause Cause) (next time.Duration) {
	s := k.s
	times := s.current().Times
	if cause == CauseForgotten {
		_ = s.endIf(Killed, cause, func() bool { return s.changing == nil && k.isOver(cause) }) // end logs its error
		return checkEvery
	}
	if !k.giveGrace(at, cause, times) {
		return checkEvery
	}
	times = s.current().Times // they may have changed meanwhile
	if times.OnTimeout == ActionKill {
		_ = s.endIf(Killed, cause, func() bool { return k.mayKill(cause) })
		return checkEvery
	}
	err := s.pause(s.ctx, PauseOptions{ToDisk: true, FilesOnly: times.FilesOnly, Cause: cause, AutoResume: !times.NoAutoResume})
	if err == nil || s.ctx.Err() != nil || !s.runs() || errors.Is(err, ErrUnfit) { // ErrUnfit is for a server of another version
		return checkEvery
	}
	s.m.log.Error("pause sandbox to disk; it is frozen in memory instead", "sandbox", s.id, "error", err)
	s.log.note(LevelError, "it could not be paused to disk, and is frozen in memory: %v", err)
	if err := s.pause(s.ctx, PauseOptions{Cause: cause, AutoResume: !times.NoAutoResume}); err != nil && s.ctx.Err() == nil {
		s.m.log.Error("pause sandbox; it runs on, and the pause is tried again", "sandbox", s.id, "error", err)
		s.log.note(LevelError, "its time is over, and it could not be paused: it runs on, and the pause is tried again: %v", err)
		return unknownPause // if it is silent or stopped, ping or watch notices
	}
	return checkEvery
}

// mayKill reports whether a sandbox whose time is over still has to be killed for it. s.mu is held.
func (k *keeper) mayKill(cause Cause) bool {
	return k.s.changing == nil && k.s.rec.Times.OnTimeout == ActionKill && k.isOver(cause)
}

// isOver reports whether a time is over. s.mu is held.
func (k *keeper) isOver(cause Cause) bool {
	due, why := k.dueNow()
	return !due.IsZero() && !due.After(time.Now()) && why == cause
}

// giveGrace waits until no work is under way in the sandbox, for at most its grace, and reports whether its time is still over then.
func (k *keeper) giveGrace(at time.Time, cause Cause, times Times) bool {
	s := k.s
	over := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return k.isOver(cause)
	}
	if times.Grace <= 0 || cause != CauseTimeout {
		return over()
	}
	end := at.Add(times.Grace)
	client := k.await(end)
	if client == nil {
		return over()
	}
	s.log.note(LevelInfo, "its time is over; calls and processes in it have %s to finish", times.Grace)
	if times.OnTimeout == ActionKill {
		k.terminate(client)
	}
	ticker := time.NewTicker(gracePoll)
	defer ticker.Stop()
	for time.Now().Before(end) && over() {
		calls, _ := client.Activity()
		if calls == 0 && (times.OnTimeout == ActionPause || len(k.processes(client)) == 0) {
			break
		}
		select {
		case <-ticker.C:
		case <-s.ctx.Done():
			return false
		}
	}
	return over()
}

// await returns the agent of a running sandbox once no change is under way; nil if there is none, or if end comes first.
func (k *keeper) await(end time.Time) *agent.Client {
	s := k.s
	ctx, cancel := context.WithDeadline(s.ctx, end)
	defer cancel()
	for {
		s.mu.Lock()
		changing, client, running := s.changing, s.client, s.rec.State == Running
		s.mu.Unlock()
		if !running || changing == nil {
			return client
		}
		select {
		case <-changing:
		case <-ctx.Done():
			return nil
		}
	}
}

// terminate tells all processes that their time is over.
func (k *keeper) terminate(client *agent.Client) {
	s := k.s
	ctx, cancel := context.WithTimeout(s.ctx, tellTime)
	defer cancel()
	for _, p := range k.processes(client) {
		if _, err := client.Signal(ctx, p.ID, "SIGTERM"); err != nil {
			s.m.log.Debug("tell process that its time is over", "sandbox", s.id, "process", p.ID, "error", err)
		}
	}
}

// processes lists the running processes; from a silent agent it gets none, and there is nothing to wait for.
func (k *keeper) processes(client *agent.Client) []agent.Process {
	s := k.s
	ctx, cancel := context.WithTimeout(s.ctx, tellTime)
	defer cancel()
	list, err := client.List(ctx, agent.ListRequest{State: agent.StateRunning})
	if err != nil {
		s.m.log.Debug("list processes at the end of a sandbox's time", "sandbox", s.id, "error", err)
	}
	return list
}
